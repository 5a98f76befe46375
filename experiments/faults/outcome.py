"""What came of a run of `experiments.fault_suite`: counted afterwards, from what the disk says and what the asker was told."""

from __future__ import annotations

import io
import json
import re
import sqlite3
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S, SHORT_DEADLINE_S = 120.0, 2.0
GRACE_S = 1.5  # of an end, on a machine that starts processes meanwhile
TOLD_S = 6.5  # from an end until it is told: a lost question is asked again, a lost connection made again
STEPS = 4
REDRAWN = 40  # pictures of jobs that were disturbed, drawn again without faults and compared


@dataclass
class Outcome:
    """What came of a run. Lists name jobs, and all of them must be empty for it to be sound."""

    asked: int
    grace_s: float = GRACE_S  # how long after its deadline an end is not yet late
    accepted: list[str] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)  # faults of those that was just being started again
    strangers: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)  # by status: asked again until accepted
    left_out: dict[str, str] = field(default_factory=dict)  # kinds of faults, and why
    lost: list[str] = field(default_factory=list)  # accepted, and not ended in the ledger
    hanging: list[str] = field(default_factory=list)  # the asker was never told an end
    late: list[str] = field(default_factory=list)
    told_late: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)  # ended, answered or accepted twice
    unreadable: list[str] = field(default_factory=list)  # done, and the picture does not open
    unexplained: list[str] = field(default_factory=list)  # failed, and no error says why
    foreign: list[str] = field(default_factory=list)  # a node of another latent space had a hand in it
    wrong: list[str] = field(default_factory=list)  # drawn again undisturbed it is another picture
    let_in: list[str] = field(default_factory=list)  # strangers
    crashed: list[str] = field(default_factory=list)  # processes that ended with an error of their own
    aborted: list[str] = field(default_factory=list)  # and those that a signal ended which nobody here had sent
    last_words: list[str] = field(default_factory=list)  # of those that crashed
    others_open: int = 0  # jobs of strangers that have not ended
    redrawn: int = 0
    degraded: int = 0
    attempts: int = 0
    steps_asked: int = 0
    steps_paid: int = 0
    latest_s: float = 0.0  # the longest that an end came after its deadline, outages taken off
    stretches_twice: int = 0  # handoffs and pictures that were made again
    seconds: float = 0.0
    cpu_s: float = 0.0  # of all processes, those that were killed included
    ending_s: dict[str, float] = field(default_factory=dict)  # from accepted to ended: percentiles
    gateway_mb: dict[str, float] = field(default_factory=dict)
    disk: str = ""

    @property
    def sound(self) -> bool:
        return not (
            self.lost or self.hanging or self.late or self.told_late or self.twice or self.unreadable or self.unexplained
            or self.foreign or self.wrong or self.let_in or self.crashed or self.others_open
        )  # fmt: skip


@dataclass
class Asked:
    """One request as its asker saw it; times by time.monotonic()."""

    job: str
    deadline_s: float
    began: float  # asking
    accepted: float
    told: float = 0.0
    away: float = 0.0  # seconds of it in which nothing could be ended
    stage: str = ""  # empty: never told
    error: str | None = None


def deaths(log: str, outcome: Outcome) -> None:
    """Who died otherwise than by our SIGKILL, from what the supervisor said."""
    for name, how in re.findall(r"^up +\| (\S+) died, (.+?); it is", log, re.MULTILINE):
        if how.startswith("with"):
            outcome.crashed.append(f"{name} {how}")
            outcome.last_words.append(_last_words(log, name, how))
        elif how != "killed by SIGKILL":
            outcome.aborted.append(f"{name} {how}")


def _last_words(log: str, name: str, how: str, lines: int = 40) -> str:
    """What a process said before it died."""
    before = log[: log.index(f"{name} died, {how}")].splitlines()
    return "\n".join([line for line in before if line.partition("|")[0].strip() == name][-lines:])


