"""Two hosts on one machine: network namespaces joined by a rate-limited veth pair, or else two loopback addresses.

    with two_hosts("100mbit") as (a, b):
        server = subprocess.Popen(a.argv(["relay", "gateway", ...]))
        subprocess.run(b.argv(["relay", "submit", "--gateway", f"tcp://{a.address}:5555", ...]))

A namespace has its own interfaces, addresses, routes, ports and loopback, so nothing passes between the two but over the
pair. The rate limit is `tbf` on both ends; delay is not (`netem` is in few kernels): `relay link` does that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PREFIX = "relay-test"  # of the namespaces; then the process id of who made them, and a or b


@dataclass(frozen=True)
class Host:
    """One of the two. `address`: where the other one reaches it. `namespace`: None for a loopback address."""

    address: str
    namespace: str | None = None

    def argv(self, argv: Sequence[str]) -> list[str]:
        """What to start so that `argv` runs on this host. `ip` becomes the command, so signals and process id are its."""
        return ["ip", "netns", "exec", self.namespace, *argv] if self.namespace else list(argv)


@functools.cache
def unavailable() -> str | None:
    """Why two namespaces cannot be had here; None if they can. Tried, not guessed."""
    if missing := [tool for tool in ("ip", "tc") if not shutil.which(tool)]:
        return f"iproute2 is not installed: no {' and no '.join(missing)}"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_hosts() as (a, _):
            _run(*a.argv(["true"]))
    except subprocess.CalledProcessError as error:
        return f"{' '.join(map(str, error.cmd))}: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def two_hosts(rate: str = "100mbit", *, namespaces: bool = True) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other at `rate` (as tc writes it) in each direction; gone afterwards, whatever happens.

    namespaces=False: two loopback addresses, unlimited. What still runs in a namespace at the end is killed. What was
    left by a process that was killed itself is removed by the next call.
    """
    if not namespaces:
        yield Host("127.0.0.1"), Host("127.0.0.2")
        return
    _remove_leftovers()
    a, b = (Host(f"10.203.0.{i}", f"{PREFIX}-{os.getpid()}-{side}") for i, side in ((1, "a"), (2, "b")))
    try:
        for host in (a, b):
            _run("ip", "netns", "add", host.namespace)
        # born inside, so that not even its name is seen in the machine's own namespace
        _run(
            "ip", "-n", a.namespace, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.namespace
        )
        for host in (a, b):
            _run("ip", "-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", host.namespace, "link", "set", device, "up")
            # burst: what may pass at once; at least a timer tick's worth, and a packet of 64 KiB offloaded segments
            limit = ["rate", rate, "burst", "128kb", "latency", "100ms"]
            _run("tc", "-n", host.namespace, "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        yield a, b
    finally:
        for host in (a, b):
            _remove(host.namespace)


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=20).stdout


def _names() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.startswith(PREFIX)]


def _remove(name: str) -> None:
    """Kill what runs in it, by its process ids, then delete it; the pair goes with the first of its ends."""
    if name not in _names():
        return
    ends = time.monotonic() + 5
    while (pids := _run("ip", "netns", "pids", name).split()) and time.monotonic() < ends:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
    _run("ip", "netns", "delete", name)


def _remove_leftovers() -> None:
    for name in _names():
        if not Path("/proc", name.split("-")[-2]).exists():
            _remove(name)
