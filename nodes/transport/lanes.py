"""Control and data lanes: the socket options of each, addresses, plain text, and a socket's monitor.

Control and data have sockets, connections and ZeroMQ contexts (an I/O thread each) of their own: encrypting and sending
50 MB takes nothing from a heartbeat.

Only control sockets have ZeroMQ's own heartbeats. On a data socket they would cut what they should guard: the answer to a
ping waits behind the payload under way, so a transfer that takes longer than the time-out is cut, again and again. There
the kernel watches: keepalive when idle, TCP_USER_TIMEOUT when sent bytes are not acknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import struct
from collections.abc import Awaitable
from dataclasses import dataclass

import zmq

from nodes.messages import MAX_PAYLOAD, MessageRefused, size_of
from nodes.transport.channel import Channel
from relay.errors import BadRequest, RelayError

log = logging.getLogger("relay.transport")

_EVENT = struct.Struct("=Hi")  # of a monitor: event, value; in this machine's byte order
HANDSHAKE_S = 10.0  # a connection that is not through its handshake by then is dropped
CONNECT_S = 5.0
LINGER_S = 1.0  # what is still to be sent when a socket closes has this long
DEAD_S = 60.0  # sent bytes that the peer's kernel does not acknowledge for so long end the connection
CURVE_OVERHEAD = 64  # bytes that encryption adds to a frame, and room


@dataclass(frozen=True)
class Lane:
    """`max_frame`: bytes, longer ones cut the connection before they are read. `high_water`: messages queued per peer
    and direction. `heartbeat_s`: between pings, silence of five of them cuts; None: the kernel watches."""

    name: str
    max_frame: int
    high_water: int
    heartbeat_s: float | None


CONTROL = Lane("control", 1 << 20, 256, 2.0)
DATA = Lane("data", MAX_PAYLOAD, 8, None)


class SendFailed(RelayError):
    """A message that did not get on its way, and why."""


class PeerGone(SendFailed):
    """There is no connection to the peer (any more)."""


class PeerSlow(SendFailed):
    """The peer took nothing off its full queue within the time-out."""


def prepare(socket: zmq.Socket[bytes], address: str, lane: Lane) -> None:
    """Options of every socket here, whichever side it is. ZeroMQ's defaults are without bounds; these have them."""
    socket.setsockopt(zmq.SNDHWM, lane.high_water)
    socket.setsockopt(zmq.RCVHWM, lane.high_water)
    socket.setsockopt(zmq.MAXMSGSIZE, lane.max_frame + CURVE_OVERHEAD)
    socket.setsockopt(zmq.LINGER, int(LINGER_S * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, int(HANDSHAKE_S * 1000))
    socket.setsockopt(zmq.BACKLOG, 128)
    if lane.heartbeat_s is not None:
        socket.setsockopt(zmq.HEARTBEAT_IVL, int(lane.heartbeat_s * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(lane.heartbeat_s * 5000))
        socket.setsockopt(zmq.HEARTBEAT_TTL, int(lane.heartbeat_s * 5000))
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 15)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 4)
    socket.setsockopt(zmq.TCP_MAXRT, int(DEAD_S * 1000))
    if ":" in split_address(address)[1]:
        socket.setsockopt(zmq.IPV6, 1)


def check_frames(frames: list[bytes | memoryview], lane: Lane) -> int:
    """Bytes in all. MessageRefused if one is longer than the lane carries: the other side would cut the connection."""
    sizes = [size_of(frame) for frame in frames]
    if max(sizes) > lane.max_frame:
        raise MessageRefused(f"{max(sizes)} bytes are over the {lane.name} lane's limit of {lane.max_frame}")
    return sum(sizes)


def split_address(address: str) -> tuple[str, str, str]:
    """(tcp or ipc, host or path, port or empty). BadRequest if it is no address."""
    if found := re.fullmatch(r"ipc://(.+)", address):
        return "ipc", found[1], ""
    found = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.%\w]+\]|[^:/\s]+):(\d{1,5}|\*)", address)
    if found and (found[2] == "*" or int(found[2]) < 65536):
        return "tcp", found[1].strip("[]"), found[2]
    raise BadRequest(f"{address!r} is no address: tcp://HOST:PORT or ipc://PATH")


def is_loopback(address: str) -> bool:
    """Whether nobody outside this machine can be, or reach, what is there."""
    kind, host, _ = split_address(address)
    if kind == "ipc" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, an interface or *
        return False


def check_plain_text(address: str, allowed: bool) -> None:
    """BadRequest where plain text would leave this machine and nobody said that it may."""
    if not allowed and not is_loopback(address):
        raise BadRequest(
            f"{address} is not on loopback, and there it takes keys (relay keygen): in plain text anybody could read "
            "and say anything; allow_plain_text: true if you mean that"
        )


async def sent(sending: Awaitable[None], level: int = logging.INFO) -> bool:
    """Whether a `send` put its message on its way; why not is logged. For what is said again or not missed."""
    try:
        await sending
    except SendFailed as error:
        log.log(level, "%s", error)
        return False
    return True


class Monitor:
    """What happens to a socket's connections: (event, value). The value is the connection's file descriptor, or the
    code of a failure."""

    EVENTS = (
        zmq.EVENT_ACCEPTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
    )  # fmt: skip

    def __init__(self, socket: zmq.Socket[bytes]):
        self._socket = socket
        self._channel = Channel(socket.get_monitor_socket(self.EVENTS))

    def drain(self) -> list[tuple[int, int]]:
        """All that has happened since the last look; never waits."""
        events = []
        while (frames := self._channel.take()) is not None:
            events.append(_EVENT.unpack(frames[0].bytes))
        return events

    async def wait(self, timeout_s: float | None = None) -> list[tuple[int, int]]:
        """As `drain`, but waits for something; empty when the time is over."""
        if not (events := self.drain()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._channel.until(zmq.POLLIN)
            events = self.drain()
        return events

    def close(self) -> None:
        self._socket.disable_monitor()
        self._channel.close(0)
