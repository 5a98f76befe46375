"""One connection to one server, kept up, which says how it stands.

    connecting -> connected -> (cut) connecting -> ...
               -> unreachable: nobody there; tried again with backoff and jitter
               -> refused: one side's key, or the version, is not what the other wants; tried again likewise

libzmq's own reconnecting has backoff or jitter but not both, and forgets its backoff when a handshake fails, so a refused
key would knock several times a second. It is switched off; `_keep_up` does it. Every connection has a new routing id, given
by the server: one that outlived a cut would be refused as long as the server takes the old connection for alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from nodes.keys import Credentials, Peer, is_key
from nodes.messages import (
    MAX_FRAMES,
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
from nodes.transport.channel import Channel
from nodes.transport.complaints import Complaints
from nodes.transport.diagnosis import Unreachable, why_failed
from nodes.transport.lanes import (
    CONNECT_S,
    HANDSHAKE_S,
    Lane,
    Monitor,
    PeerGone,
    PeerSlow,
    check_frames,
    check_plain_text,
    prepare,
)
from nodes.transport.meter import Meter
from relay.errors import BadRequest

CONNECTING, CONNECTED, REFUSED, UNREACHABLE = "connecting", "connected", "refused", "unreachable"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


@dataclass(frozen=True)
class State:
    """`number`: how many connections there have been; `reason`: one line, empty when connected."""

    kind: str
    reason: str = ""
    number: int = 0


class Client:
    """`async with Client(...) as client`, or `connect` and `close`. Not to be shared between event loops.

    What was sent and not acknowledged when a connection is cut may be lost: after each `connected(after=...)` the caller
    says again what must be known."""

    def __init__(
        self,
        address: str,
        lane: Lane,
        me: Credentials,
        server: Peer,
        *,
        allow_plain_text: bool = False,
        meter: Meter | None = None,
    ):
        """`server`: who is expected there; with a secret in `me` it must prove `server.key`. `meter`: one to share with
        the client of another lane to the same peer. BadRequest if the address is none, plain text must not go there,
        or the server's key is missing."""
        if not me.secret:
            check_plain_text(address, allow_plain_text)
        elif not is_key(server.key):
            raise BadRequest(f"{address}: the public key of {server.name} is needed to know it by")
        self.address, self.lane, self.me, self.server = address, lane, me, server
        self.meter = meter or Meter()
        self.complaints = Complaints(f"{me.name}, {lane.name} of {server.name}")
        self.state = State(CONNECTING)
        self._version = version()
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._attempt: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Begin to connect, and keep at it; `connected` waits for it."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        prepare(self._socket, self.address, self.lane)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is queued for a server that is not there
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, int(CONNECT_S * 1000))
        if self.me.secret:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, self.server.key.encode())
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self.me.public.encode())
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, self.me.secret.encode())
        else:
            self._socket.setsockopt(zmq.PLAIN_USERNAME, f"{self.me.role}/{self.me.name}".encode())
            self._socket.setsockopt(zmq.PLAIN_PASSWORD, b"none")  # empty is not possible
        self._channel = Channel(self._socket)
        self._monitor = Monitor(self._socket)
        self._keeper = background(self._keep_up())

    async def close(self) -> None:
        """What was sent and is not out yet has another second."""
        tasks = [task for task in (self._keeper, self._attempt) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._monitor.close()
        self._channel.close()
        await asyncio.to_thread(self._context.term)

    # --- how it stands ---

    async def connected(self, after: int = 0) -> int:
        """Wait until a connection with a number above `after` stands; its number."""
        return (await self.until(CONNECTED, after=after)).number

    async def until(self, *kinds: str, after: int = 0) -> State:
        """Wait for a state of one of these kinds, when connected with a number above `after`."""
        while not (self.state.kind in kinds and (self.state.kind != CONNECTED or self.state.number > after)):
            await self._changed.wait()
        return self.state

    def reconnect(self, reason: str) -> None:
        """Give the connection up and make a new one, for whoever knows better than the kernel that it is dead."""
        if self._attempt is not None and not self._attempt.done():
            self._become(CONNECTING, reason)
            self._attempt.cancel()

    def _become(self, kind: str, reason: str = "") -> None:
        number = self.state.number + (kind == CONNECTED)
        if kind in (REFUSED, UNREACHABLE):
            self.complaints.add(kind, reason)
        self.state = State(kind, reason, number)
        self._changed.set()
        self._changed = asyncio.Event()

    async def _keep_up(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            before = self.state.number
            self._monitor.drain()
            try:
                self._socket.connect(self.address)
            except zmq.ZMQError as error:
                self._become(UNREACHABLE, f"{self.address} cannot be dialled: {error.strerror}")
            else:
                self._attempt = asyncio.create_task(self._one_connection())
                await asyncio.wait({self._attempt})
                if not self._attempt.cancelled():
                    self._attempt.result()
            with contextlib.suppress(zmq.ZMQError):  # a failed handshake has done it already
                self._socket.disconnect(self.address)
            pause = FIRST_PAUSE_S if self.state.number > before else min(2 * pause, LONGEST_PAUSE_S)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            # The old connection is closed when its pipe is read to the end, and that happens in calls like this one.
            self._channel.look()

    async def _one_connection(self) -> None:
        """From dialling to the end, whichever it is."""
        stands = False
        while True:
            events = await self._monitor.wait(None if stands else CONNECT_S + HANDSHAKE_S)
            if not events:
                return self._become(UNREACHABLE, f"{self.address} does not answer")
            for event, _ in events:
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    stands = True
                    self._become(CONNECTED)
                elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                    key = f" {self.me.public}" if self.me.secret else ""
                    who = f"key{key} of {self.me.role} {self.me.name}"
                    return self._become(REFUSED, f"{self.server.name} at {self.address} does not let the {who} in")
                elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                    return await self._explain()
                elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                    if stands:
                        return self._become(CONNECTING, f"the connection to {self.address} was cut")
                    return await self._explain()

    async def _explain(self) -> None:
        try:
            self._become(REFUSED, await why_failed(self.address, bool(self.me.secret), self.server.name))
        except Unreachable as error:
            self._become(UNREACHABLE, str(error))

    # --- messages ---

    async def send(
        self, message: Message, payloads: Sequence[bytes | memoryview] = (), timeout_s: float | None = None
    ) -> None:
        """Hand it to ZeroMQ, once connected; what acknowledges it is a message. Payloads are not copied: leave them as
        they are.

        PeerGone: not connected all the time, and why. PeerSlow: the queue was full all the time (default:
        `meter.timeout_for`). MessageRefused: too long."""
        frames = encode(message, payloads)
        size = check_frames(frames, self.lane)
        limit = self.meter.timeout_for(size) if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit), self._turn:
                while True:
                    await self.connected()
                    if self._channel.put(frames):
                        break
                    await self._channel.until(zmq.POLLOUT)
        except TimeoutError:
            if self.state.kind == CONNECTED:
                raise PeerSlow(f"{self.server.name} at {self.address} took nothing for {limit:.1f} s") from None
            raise PeerGone(self.state.reason or f"no connection to {self.address} in {limit:.1f} s") from None
        self.meter.sent(message, size)

    async def receive(self, timeout_s: float | None = None) -> tuple[Message, list[bytes | memoryview]]:
        """The next message that such a server may send, over however many connections. TimeoutError when the time is
        over; nothing is lost then. Payloads are views of ZeroMQ's own memory: copy what outlives the call, and what shall
        be a tensor."""
        async with asyncio.timeout(timeout_s):
            while True:
                # Messages that are there are taken without waiting: let the others of this event loop have their turn.
                await asyncio.sleep(0)
                if (frames := self._channel.take()) is None:
                    await self._channel.until(zmq.POLLIN)
                elif (received := self._take(frames)) is not None:
                    return received

    def _take(self, frames: list[zmq.Frame]) -> tuple[Message, list[bytes | memoryview]] | None:
        try:
            message, payloads = decode([frame.buffer for frame in frames[: MAX_FRAMES + 1]])
        except ForeignVersion as error:  # it stays so until one side is upgraded, which cuts the connection
            self._become(REFUSED, f"{self.server.name} at {self.address}: {error}")
            return None
        except MessageRefused as error:
            self.complaints.add("malformed", f"dropped a message: {error}")
            return None
        if self.server.role not in message.senders:
            self.complaints.add("role", f"dropped a message: {self.server.role} may not send {name_of(message)}")
            return None
        self.meter.received(message, sum(len(frame) for frame in frames))
        if isinstance(message, Refused) and message.status == 401:
            self.reconnect(message.reason)  # the handshake will say so in its turn, until the key is on the list again
        if isinstance(message, Probe):
            if self.me.role in Probed.senders:
                probed = Probed(sequence=message.sequence, name=self.me.name, version=self._version)
                self._channel.put(encode(probed, payloads))
            return None
        return message, payloads
