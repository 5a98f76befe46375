"""How a running link emulator is asked and changed: JSON lines over loopback TCP or a unix socket.

    -> {"do": "status"}
    -> {"do": "set", "change": {"direction": "down", "bandwidth_bit_s": 4e6}}     fields: nodes.link.Change
    -> {"do": "stall"}   {"do": "cut"}   {"do": "restore"}
    <- {"status": {...}}                                                          fields: nodes.link.LinkStatus
    <- {"error": "one line"}

Whoever reaches the socket may change the link, so it is bound to loopback, or is a unix socket of this user.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from nodes.link import Change, Direction, Link, LinkStatus, format_address, parse_address
from nodes.tether import tethered
from relay.errors import BadRequest, RelayError
from scheduler.links import LinkProfile, find_link

LINE = 1 << 16  # bytes of a request or an answer
STATES: dict[str, Any] = {"stall": "stalled", "cut": "cut", "restore": "open"}


class LinkUnreachable(RelayError):
    """No link emulator answers at that address."""


class _Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    do: Literal["status", "set", "stall", "cut", "restore"]
    change: Change = Change()


class _Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    status: LinkStatus | None = None
    error: str | None = None


async def serve(link: Link, address: str) -> tuple[asyncio.Server, str]:
    """Answer at `address`, HOST:PORT of loopback or a path with a slash; the server and where it listens."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):  # the asker is gone, or its line is longer than LINE
            while line := await reader.readline():
                said = await _handle(link, line)
                writer.write(msgspec.json.encode(said) + b"\n")
                await writer.drain()
        writer.close()

    try:
        if "/" in address:
            server = await asyncio.start_unix_server(answer, address, limit=LINE)
            Path(address).chmod(0o600)
            return server, address
        host, port = parse_address(address)
        if not _is_loopback(host):
            raise BadRequest(f"the control socket listens on loopback only, not on {host}: it asks nobody for a key")
        server = await asyncio.start_server(answer, host, port, limit=LINE)
        return server, format_address(server.sockets[0].getsockname()[:2])
    except OSError as error:
        raise BadRequest(f"cannot listen on {address}: {error.strerror}") from None


async def _handle(link: Link, line: bytes) -> _Answer:
    try:
        request = msgspec.json.decode(line, type=_Request)
        if request.do == "set":
            link.change(request.change)
        elif request.do != "status":
            await link.set_state(STATES[request.do])
    except (msgspec.DecodeError, UnicodeDecodeError, RelayError) as error:
        return _Answer(error=str(error))
    return _Answer(status=link.status())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class LinkControl:
    """A client of one link emulator. Every call returns its status afterwards; LinkUnreachable, BadRequest if refused."""

    def __init__(self, address: str, timeout_s: float = 5.0):
        self.address = address
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None

    def status(self) -> LinkStatus:
        return self._ask(_Request(do="status"))

    def set(
        self,
        profile: str | Path | Mapping[str, Any] | LinkProfile | None = None,
        *,
        direction: Direction = "both",
        bandwidth_bit_s: float | None = None,
        delay_s: float | None = None,
        jitter_s: float | None = None,
    ) -> LinkStatus:
        """Another profile (anything `find_link` takes), or single figures, from now on."""
        change = Change(
            direction=direction,
            profile=find_link(profile) if profile is not None else None,
            bandwidth_bit_s=bandwidth_bit_s,
            delay_s=delay_s,
            jitter_s=jitter_s,
        )
        return self._ask(_Request(do="set", change=change))

    def stall(self) -> LinkStatus:
        """Nothing moves, connections stay, until `restore`."""
        return self._ask(_Request(do="stall"))

    def cut(self) -> LinkStatus:
        """Connections are reset and new ones refused, until `restore`."""
        return self._ask(_Request(do="cut"))

    def restore(self) -> LinkStatus:
        return self._ask(_Request(do="restore"))

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> LinkControl:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, request: _Request) -> LinkStatus:
        try:
            if self._sock is None:
                self._sock = self._connect()
            self._sock.sendall(msgspec.json.encode(request) + b"\n")
            line = b""
            while not line.endswith(b"\n"):
                got = self._sock.recv(LINE)
                if not got:
                    raise ConnectionResetError("it closed the connection")
                line += got
            answer = msgspec.json.decode(line, type=_Answer)
        except (OSError, msgspec.DecodeError) as error:
            self.close()
            raise LinkUnreachable(f"no link answers at {self.address}: {error}") from None
        if answer.status is None:
            raise BadRequest(f"link at {self.address}: {answer.error}")
        return answer.status

    def _connect(self) -> socket.socket:
        if "/" not in self.address:
            return socket.create_connection(parse_address(self.address), self._timeout_s)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(self._timeout_s)
        sock.connect(self.address)
        return sock


class LinkProcess:
    """`relay link` in a process of its own, which dies with this one; a context manager.

    to: the addresses that it passes on to. `addresses`: where it listens for each, on loopback.
    """

    def __init__(
        self,
        to: Sequence[str],
        profile: str | Path | Mapping[str, Any] | LinkProfile,
        profile_up: str | Path | Mapping[str, Any] | LinkProfile | None = None,
        *,
        seed: int | None = None,
    ):
        down, up = find_link(profile), find_link(profile_up) if profile_up is not None else None
        argv = [sys.executable, "-m", "nodes.cli", "link", "--profile", "loopback"]
        for address in to:
            argv += ["--listen", "127.0.0.1:0", "--to", address]
        if seed is not None:
            argv += ["--seed", str(seed)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(tethered(argv), stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("control "):
                self.control = LinkControl(line.split()[1])
                break
        else:
            raise RelayError(f"the link emulator ended with {self._process.wait()} before it listened")
        self.control.set(down)
        self.addresses = [listen for listen, _ in self.control.set(up or down, direction="up").routes]

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self.control.close()
        self._process.terminate()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> LinkProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