def timed(outcome: Outcome, asked: list[Asked], ground: Any) -> None:
    outcome.accepted = [each.job for each in asked]
    for each in asked:
        each.away = ground.away(each.began, each.told)
        if each.stage and each.told - each.accepted > each.deadline_s + each.away + outcome.grace_s + TOLD_S:
            outcome.told_late.append(each.job)
    took = sorted(each.told - each.accepted for each in asked if each.stage)
    if took:
        outcome.ending_s = {
            "median": statistics.median(took), "p90": took[int(0.9 * (len(took) - 1))],
            "p99": took[int(0.99 * (len(took) - 1))], "longest": took[-1],
        }  # fmt: skip


def count(store: Path, outcome: Outcome, asked: list[Asked], impostor: str) -> None:
    from PIL import Image

    with sqlite3.connect(store / "ledger.db") as db:
        query = "SELECT id, tenant, stage, error, report, image, ended_at FROM jobs"
        rows = {row[0]: row[1:] for row in db.execute(query)}
        by_gateway = (
            "SELECT job, COUNT(*) FROM events WHERE node = 'gateway' AND what IN ('done', 'failed', 'cancelled')"
        )
        ends = dict(db.execute(f"{by_gateway} GROUP BY job").fetchall())
        outcome.attempts = db.execute("SELECT COUNT(*) FROM events WHERE what = 'placed'").fetchone()[0]
        again = "SELECT COUNT(*) - COUNT(DISTINCT job || what) FROM events WHERE node != 'gateway' AND what IN ('ready', 'done')"
        outcome.stretches_twice = db.execute(again).fetchone()[0]
    tenant = rows[asked[0].job][0] if asked and asked[0].job in rows else None
    for mine in asked:
        job = mine.job
        _, stage, error, report, image, ended = rows.get(job, (None, "gone", None, None, None, None))
        said = json.loads(report) if report else {}
        if ended is None:
            outcome.lost.append(job)
        elif stage == "done":
            outcome.degraded += said["degraded"]
            outcome.steps_asked += sum(said["steps"].values())
            outcome.steps_paid += max(said.get("steps_paid", 0), sum(said["steps"].values()))
            try:
                Image.open(io.BytesIO((store / image).read_bytes())).load()
            except (OSError, TypeError):
                outcome.unreadable.append(job)
        else:
            outcome.errors[_kind(error)] += 1
            if not error:
                outcome.unexplained.append(job)
        after = said.get("seconds", 0.0) - mine.deadline_s - mine.away
        outcome.latest_s = max(outcome.latest_s, after)
        if after > outcome.grace_s:
            outcome.late.append(
                f"{job}: {stage} after {said['seconds']:.1f} s, had {mine.deadline_s:.0f} and {mine.away:.1f} of outages; "
                + _timeline(store, job)
            )
        if impostor in (said.get("node"), *said.get("nodes", ())) and stage == "done":
            outcome.foreign.append(job)
        if ends.get(job, 0) > 1 or (mine.stage and (mine.stage, mine.error) != (stage, error)):
            outcome.twice.append(job)
    known = {mine.job for mine in asked}
    outcome.twice += [job for job, row in rows.items() if row[0] == tenant and job not in known]
    outcome.others_open = sum(row[0] != tenant and row[5] is None for row in rows.values())


def _timeline(store: Path, job: str) -> str:
    """What happened to a job, in one line."""
    with sqlite3.connect(store / "ledger.db") as db:
        rows = db.execute("SELECT at, node, what FROM events WHERE job = ? ORDER BY at", (job,)).fetchall()
    return ", ".join(f"{node} {what} {at - rows[0][0]:+.1f}" for at, node, what in rows)


def _kind(error: str | None) -> str:
    """An error without what differs from job to job."""
    return " ".join("#" if any(c.isdigit() for c in word) else word for word in (error or "").split())[:100]


