"""A bound socket with many peers. Who sent a message is what the allow list says of its connection's key.

    frames of ROUTER:  routing id | magic, version | header | payloads...
                       each with the connection's User-Id (its key, put there by libzmq) and file descriptor

A peer is known to the caller by an *identity*, opaque bytes: a digest of the connection's key and ZeroMQ's routing id. A
routing id alone proves nothing, a peer may choose it; but libzmq lets nobody take the routing id of a connection that
stands, a connection's end is noticed before anything is sent, and an identity of one key never names a connection of
another one. So what is sent to an identity goes to the holder of that key or nowhere.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq
from zmq.utils import z85

from nodes.keys import NAME, AllowList, Credentials, Peer
from nodes.messages import (
    MAX_FRAMES,
    ROLES,
    ForeignVersion,
    Message,
    MessageRefused,
    Probe,
    Probed,
    Refused,
    decode,
    encode,
    name_of,
)
from nodes.results import version
from nodes.tasks import background
from nodes.transport.authenticator import DOMAIN, Authenticator
from nodes.transport.channel import Channel
from nodes.transport.complaints import Complaints
from nodes.transport.lanes import (
    Lane,
    Monitor,
    PeerGone,
    PeerSlow,
    check_frames,
    check_plain_text,
    prepare,
)
from nodes.transport.meter import Meter
from relay.errors import BadRequest, RelayError

DIGEST = 16  # bytes of an identity that stand for the key


class Received(NamedTuple):
    """Payloads are views of ZeroMQ's own memory, which lives as long as they do: copy what outlives the call, and what
    shall be a tensor."""

    identity: bytes
    peer: Peer
    message: Message
    payloads: list[bytes | memoryview]


@dataclass
class _Connection:
    user: str  # what it proved: its public key; in plain text role/name as it says
    routing_id: bytes
    descriptor: int
    address: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # messages to one peer keep their order

    @property
    def identity(self) -> bytes:
        return hashlib.blake2b(self.user.encode(), digest_size=DIGEST).digest() + self.routing_id


class Server:
    """`async with Server(...) as server`, or `open` and `close`. Not to be shared between event loops."""

    def __init__(
        self,
        address: str,
        lane: Lane,
        me: Credentials,
        allow: AllowList | None = None,
        *,
        allow_plain_text: bool = False,
    ):
        """`address`: tcp://HOST:PORT (port *: any) or ipc://PATH. With a secret in `me` every peer must prove a key of
        `allow`; without, see SECURITY.md. BadRequest if that cannot be, or an address is none."""
        if not me.secret:
            check_plain_text(address, allow_plain_text)
        elif allow is None:
            raise BadRequest(f"{address}: a key without an allow list lets everybody in: give it one")
        self.address, self.lane, self.me, self._allow = address, lane, me, allow
        self.complaints = Complaints(f"{me.name}, {lane.name}")
        self._version = version()
        self._connections: dict[bytes, _Connection] = {}  # by routing id; those that stand and have spoken
        self._open: set[int] = set()  # file descriptors
        self._meters: dict[str, Meter] = {}  # by user: they outlive a connection
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Server:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Bind; `address` is then the real one. RelayError if that cannot be."""
        self._context = zmq.Context()
        self._authenticator = Authenticator(self._context, self._admit)
        self._socket = self._context.socket(zmq.ROUTER)
        prepare(self._socket, self.address, self.lane)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self.me.secret:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, self.me.secret.encode())
        else:
            self._socket.setsockopt(zmq.PLAIN_SERVER, 1)
        self._channel = Channel(self._socket)
        self._monitor = Monitor(self._socket)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            await self.close()
            raise RelayError(f"cannot bind {self.address}: {error.strerror}") from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._tasks = [background(self._authenticator.run()), background(self._watch())]

    async def close(self) -> None:
        """What was sent and is not out yet has another second."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._monitor.close()
        self._channel.close()
        self._authenticator.close()
        await asyncio.to_thread(self._context.term)

    # --- in ---

    async def receive(self, timeout_s: float | None = None) -> Received:
        """The next message that its sender may send. TimeoutError when the time is over; nothing is lost then.

        All others are refused (`Refused` to the sender), counted and logged. `Probe` is answered here."""
        async with asyncio.timeout(timeout_s):
            while True:
                # Messages that are there are taken without waiting: let the others of this event loop have their turn.
                await asyncio.sleep(0)
                if (frames := self._channel.take()) is None:
                    await self._channel.until(zmq.POLLIN)
                elif (received := self._take(frames)) is not None:
                    return received

    def _take(self, frames: list[zmq.Frame]) -> Received | None:
        connection = self._connection_of(frames[0])
        if (peer := self._peer_of(connection.user)) is None:
            self._refuse(connection, "key", 401, "its key is not on the allow list (any more)")
            return None
        who = f"{peer.role} {peer.name}"
        try:
            message, payloads = decode([frame.buffer for frame in frames[1 : MAX_FRAMES + 2]])
        except MessageRefused as error:
            kind, status = ("version", 505) if isinstance(error, ForeignVersion) else ("malformed", 400)
            self._refuse(connection, kind, status, f"{who}: {error}")
            return None
        if peer.role not in message.senders:
            self._refuse(connection, "role", 403, f"{who} may not send {name_of(message)}", message)
            return None
        meter = self.meter(connection.identity)
        meter.received(message, sum(len(frame) for frame in frames[1:]))
        if isinstance(message, Probe):
            probed = Probed(sequence=message.sequence, name=self.me.name, version=self._version)
            self._try_to_send(connection, encode(probed, payloads))
            return None
        return Received(connection.identity, peer, message, payloads)

    def _connection_of(self, frame: zmq.Frame) -> _Connection:
        """The connection that a message came by, taken in if it is new."""
        self._note_cuts()
        routing_id, user, descriptor = frame.bytes, str(frame.get("User-Id")), int(frame.get(zmq.SRCFD))
        known = self._connections.get(routing_id)
        if known is None or (known.user, known.descriptor) != (user, descriptor):
            known = _Connection(user, routing_id, descriptor, str(frame.get("Peer-Address")))
            if descriptor in self._open:  # else the last words of a connection that is cut
                self._connections[routing_id] = known
        return known

    def _refuse(
        self, connection: _Connection, kind: str, status: int, reason: str, message: Message | None = None
    ) -> None:
        self.complaints.add(kind, f"refused a message from {connection.address} ({connection.user}): {reason}")
        if isinstance(message, Refused):  # no refusals of refusals
            return
        what = name_of(message) if message else ""
        job, ref = getattr(message, "job", ""), getattr(message, "ref", 0)
        self._try_to_send(connection, encode(Refused(reason=reason, status=status, what=what, job=job, ref=ref)))

    # --- out ---

    async def send(
        self,
        identity: bytes,
        message: Message,
        payloads: Sequence[bytes | memoryview] = (),
        timeout_s: float | None = None,
    ) -> None:
        """Hand it to ZeroMQ; what acknowledges it is a message. Payloads are not copied: leave them as they are.

        PeerGone: no connection, or its key is revoked. PeerSlow: its queue was full all the time (default: `timeout_for`
        of its meter). MessageRefused: too long."""
        frames = encode(message, payloads)
        size = check_frames(frames, self.lane)
        meter = self.meter(identity)
        limit = meter.timeout_for(size) if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit), self._standing(identity).turn:
                pause = 0.001
                while not self._send_now(self._standing(identity), frames):
                    # ROUTER cannot be waited for: it is writable as soon as any one peer is.
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 0.05)
        except TimeoutError:
            peer = self.peer(identity)
            raise PeerSlow(f"{peer.name if peer else 'a peer'} took nothing for {limit:.1f} s") from None
        meter.sent(message, size)

    def peer(self, identity: bytes) -> Peer | None:
        """Who holds the identity, None if there is no such connection or its key is revoked."""
        connection = self._connections.get(identity[DIGEST:])
        if connection is None or connection.identity != identity:
            return None
        return self._peer_of(connection.user)

    def meter(self, identity: bytes) -> Meter:
        """What traffic with that peer took."""
        connection = self._connections.get(identity[DIGEST:])
        user = connection.user if connection is not None and connection.identity == identity else ""
        return self._meters.setdefault(user, Meter()) if user else Meter()

    def _standing(self, identity: bytes) -> _Connection:
        self._note_cuts()
        if self.peer(identity) is None:
            raise PeerGone("the peer's connection is gone, or its key is not on the allow list any more")
        return self._connections[identity[DIGEST:]]

    def _send_now(self, connection: _Connection, frames: list[bytes | memoryview]) -> bool:
        """False: its queue is full."""
        try:
            return self._channel.put([connection.routing_id, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._connections.pop(connection.routing_id, None)
            raise PeerGone("the peer's connection is gone") from None

    def _try_to_send(self, connection: _Connection, frames: list[bytes | memoryview]) -> None:
        """An answer of the transport's own: whoever does not read misses it."""
        try:
            if not self._send_now(connection, frames):
                self.complaints.add("unread", f"{connection.user} does not read its answers")
        except PeerGone:
            pass

    # --- who is there ---

    def _peer_of(self, user: str, now: bool = False) -> Peer | None:
        if self._allow is not None and self.me.secret:
            return self._allow.find(user, now)
        role, _, name = user.partition("/")
        return Peer(name=name, role=role, key=user) if role in ROLES and NAME.fullmatch(name) else None

    def _admit(self, mechanism: bytes, credentials: list[bytes], address: str) -> str | None:
        if mechanism != (b"CURVE" if self.me.secret else b"PLAIN"):
            return None
        user = z85.encode(credentials[0]).decode() if self.me.secret else credentials[0].decode("ascii", "replace")
        if self._peer_of(user, now=True) is None:
            self.complaints.add("unknown", f"refused a connection from {address}: {user} is not on the allow list")
            return None
        return user

    async def _watch(self) -> None:
        while True:
            self._note(await self._monitor.wait())

    def _note_cuts(self) -> None:
        self._note(self._monitor.drain())

    def _note(self, events: list[tuple[int, int]]) -> None:
        for event, value in events:
            if event == zmq.EVENT_ACCEPTED:
                self._open.add(value)
            elif event == zmq.EVENT_DISCONNECTED:
                self._open.discard(value)
                gone = [key for key, known in self._connections.items() if known.descriptor == value]
                for routing_id in gone:
                    del self._connections[routing_id]
            elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                speaks = "with keys" if self.me.secret else "plain text"
                wrong = value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC
                text = "somebody has another key than ours for us" if wrong else f"somebody does not speak {speaks}"
                self.complaints.add("handshake", f"a connection failed at {self.address}: {text}")
