"""Which fault comes when, from a seed; and what each does to a deployment that runs.

The deck holds every kind; it is shuffled, dealt to the end and shuffled again, so that a run of any length has seen all.
One fault at a time: it is mended before the next one comes. What died comes back by itself while that goes on.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from experiments.faults.clock import Clocks
from experiments.faults.disk import SmallDisk
from experiments.faults.strangers import GOOD, NOT_REACHED, Strangers

# A kind that stands twice comes twice as often.
DECK = (
    "kill", "kill", "stop", "kill gateway", "stop gateway", "cut", "stall", "slow", "clock", "full disk",
    "wrong fingerprint", "unknown key", "another version", "corrupted frames", "never reads",
)  # fmt: skip
HOLD_S = (0.5, 3.0)
JUMP_S = (60.0, 36_000.0)  # to either side
AWAY_S = 60.0  # a gateway that is not back by then will not come back


@dataclass(frozen=True)
class Fault:
    """`after`: seconds after the one before was mended. `node`, `clock`: whom it concerns, if it concerns one."""

    after: float
    kind: str
    node: str
    clock: str
    hold: float
    jump: float
    seed: int


def schedule(seed: int, every: float, nodes: tuple[str, ...], clocks: tuple[str, ...]) -> Iterator[Fault]:
    """Without end; the same for the same arguments, whatever the machine can do."""
    rng = random.Random(seed)
    for clock in cycle(clocks):  # one a round, so that all of them jump
        for kind in rng.sample(DECK, len(DECK)):
            jump = rng.choice((-1, 1)) * rng.uniform(*JUMP_S)
            yield Fault(
                rng.expovariate(1 / every), kind, rng.choice(nodes), clock, rng.uniform(*HOLD_S), jump,
                rng.randrange(1 << 30),
            )  # fmt: skip


@dataclass
class Ground:
    """What faults act upon. `outages`: from when to when the gateway could end nothing, by time.monotonic()."""

    running: Any  # nodes.fleet.Fleet
    nodes: tuple[str, ...]
    impostor: str
    link: str
    clocks: Clocks
    disk: SmallDisk
    strangers: Strangers
    left_out: dict[str, str]
    done: Counter[str] = field(default_factory=Counter)
    strangers_ended: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)  # whom it was meant for was just being started again
    outages: list[tuple[float, float]] = field(default_factory=list)
    gateway_bytes: list[int] = field(default_factory=list)  # resident, before each fault

    def away(self, since: float, until: float) -> float:
        """Seconds of outage within an interval."""
        return sum(max(0.0, min(until, b) - max(since, a)) for a, b in self.outages)


async def play(ground: Ground, asker: Any, faults: Iterator[Fault], over: asyncio.Event) -> None:
    """One fault after the other until it is over."""
    for fault in faults:
        with suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), fault.after)
            return
        if fault.kind in ground.left_out:
            continue
        ground.gateway_bytes.append(resident(ground.running))
        ground.done[fault.kind] += 1
        try:
            await _act(ground, asker, fault)
        except (OSError, AssertionError):
            ground.missed[fault.kind] += 1


async def _act(ground: Ground, asker: Any, fault: Fault) -> None:
    running, rng = ground.running, random.Random(fault.seed)
    match fault.kind:
        case "kill":
            running.kill(fault.node)
        case "wrong fingerprint":  # it comes back, and registers
            running.kill(ground.impostor)
        case "kill gateway":
            async with _outage(ground):
                running.kill("gateway")
                await _answers(asker)
        case "stop":
            await _stop(running.pid(fault.node), fault.hold)
        case "stop gateway":
            async with _outage(ground):
                await _stop(running.pid("gateway"), fault.hold)
        case "cut" | "stall" | "slow":
            await _link(ground.link, fault)
        case "clock":
            ground.clocks.jump(fault.clock, fault.jump)
        case "full disk":
            async with _outage(ground):
                await asyncio.to_thread(ground.disk.fill, running.pid("gateway"))
                try:
                    told, _ = await asyncio.gather(
                        _reached(ground.strangers.at_a_full_disk, rng), asyncio.sleep(fault.hold)
                    )
                    ground.strangers_ended[f"full disk: {told}"] += 1
                finally:
                    await asyncio.to_thread(ground.disk.empty)
        case stranger:
            deed = {
                "unknown key": ground.strangers.unknown_key, "another version": ground.strangers.another_version,
                "corrupted frames": ground.strangers.corrupted, "never reads": ground.strangers.never_reads,
            }[stranger]  # fmt: skip
            ground.strangers_ended[f"{stranger}: {await _reached(deed, rng)}"] += 1


async def _reached(deed: Callable[[random.Random], Awaitable[str]], rng: random.Random) -> str:
    """What became of a stranger, who dials again while what it dialled is just being started."""
    ends = time.monotonic() + AWAY_S
    while (told := await deed(rng)) == NOT_REACHED and time.monotonic() < ends:
        await asyncio.sleep(0.2)
    return told


@asynccontextmanager
async def _outage(ground: Ground) -> AsyncIterator[None]:
    since, number = time.monotonic(), len(ground.outages)
    ground.outages.append((since, float("inf")))
    try:
        yield
    finally:
        ground.outages[number] = since, time.monotonic()


async def watch(ground: Ground, asker: Any) -> None:
    """Note the outages that no fault of ours made: a gateway that died by itself."""
    known = ground.running.up.status()["gateway"].pid
    while True:
        await asyncio.sleep(0.05)
        pid = ground.running.up.status()["gateway"].pid
        ours = any(until == float("inf") for _, until in ground.outages[-2:])
        if pid != known and not ours:
            async with _outage(ground):
                await _answers(asker)
                pid = ground.running.up.status()["gateway"].pid
        known = pid


async def _answers(asker: Any) -> None:
    """Until a gateway answers."""
    from relay.errors import RelayError

    ends = time.monotonic() + AWAY_S
    while time.monotonic() < ends:
        with suppress(TimeoutError, RelayError):
            await asyncio.wait_for(asker.status(), 1.0)
            return
        await asyncio.sleep(0.1)


async def _stop(pid: int, hold: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(hold)
    finally:
        os.kill(pid, signal.SIGCONT)


async def _link(control: str, fault: Fault) -> None:
    from nodes.link_control import LinkControl

    with LinkControl(control) as link:
        try:
            if fault.kind == "slow":
                await asyncio.to_thread(link.set, "dsl")
            else:
                await asyncio.to_thread(getattr(link, fault.kind))
            await asyncio.sleep(fault.hold)
        finally:
            await asyncio.to_thread(link.restore)
            await asyncio.to_thread(link.set, "wifi")


def resident(running: Any) -> int:
    """Bytes of the gateway's memory; 0 while it is being started."""
    try:
        pages = Path(f"/proc/{running.pid('gateway')}/statm").read_text().split()[1]
    except (OSError, AssertionError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def let_in(ground: Ground) -> list[str]:
    """Strangers of whom something else became than should have."""
    return [said for said in ground.strangers_ended if said.split(": ", 1)[1] not in GOOD]