def compare(store: Path, outcome: Outcome, family: str) -> None:
    """Pictures of jobs that were disturbed on their way, against the undisturbed run of their program and seed."""
    import numpy as np
    from PIL import Image

    from experiments.faults.family import PROMPT
    from relay.pipeline import RelayPipeline

    with sqlite3.connect(store / "ledger.db") as db:
        rows = db.execute("SELECT id, seed, report, image FROM jobs WHERE stage = 'done' AND image NOT NULL").fetchall()
    mine, pipe = set(outcome.accepted), None
    for job, seed, report, image in rows:
        said = json.loads(report)
        if job not in mine or said["degraded"] or not said["history"] or outcome.redrawn == REDRAWN:
            continue
        pipe = pipe or RelayPipeline.from_pretrained(family)
        alone = np.asarray(pipe(PROMPT, program=said["program"], seed=seed).images[0]).astype(int)
        outcome.redrawn += 1
        if np.abs(np.asarray(Image.open(store / image)).astype(int) - alone).max() > 2:  # 1e-4 is far below a level
            outcome.wrong.append(job)


def table(outcome: Outcome) -> str:
    ends = ", ".join(f"{n} {stage}" for stage, n in sorted(outcome.stages.items()))
    took, memory = outcome.ending_s, outcome.gateway_mb
    lines = [
        f"{outcome.asked} requests of {STEPS} steps in {outcome.seconds / 60:.1f} min under {outcome.faults.total()} faults."
        " One in ten has a deadline",
        f"of {SHORT_DEADLINE_S:g} s, the others of {DEADLINE_S:g} s. Gateway, two edges, two devices (one behind an"
        " emulated link) and an impostor of",
        "another latent space, all with keys; random members of one layer.",
        "",
        "| requests | |",
        "| --- | --- |",
        f"| accepted | {len(outcome.accepted)} |",
        f"| ended | {ends} |",
        f"| accepted and never ended, or never told | {len(outcome.lost)}, {len(outcome.hanging)} |",
        f"| ended, answered or accepted twice | {len(outcome.twice)} |",
        f"| ended, or told, later than the deadline | {len(outcome.late)}, {len(outcome.told_late)} |",
        f"| latest end, after its deadline and all outages | {outcome.latest_s:.2f} s |",
        f"| done without a picture that opens | {len(outcome.unreadable)} |",
        f"| failed without a reason | {len(outcome.unexplained)} |",
        f"| another picture than the undisturbed run's (of {outcome.redrawn} disturbed ones) | {len(outcome.wrong)} |",
        f"| made with the impostor's help | {len(outcome.foreign)} |",
        f"| strangers' jobs left open | {outcome.others_open} |",
        f"| processes that crashed, or were aborted by a library | {_named(outcome.crashed)}, {_named(outcome.aborted)} |",
        f"| finished by another program, as the asker allowed | {outcome.degraded} |",
        f"| refused first, and asked again: by HTTP status | {_listed(outcome.refusals)} |",
        f"| placements | {outcome.attempts} |",
        f"| work done twice: steps, and handoffs and pictures | {outcome.steps_paid - outcome.steps_asked} of"
        f" {outcome.steps_asked}, {outcome.stretches_twice} |",
    ]  # fmt: skip
    if took:
        lines.append(
            f"| from accepted to ended: median, p90, p99, longest | {took['median']:.2f} s, {took['p90']:.2f} s,"
            f" {took['p99']:.2f} s, {took['longest']:.1f} s |"
        )
    if memory:
        lines.append(
            f"| gateway's resident memory at the start, at the end, most | {memory['start']:.0f} MB,"
            f" {memory['end']:.0f} MB, {memory['most']:.0f} MB |"
        )
    lines.append(f"| processor time of all processes, their starts included | {outcome.cpu_s:.0f} s |")
    lines += [f"| failed: {error} | {n} |" for error, n in outcome.errors.most_common(10)]
    lines += ["", "| fault | times | of them on what was just being started |", "| --- | --- | --- |"]
    lines += [f"| {what} | {n} | {outcome.missed[what]} |" for what, n in sorted(outcome.faults.items())]
    lines += ["", f"Strangers: {_listed(outcome.strangers)}. The full disk was a {outcome.disk}."]
    lines += [f"Left out: {what}: {why}." for what, why in outcome.left_out.items()]
    return "\n".join(lines) + "\n"


def _named(found: list[str]) -> str:
    return "; ".join(found) or "0"


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{what} ({n})" for what, n in sorted(counted.items())) or "none"
