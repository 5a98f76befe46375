"""Peers that a deployment must stand: a key on no list, another version, corrupted frames, somebody who never reads.

Each says what became of it: `REFUSED`, `LET_IN` or `NOT_REACHED` (what it dialled is just being started
again); those that are let in and must be stood say `STOOD`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.keys import Credentials, Peer

if TYPE_CHECKING:
    import zmq.asyncio

REFUSED, LET_IN, NOT_REACHED, STOOD = "refused", "let in", "not reached", "stood"
FULL, ROOM = "told 507", "found room"
GOOD = (REFUSED, NOT_REACHED, STOOD, FULL, ROOM)
WAIT_S = 3.0
KEPT = 6  # of those who never read stay connected at a time


@dataclass
class Strangers:
    """`nobody`: a key on no list. `visitor`: a device's, `mute`: a client's; both are on it. Addresses of real sockets."""

    gateway: Peer
    control: str
    data: str
    edges: dict[str, Peer]  # data address -> who listens
    http: str  # HOST:PORT
    nobody: Credentials
    visitor: Credentials
    mute: Credentials
    _mutes: list[Any] = field(default_factory=list)

    async def unknown_key(self, rng: random.Random) -> str:
        """Knocks at the gateway or at an edge."""
        from nodes.transport import CONNECTED, CONTROL, DATA, REFUSED as KEPT_OUT, Client  # noqa: I001

        doors = [(self.control, CONTROL, self.gateway), (self.data, DATA, self.gateway)]
        doors += [(address, DATA, peer) for address, peer in self.edges.items()]
        address, lane, server = rng.choice(doors)
        async with Client(address, lane, self.nobody, server) as client:
            try:
                state = await asyncio.wait_for(client.until(KEPT_OUT, CONNECTED), WAIT_S)
            except TimeoutError:
                return NOT_REACHED
        return LET_IN if state.kind == CONNECTED else REFUSED

    async def another_version(self, rng: random.Random) -> str:
        """Registers as a node that speaks the next major version; the key is good."""
        from nodes.messages import MAGIC, MAJOR, MINOR, Refused, Register, Registered, decode, encode
        from nodes.messages.wire import HEAD

        said = Register(name=self.visitor.name, session=f"{rng.random()}", holdings=(), batch=1, queue=1)
        frames = [HEAD.pack(MAGIC, MAJOR + 1, MINOR), *encode(said)[1:]]
        with _Dealer(self.control, self.visitor, self.gateway) as dealer:
            try:
                async with asyncio.timeout(WAIT_S):
                    await dealer.send_multipart(frames)
                    message, _ = decode(await dealer.recv_multipart())
            except TimeoutError:
                return NOT_REACHED
        if isinstance(message, Refused) and message.status == 505:
            return REFUSED
        return LET_IN if isinstance(message, Registered) else f"answered {message}"

    async def corrupted(self, rng: random.Random) -> str:
        """Bytes that are none of ours on a bare connection, and messages with a few bytes changed, cut off or doubled."""
        places = [(self.control, self.gateway), (self.data, self.gateway), *self.edges.items()]
        for address, server in places:
            with contextlib.suppress(OSError):
                host, _, port = address.removeprefix("tcp://").rpartition(":")
                with socket.create_connection((host, int(port)), timeout=1) as raw:
                    raw.sendall(rng.randbytes(4096))
            with _Dealer(address, self.visitor, server) as dealer, contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WAIT_S):
                    for frames in corruptions(rng, 20):
                        await dealer.send_multipart(frames)
        return STOOD

    async def at_a_full_disk(self, rng: random.Random) -> str:
        """Asks until it is told that the disk is full; what was accepted before, in pages that were left, must end too."""
        from nodes.messages import Accepted, Refused, Submit, decode, encode

        with _Dealer(self.control, self.visitor, self.gateway) as dealer:
            for ref in range(1, 21):
                request = {"prompt": "a red circle " * 150, "seed": rng.randrange(1 << 20)}
                try:
                    async with asyncio.timeout(WAIT_S):
                        await dealer.send_multipart(encode(Submit(request=request, ref=ref)))
                        message, _ = decode(await dealer.recv_multipart())
                except TimeoutError:
                    return NOT_REACHED
                if isinstance(message, Refused):
                    return FULL if message.status == 507 else f"answered {message.status}"
                if not isinstance(message, Accepted):
                    return f"answered {message}"
        return ROOM

    async def never_reads(self, rng: random.Random) -> str:
        """Asks and asks, over ZeroMQ and over HTTP, takes no answer, and stays."""
        from nodes.messages import Ask, Submit, encode

        dealer = _Dealer(self.control, self.mute, self.gateway, queue=1)
        self._mutes.append(dealer)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WAIT_S):
                for ref in range(400):
                    await dealer.send_multipart(encode(Ask(what="status", ref=ref)))
                for ref in range(3):
                    request = {"prompt": "a red circle", "seed": rng.randrange(1 << 20)}
                    await dealer.send_multipart(encode(Submit(request=request, ref=1000 + ref)))
        self._mutes.append(await asyncio.to_thread(_mute_over_http, self.http, rng.randrange(1 << 20)))
        while len(self._mutes) > 2 * KEPT:
            _close(self._mutes.pop(0))
        return STOOD

    def leave(self) -> None:
        while self._mutes:
            _close(self._mutes.pop())


def corruptions(rng: random.Random, count: int) -> list[list[bytes]]:
    """Messages that a device may send, each with something wrong in its frames."""
    from nodes.messages import Fetch, Heartbeat, Latent, Register, Result, Submit, encode

    job = "job_0123456789"
    good: Sequence[tuple[Any, list[bytes | memoryview]]] = [
        (Register(name="visitor", session="s", holdings=(), batch=1, queue=1), []),
        (Heartbeat(sequence=1, doing="", running=0, queued=0, steps_done=0, idle_s=0.0), []),
        (Submit(request={"prompt": "a red circle", "steps": 4}, ref=1), []),
        (Fetch(job=job, attempt=1, leg=1), []),
        (Latent(job=job, attempt=1, leg=1), [rng.randbytes(2048)]),
        (Result(job=job, attempt=1, width=64, height=64, report={"program": "x"}), [rng.randbytes(2048)]),
    ]
    made = []
    for _ in range(count):
        frames = [bytes(frame) for frame in encode(*rng.choice(good))]
        at = rng.randrange(len(frames))
        match rng.randrange(4):
            case 0:
                frames[at] = frames[at][: rng.randrange(len(frames[at]))]
            case 1:
                frames.insert(at, frames[at])
            case 2:
                frames = frames[:at]
            case _:
                changed = bytearray(frames[at])
                for _ in range(3):
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                frames[at] = bytes(changed)
        made.append(frames or [b""])
    return made


class _Dealer:
    """A bare socket with a key, for what `nodes.transport.Client` would never send."""

    def __init__(self, address: str, me: Credentials, server: Peer, queue: int = 1000):
        import zmq
        import zmq.asyncio

        self._context = zmq.asyncio.Context()
        self.socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.CURVE_SERVERKEY, server.key.encode()), (zmq.CURVE_PUBLICKEY, me.public.encode()),
            (zmq.CURVE_SECRETKEY, me.secret.encode()), (zmq.RCVHWM, queue), (zmq.LINGER, 0), (zmq.IMMEDIATE, 1),
        ):  # fmt: skip
            self.socket.setsockopt(option, value)
        self.socket.connect(address)
        self.send_multipart, self.recv_multipart = self.socket.send_multipart, self.socket.recv_multipart

    def close(self) -> None:
        self.socket.close(0)
        self._context.term()

    def __enter__(self) -> _Dealer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _mute_over_http(address: str, seed: int) -> socket.socket | None:
    """A stream that is asked for and never read, with the smallest buffer that a socket has."""
    host, _, port = address.rpartition(":")
    body = json.dumps({"prompt": "a red circle", "n": 4, "stream": True, "partial_images": 2, "seed": seed}).encode()
    mute = socket.socket()
    mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    mute.settimeout(2.0)
    try:
        mute.connect((host, int(port)))
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        mute.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    except OSError:
        mute.close()
        return None
    return mute


def _close(mute: Any) -> None:
    if mute is not None:
        with contextlib.suppress(OSError):
            mute.close()


def with_keys(folder: Path, nodes: dict[str, str]) -> None:
    """Keys for the gateway, each node (name -> role), the asker and the strangers in `folder`; `nobody`'s beside it."""
    from nodes.keys import write_keys

    for name, role in {
        **nodes,
        "gateway": "gateway",
        "client": "client",
        "visitor": "device",
        "mute": "client",
    }.items():
        write_keys(name, role, folder)
    write_keys("nobody", "device", folder.with_name("elsewhere"))


def strangers_of(running: Any, folder: Path) -> Strangers:
    """For a fleet that runs with the keys of `with_keys`."""
    from nodes.keys import load_public, load_secret

    gateway, nodes = running.gateway, running.deployment.nodes
    assert gateway.http is not None
    return Strangers(
        gateway=load_public(folder / "gateway.pub"), control=gateway.control, data=gateway.data, http=gateway.http,
        edges={node.data: load_public(folder / f"{name}.pub") for name, node in nodes.items() if node.data},
        nobody=load_secret(folder.with_name("elsewhere") / "nobody.key"),
        visitor=load_secret(folder / "visitor.key"), mute=load_secret(folder / "mute.key"),
    )  # fmt: skip
