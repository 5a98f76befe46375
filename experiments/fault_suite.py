"""Does every accepted request end, whatever dies? Requests under a seeded schedule of faults, with real processes.

    start a gateway, two edges and two devices, one of them behind an emulated link
    keep a window of requests open; each carries an idempotency key, so that asking again is safe
    meanwhile, now and then: kill, stop, cut, stall, slow, or send garbage, and let what died come back
    at the end: every accepted job must have ended once, with a picture that opens or an error that says why

Counted beside: attempts, results that came after their job had ended, steps that were paid twice.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import socket
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

FAULTS = ("kill", "kill", "stop", "cut", "stall", "slow", "garbage", "kill gateway")
PROMPT = "a red circle"


@dataclass
class Outcome:
    """What came of a run. `lost`: accepted and not ended; `twice`: ended more than once; both must be empty."""

    asked: int
    accepted: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    counters: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)  # done, and the picture does not open
    unexplained: list[str] = field(default_factory=list)  # failed, and no error says why
    degraded: int = 0
    attempts: int = 0
    steps_asked: int = 0
    steps_paid: int = 0
    seconds: float = 0.0

    @property
    def sound(self) -> bool:
        return not (self.lost or self.twice or self.unreadable or self.unexplained)


def main(
    requests: Annotated[int, typer.Option(help="How many.")] = 10_000,
    family: Annotated[str, typer.Option(help="A family that is here.")] = "mini-sd3",
    every: Annotated[float, typer.Option(metavar="S", help="Mean seconds between two faults.")] = 5.0,
    window: Annotated[int, typer.Option(help="Requests open at a time.")] = 32,
    rate: Annotated[float, typer.Option(help="Requests a second, at most.")] = 6.0,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="The Markdown file to write.")] = Path("docs/results/faults.md"),
) -> None:
    """Run the suite at full length and write what came of it."""
    from experiments.provenance import write_result

    with tempfile.TemporaryDirectory() as folder:
        outcome = run(Path(folder) / "faults", family, requests, every, window, rate, seed, print)
    write_result(
        out, "Requests under faults", table(outcome), {"faults": vars(outcome) | {"accepted": len(outcome.accepted)}}
    )
    if not outcome.sound:
        raise typer.Exit(1)


def run(
    folder: Path, family: str, requests: int, every: float, window: int, rate: float, seed: int,
    say: Callable[[str], None] = lambda _: None,
    prompt: str = PROMPT,
) -> Outcome:  # fmt: skip
    """One run in `folder`."""
    from nodes.fleet import fleet

    control = f"{folder}.link"
    nodes = {
        "edge-1": {"role": "edge", "families": {family: ["large"]}},
        "edge-2": {"role": "edge", "families": {family: ["large"]}},
        "phone": {"role": "device", "families": {family: ["small"]}, "link": "wifi", "link_control": control},
        "tablet": {"role": "device", "families": {family: ["small"]}},
    }
    gateway = {
        "offer": [{"family": family, "steps": 4, "handoff": 2}], "checkpoint_every": 2, "degrade_after_s": 1.0,
        "policy": "least-finish-time", "deadline_s": 120.0, "tries": 12,
    }  # fmt: skip
    outcome = Outcome(requests)
    with fleet(folder, nodes, gateway) as running:
        started = time.monotonic()
        asyncio.run(_under_fire(running, outcome, control, every, window, rate, seed, say, prompt))
        outcome.seconds = time.monotonic() - started
        _count(running.store, outcome)
    return outcome


async def _under_fire(
    running: Any,
    outcome: Outcome,
    control: str,
    every: float,
    window: int,
    rate: float,
    seed: int,
    say: Callable[[str], None],
    prompt: str,
) -> None:
    done = asyncio.Event()
    faults = asyncio.ensure_future(_faults(running, outcome, control, every, seed, done))
    gate, started = asyncio.Semaphore(window), time.monotonic()
    told = started
    async with running.asker() as asker:

        async def one(number: int) -> None:
            nonlocal told
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            async with gate:
                await _one(asker, outcome, number, prompt)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"{sum(outcome.stages.values())} of {outcome.asked} have ended; faults: {dict(outcome.faults)}")

        await asyncio.gather(*(one(i) for i in range(outcome.asked)))
    done.set()
    await faults


async def _one(asker: Any, outcome: Outcome, number: int, prompt: str) -> None:
    """Ask until it is accepted, then until it has ended: the gateway may be away for a while."""
    from nodes.asker import RefusedByGateway, Unanswered

    fixed = {"mode": "relay"} if number % 3 == 0 else {}
    request = {"prompt": prompt, "seed": number, "allow_degraded": not fixed} | fixed
    while True:
        try:
            job = (await asker.submit(request, key=f"request-{number}", timeout_s=5.0)).jobs[0]
            break
        except Unanswered:
            await asyncio.sleep(0.2)
        except RefusedByGateway as refused:
            if refused.status != 429:
                raise
            await asyncio.sleep(refused.retry_after_s or 0.5)
    outcome.accepted.append(job)
    while True:
        try:
            told = await asker.job(job, 10.0)
        except (Unanswered, RefusedByGateway):
            await asyncio.sleep(0.2)
            continue
        if told["stage"] in ("done", "failed", "cancelled"):
            outcome.stages[told["stage"]] += 1
            return


async def _faults(running: Any, outcome: Outcome, control: str, every: float, seed: int, done: asyncio.Event) -> None:
    """One fault after the other until the last request has ended; each is mended before the next."""
    rng = random.Random(seed)
    nodes = list(running.deployment.nodes)
    while not done.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), rng.expovariate(1 / every))
            return
        what, node, hold = rng.choice(FAULTS), rng.choice(nodes), rng.uniform(0.5, 3.0)
        outcome.faults[what] += 1
        with suppress(OSError, AssertionError):  # what it was meant for is just being started again
            await _fault(running, control, what, node, hold)


async def _fault(running: Any, control: str, what: str, node: str, hold: float) -> None:
    from nodes.link_control import LinkControl

    match what:
        case "kill":
            running.kill(node)
        case "kill gateway":
            running.kill("gateway")
        case "stop":
            pid = running.pid(node)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(hold)
            os.kill(pid, signal.SIGCONT)
        case "garbage":
            _garbage(running.gateway.data)
        case "cut" | "stall" | "slow":
            with LinkControl(control) as link:
                if what == "slow":
                    await asyncio.to_thread(link.set, "dsl")
                else:
                    await asyncio.to_thread(getattr(link, what))
                await asyncio.sleep(hold)
                await asyncio.to_thread(link.restore)
                await asyncio.to_thread(link.set, "wifi")


def _garbage(address: str) -> None:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=1) as raw:
        raw.sendall(os.urandom(4096))


def _count(store: Path, outcome: Outcome) -> None:
    """What the ledger and the decision log say, read after the fact: not what the processes remember."""
    from PIL import Image

    lines = [json.loads(line) for line in (store / "decisions.jsonl").read_text().splitlines()]
    ends = Counter(line["job"] for line in lines if line["kind"] == "outcome")
    outcome.attempts = sum(line["kind"] == "decision" for line in lines)
    with sqlite3.connect(store / "ledger.db") as db:
        rows = {row[0]: row[1:] for row in db.execute("SELECT id, stage, error, report, image, ended_at FROM jobs")}
    for job in outcome.accepted:
        stage, error, report, image, ended = rows.get(job, ("gone", None, None, None, None))
        if ended is None:
            outcome.lost.append(job)
        elif stage == "done":
            said = json.loads(report)
            outcome.degraded += said["degraded"]
            outcome.steps_asked += sum(said["steps"].values())
            outcome.steps_paid += max(said.get("steps_paid", 0), sum(said["steps"].values()))
            try:
                Image.open(io.BytesIO((store / image).read_bytes())).load()
            except (OSError, TypeError):
                outcome.unreadable.append(job)
        else:
            outcome.errors[(error or "")[:100]] += 1
            if not error:
                outcome.unexplained.append(job)
        if ends[job] > 1:
            outcome.twice.append(job)
    if len(rows) != len(set(outcome.accepted)):
        outcome.twice += [job for job in rows if job not in set(outcome.accepted)]


def table(outcome: Outcome) -> str:
    faults = ", ".join(f"{n} x {what}" for what, n in sorted(outcome.faults.items()))
    ends = ", ".join(f"{n} {stage}" for stage, n in sorted(outcome.stages.items()))
    lines = [
        f"{outcome.asked} requests of 4 steps in {outcome.seconds / 60:.1f} min,"
        f" under {sum(outcome.faults.values())} faults: {faults}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| accepted | {len(outcome.accepted)} |",
        f"| ended | {ends} |",
        f"| accepted and never ended | {len(outcome.lost)} |",
        f"| ended twice, or accepted twice | {len(outcome.twice)} |",
        f"| done without a picture that opens | {len(outcome.unreadable)} |",
        f"| failed without a reason | {len(outcome.unexplained)} |",
        f"| finished by another program, as the asker allowed | {outcome.degraded} |",
        f"| placements | {outcome.attempts} |",
        f"| steps asked for, steps that nodes took | {outcome.steps_asked}, {outcome.steps_paid} |",
    ]
    lines += [f"| failed: {error} | {n} |" for error, n in outcome.errors.most_common(10)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
