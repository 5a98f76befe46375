"""The link emulator: a TCP proxy that makes a real socket as slow as a link profile says.

A link has routes, each a port that it listens on and an address that it passes on to: all routes and all their
connections share its two lines (`nodes.link_line`), as a device's control and data connections share its wifi. `up`
is the direction from whoever dials to the target, `down` the one back.

While it runs it can be changed (`nodes.link_control`): another profile or single figures; `stall`, nothing moves and
connections stay; `cut`, connections are reset, what was under way is lost and new ones are refused; `restore`.

Not emulated: the handshake (a connection is accepted at once, without a round trip), loss (TCP would show it as delay),
and slow start. A dial that the target refuses is reset after it was accepted.

Time: asyncio's epoll sleeps in whole milliseconds, `select` in microseconds, so `run_link` takes `select`, and with it
`MOST` connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import signal
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from nodes.link_line import End, Line, LineStatus, Pipe
from nodes.wake import wake_in_time
from relay.errors import BadRequest
from scheduler.links import LinkProfile

MOST = 300  # connections; select() ends at 1024 file descriptors, and a connection has two
DIAL_S = 10.0

State = Literal["open", "stalled", "cut"]
Direction = Literal["both", "up", "down"]


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What `status` answers."""

    state: State
    routes: tuple[tuple[str, str], ...]  # listens on, passes on to
    connections: int
    opened: int  # since the start
    refused: int  # accepted, but the target could not be reached or there were too many
    cpu_s: float  # of this process
    up: LineStatus
    down: LineStatus


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Other figures for a direction; what is not said stays. Single figures replace those of `profile`."""

    direction: Direction = "both"
    profile: LinkProfile | None = None
    bandwidth_bit_s: float | None = None
    delay_s: float | None = None
    jitter_s: float | None = None

    def of(self, profile: LinkProfile) -> LinkProfile:
        """The profile to follow `profile`. BadRequest if the figures make no link."""
        profile = self.profile or profile
        figures = {key: getattr(self, key) for key in ("bandwidth_bit_s", "delay_s", "jitter_s")}
        figures = {key: value for key, value in figures.items() if value is not None}
        if not figures:
            return profile
        # it is not the link of that name any more, and figures say so
        name = profile.name if profile.name.endswith(", changed") else f"{profile.name}, changed"
        return msgspec.structs.replace(profile, name=name, **figures)


class Link:
    """Routes that share two lines. Lives in an asyncio loop; every address is HOST:PORT, port 0 lets the system choose."""

    def __init__(
        self,
        routes: Sequence[tuple[str, str]],
        down: LinkProfile,
        up: LinkProfile | None = None,
        seed: int | None = None,
    ):
        rng_up, rng_down = np.random.default_rng(seed).spawn(2)
        self.up, self.down = Line(up or down, rng_up), Line(down, rng_down)
        self.state: State = "open"
        self.scratch = bytearray(256 << 10)  # a read is copied out of it before anyone else reads
        self.ends: set[SocketEnd] = set()
        self._routes = [_Route(self, parse_address(listen), parse_address(to)) for listen, to in routes]
        self._moving = asyncio.Event()
        self._dials: set[asyncio.Task[None]] = set()
        self._opened = self._refused = 0

    async def start(self) -> None:
        """Listen. BadRequest if an address is taken or not this machine's."""
        for route in self._routes:
            await route.listen()
        self._moving.set()

    async def set_state(self, state: State) -> None:
        """Cut, stall or restore; a link that is in that state stays as it is."""
        before, self.state = self.state, state
        if state == before:
            return
        now = asyncio.get_running_loop().time()
        if before == "cut":
            for route in self._routes:
                await route.listen()
        if before == "stalled":
            self._moving.set()
            for line in (self.up, self.down):
                line.resume(now)
        if state == "stalled":
            self._moving.clear()
            for line in (self.up, self.down):
                line.stall(now)
        if state == "cut":
            for route in self._routes:
                route.refuse()
            self._reset_all()
            await asyncio.sleep(0)  # asyncio closes them in the next round; the answer shall hold already

    def change(self, change: Change) -> None:
        """Set other figures. BadRequest, and nothing changed, if they make no link."""
        lines = {"both": (self.up, self.down), "up": (self.up,), "down": (self.down,)}[change.direction]
        now = asyncio.get_running_loop().time()
        for line, profile in [(line, change.of(line.profile)) for line in lines]:
            line.change(profile, now)

    def status(self) -> LinkStatus:
        return LinkStatus(
            state=self.state,
            routes=tuple((route.address, format_address(route.to)) for route in self._routes),
            connections=len(self.up.pipes),
            opened=self._opened,
            refused=self._refused,
            cpu_s=time.process_time(),
            up=self.up.status(),
            down=self.down.status(),
        )

    def close(self) -> None:
        """Reset every connection and listen no more."""
        for route in self._routes:
            route.close()
        self._reset_all()

    def accept(self, near: SocketEnd, to: tuple[str, int]) -> None:
        """`near` was dialled: dial `to` for it."""
        if self.state == "cut" or len(self.up.pipes) + len(self._dials) >= MOST:
            self._refused += self.state != "cut"
            near.reset()
            return
        task = asyncio.get_running_loop().create_task(self._join(near, to))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _join(self, near: SocketEnd, to: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        await self._moving.wait()
        try:
            async with asyncio.timeout(DIAL_S):
                _, far = await loop.create_connection(lambda: SocketEnd(self), *to)
        except (OSError, TimeoutError):
            self._refused += 1
            near.reset()
            return
        if near.lost or self.state == "cut":
            near.reset()
            far.reset()
            return
        self._opened += 1
        near.join(far, self.up)
        far.join(near, self.down)

    def _reset_all(self) -> None:
        for task in self._dials:
            task.cancel()
        for end in list(self.ends):
            end.reset()


class SocketEnd(asyncio.BufferedProtocol):
    """One of the two sockets of a connection: what it reads goes into its pipe, what the other's pipe holds comes out."""

    transport: asyncio.Transport

    def __init__(self, link: Link, made: Callable[[SocketEnd], None] | None = None):
        self.lost = self._ended = self._closing = False
        self._link, self._made = link, made
        self._out: Pipe | None = None
        self._peer: SocketEnd | None = None

    def join(self, peer: SocketEnd, line: Line) -> None:
        """Pass on to `peer` from now on."""
        self._peer = peer
        self._out = Pipe(line, self.transport, peer.transport, peer.source_ended)
        self._out.pump()

    def source_ended(self, how: End) -> None:
        """The end of the peer's stream, or its death, has arrived here."""
        if how == "reset":
            self.reset()
            return
        self._ended = True
        if self.transport.is_closing():
            return
        try:
            self.transport.write_eof()
        except OSError:  # whoever is behind this socket is gone, and nothing was read that would have said so
            self.transport.abort()
            return
        if self._peer is not None and self._peer._ended:
            for end in (self, self._peer):  # both ways have ended: close() still sends what the socket has not taken
                end._closing = True
                end.transport.close()

    def reset(self) -> None:
        """Close with RST, as a host does that knows the connection no more."""
        sock = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.pause_reading()
        self._link.ends.add(self)
        if self._made is not None:
            self._made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._link.scratch)[: self._out.room if self._out else 1]

    def buffer_updated(self, nbytes: int) -> None:
        if self._out is not None:
            self._out.put(bytes(memoryview(self._link.scratch)[:nbytes]))

    def eof_received(self) -> bool:
        if self._out is not None:
            self._out.put("eof")
        return True  # stay open: the other direction may go on

    def pause_writing(self) -> None:
        if self._peer is not None and self._peer._out is not None:
            self._peer._out.writable(False)

    def resume_writing(self) -> None:
        if self._peer is not None and self._peer._out is not None:
            self._peer._out.writable(True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._link.ends.discard(self)
        if self._peer is not None and self._peer._out is not None:
            self._peer._out.discard()  # nobody is left to give it to
        if self._out is not None and not self._closing:
            self._out.put("reset")


class _Route:
    """One port of a link. While the link is cut the port is bound, so that nobody else takes it, but not listened on."""

    def __init__(self, link: Link, listen: tuple[str, int], to: tuple[str, int]):
        self.to = to
        self._link = link
        self._sock: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._address = listen

    @property
    def address(self) -> str:
        return format_address(self._address)

    async def listen(self) -> None:
        try:
            sock = self._bind()
            self._server = await asyncio.get_running_loop().create_server(self._protocol, sock=sock)
        except OSError as error:
            raise BadRequest(f"cannot listen on {self.address}: {error.strerror}") from None

    def refuse(self) -> None:
        self.close()
        self._bind()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._sock is not None:
            self._sock.close()
        self._server = self._sock = None

    def _bind(self) -> socket.socket:
        if self._sock is None:
            family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
            self._sock = socket.socket(family)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sock.bind(self._address)
            self._address = (self._address[0], self._sock.getsockname()[1])
        return self._sock

    def _protocol(self) -> SocketEnd:
        return SocketEnd(self._link, lambda end: self._link.accept(end, self.to))


def parse_address(text: str) -> tuple[str, int]:
    """ "HOST:PORT", "[::1]:PORT" or the same after tcp:// to (host, port); BadRequest otherwise."""
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise BadRequest(f"{text!r} is not HOST:PORT, e.g. 127.0.0.1:5555")
    return host, int(port)


def format_address(address: tuple[str, int]) -> str:
    """The inverse of `parse_address`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def run_link(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main`, which ends when the event that it is given is set: by SIGTERM or Ctrl-C."""
    wake_in_time()

    async def body() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await main(stop)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(body())
