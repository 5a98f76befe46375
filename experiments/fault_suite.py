"""Does every accepted request end, whatever dies? Requests under a seeded schedule of faults, with real processes.

    start a gateway, two edges, two devices, one of them behind an emulated link, and an impostor, all with keys
    keep a window of requests open; each carries an idempotency key, so that asking again is safe
    meanwhile, now and then, a fault of `experiments.faults.deck`; what died comes back
    at the end: every accepted job has ended once, before its deadline, with the right picture or an error that says why

An end is late where the gateway's report says that it came later than the deadline, and told late where the asker heard of
it later. The time for which the gateway was killed, stopped or had a full disk, when nothing can be ended, is taken off,
and a grace for a machine that starts processes meanwhile; how late the latest was is said beside it.
Work done twice is counted from the ledger and so at least what it says: a killed gateway forgets what it had not written.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from experiments.faults.outcome import (
    DEADLINE_S,
    GRACE_S,
    SHORT_DEADLINE_S,
    STEPS,
    TOLD_S,
    Asked,
    Outcome,
    compare,
    count,
    deaths,
    table,
    timed,
)

HANGING_S = 60.0  # past deadline, outages and grace an asker waits no longer
LOST_S = 4.0  # then a question is taken for lost and asked again
PACE = 8.0  # of those whose clock is right: steps of some 30 ms, so that faults find them at work
ENDED = ("done", "failed", "cancelled")


def main(
    requests: Annotated[int, typer.Option(help="How many.")] = 10_000,
    every: Annotated[float, typer.Option(metavar="S", help="Mean seconds between two faults.")] = 5.0,
    window: Annotated[int, typer.Option(help="Requests open at a time.")] = 32,
    rate: Annotated[float, typer.Option(help="Requests a second, at most.")] = 6.0,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/faults.md"
    ),
) -> None:
    """Run the suite at full length and write what came of it."""
    import logging

    from experiments.provenance import write_result

    logging.getLogger("relay").setLevel(logging.ERROR)  # the asker's own complaints about a gateway that is killed
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder), requests, every, window, rate, seed, print)
    found = vars(outcome) | {"accepted": len(outcome.accepted)}
    write_result(out, "Requests under faults", table(outcome), {"smallest-sd3": found})
    if not outcome.sound:
        raise typer.Exit(1)


def run(
    root: Path, requests: int, every: float, window: int, rate: float, seed: int,
    say: Callable[[str], None] = lambda _: None, grace_s: float = GRACE_S,
) -> Outcome:  # fmt: skip
    """One run; everything it writes lies in `root`."""
    from experiments.faults.clock import MISSING, Clocks, library
    from experiments.faults.deck import Ground, let_in, schedule
    from experiments.faults.disk import SmallDisk
    from experiments.faults.family import smallest_family
    from experiments.faults.strangers import strangers_of, with_keys
    from nodes.commands.service import free_port
    from nodes.fleet import fleet

    family = str(smallest_family(root / "family"))
    other = str(smallest_family(root / "impostor", impostor=True))
    link = str(root / "link.sock")
    nodes: dict[str, dict[str, Any]] = {
        "edge-1": {"role": "edge", "families": {family: ["large"]}, "pace": PACE},
        "edge-2": {"role": "edge", "families": {family: ["large"]}, "pace": PACE},
        "phone": {"role": "device", "families": {family: ["small"]}, "link": "wifi", "link_control": link},
        "tablet": {"role": "device", "families": {family: ["small"]}, "pace": PACE},
        "impostor": {"role": "device", "families": {other: ["small"]}},
    }
    gateway = {
        "offer": [{"family": family, "steps": STEPS, "handoff": 2}], "checkpoint_every": 1, "degrade_after_s": 1.0,
        "policy": "least-finish-time", "deadline_s": DEADLINE_S, "tries": 12, "http": f"127.0.0.1:{free_port()}",
    }  # fmt: skip
    with_keys(root / "keys", {name: node["role"] for name, node in nodes.items()})
    outcome = Outcome(requests, grace_s)
    if library() is None:
        outcome.left_out["clock"] = MISSING
    asked: list[Asked] = []
    before = _cpu_s()
    with (
        contextlib.closing(Clocks(root / "clocks", ("gateway", "phone"))) as clocks,
        SmallDisk(root / "deployment" / "store") as disk,
        fleet(root / "deployment", nodes, gateway, "../keys", 300.0, clocks.environment()) as running,
    ):
        faults = schedule(seed, every, tuple(n for n in nodes if n != "impostor"), clocks.names)
        strangers = strangers_of(running, root / "keys")
        ground = Ground(
            running, tuple(nodes), "impostor", link, clocks, disk, strangers, outcome.left_out, outcome.faults,
            outcome.strangers, outcome.missed,
        )  # fmt: skip
        started = time.monotonic()
        asyncio.run(_under_fire(ground, outcome, asked, faults, window, rate, say))
        outcome.seconds, outcome.disk = time.monotonic() - started, disk.kind or ""
        outcome.let_in = let_in(ground)
        timed(outcome, asked, ground)
        deaths((root / "deployment" / "log.txt").read_text(errors="replace"), outcome)
        count(running.store, outcome, asked, "impostor")
        compare(running.store, outcome, family)
    outcome.cpu_s = _cpu_s() - before
    return outcome


def _cpu_s() -> float:
    """Of this process and of those that it started and that have ended."""
    import resource

    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


# --- asking ---


async def _under_fire(
    ground: Any,
    outcome: Outcome,
    asked: list[Asked],
    faults: Any,
    window: int,
    rate: float,
    say: Callable[[str], None],
) -> None:
    from experiments.faults.deck import play, resident, watch

    over = asyncio.Event()
    gate, started = asyncio.Semaphore(window), time.monotonic()
    told = started
    async with ground.running.asker() as asker, ground.running.asker() as watcher:
        before = resident(ground.running)
        fire = asyncio.ensure_future(play(ground, watcher, faults, over))
        watching = asyncio.ensure_future(watch(ground, watcher))

        async def one(number: int) -> None:
            nonlocal told
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            async with gate:
                await _one(asker, outcome, asked, number, ground)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"{sum(outcome.stages.values())} of {outcome.asked} have ended; {outcome.faults.total()} faults")

        await asyncio.gather(*(one(i) for i in range(outcome.asked)))
        over.set()
        await fire
        watching.cancel()
        ground.strangers.leave()
        await _idle(watcher)
        after = [resident(ground.running)]
        found = [each for each in (before, *ground.gateway_bytes, *after) if each]
        outcome.gateway_mb = {"start": before / 1e6, "end": after[0] / 1e6, "most": max(found) / 1e6}


async def _one(asker: Any, outcome: Outcome, asked: list[Asked], number: int, ground: Any) -> None:
    """Ask until it is accepted, then until it has ended: the gateway may be away for a while."""
    from experiments.faults.family import PROMPT
    from nodes.asker import RefusedByGateway, Unanswered

    fixed = {"mode": "relay"} if number % 3 == 0 else {}
    short = number % 10 == 7
    request = {"prompt": PROMPT, "seed": number, "allow_degraded": not fixed} | fixed
    request |= {"deadline_ms": int(1000 * SHORT_DEADLINE_S)} if short else {}
    began = time.monotonic()
    while True:
        try:
            job = (await asker.submit(request, key=f"request-{number}", timeout_s=5.0)).jobs[0]
            break
        except Unanswered:
            await asyncio.sleep(0.2)
        except RefusedByGateway as refused:
            if refused.status not in (429, 503, 507):
                raise
            outcome.refusals[str(refused.status)] += 1
            await asyncio.sleep(min(refused.retry_after_s or 0.5, 1.0))
    mine = Asked(job, SHORT_DEADLINE_S if short else DEADLINE_S, began, time.monotonic())
    asked.append(mine)
    while not mine.stage:
        now = time.monotonic()
        patience = mine.deadline_s + ground.away(mine.accepted, now) + outcome.grace_s + TOLD_S + HANGING_S
        if now - mine.accepted > patience:
            outcome.hanging.append(job)
            return
        try:
            told = await asyncio.wait_for(asker.job(job, LOST_S / 2), LOST_S)
        except (TimeoutError, Unanswered, RefusedByGateway):
            await asyncio.sleep(0.2)
            continue
        if told["stage"] in ENDED:
            mine.told, mine.stage, mine.error = time.monotonic(), told["stage"], told["error"]
            outcome.stages[mine.stage] += 1


async def _idle(asker: Any, most_s: float = 150.0) -> None:
    """Until the gateway has nothing open, not even what strangers asked."""
    from relay.errors import RelayError

    ends = time.monotonic() + most_s
    while time.monotonic() < ends:
        try:
            if not (await asker.status())["open"]:
                return
        except RelayError:
            pass
        await asyncio.sleep(0.5)


if __name__ == "__main__":
    typer.run(main)
