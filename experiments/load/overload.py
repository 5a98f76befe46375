"""Three times what can be borne, then back: real processes, a calm before, a peak during which a node is killed, a calm after.

*Sustainable* is the largest demand that the plan for these nodes serves without shedding anybody, at whatever level: beyond
it requests must be refused. Calm is a share of what full quality can bear. Requests say no deadline of their own, so that
what was let in has time to be recovered; the SLO is the gateway's.

Told: whether every accepted request ended, and in what; the gateway's memory before, at the most, and after; how long after
the peak's end the last request came that took longer than the slowest of the calm before; what became of the killed
node's requests.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.load.case import Case
from experiments.load.real import FAILED, Run, deployed, drive, measured
from experiments.load.service import DONE, REFUSED, Demand, stations_of
from experiments.pictures import save_png, shown
from experiments.workloads.prompts import generator
from relay.errors import BadRequest
from scheduler.load.planning import best_plan
from scheduler.load.settings import LoadSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nodes.fleet import Fleet

SAMPLE_S = 0.25
SLACK = 1.1  # of the slowest in the calm before: a request that takes no longer is as before


@dataclass(frozen=True)
class Phases:
    """Seconds of each part; `times`: what is asked at the peak, of the sustainable load; `calm`: of full-cloud capacity."""

    before_s: float = 30.0
    peak_s: float = 60.0
    after_s: float = 60.0
    times: float = 3.0
    calm: float = 0.4


def sustainable(case: Case, fleet: str, deadline_s: float) -> float:
    """Requests a second that the plan serves, all of them. BadRequest where no level keeps the deadline."""
    known, stations = case.known(fleet, deadline_s).from_noise, stations_of(case.world(fleet))
    settings, quality = LoadSettings(deadline_s=deadline_s), known.mean[None]
    low, high = 0.0, case.capacity(fleet)[0]

    def fits(per_s: float) -> bool:
        plan, _ = best_plan(stations, known.works, quality, np.array([per_s]), settings)
        return float(plan.shed.sum()) <= 1e-6

    while fits(high):
        low, high = high, 2 * high
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def arrivals(
    case: Case, phases: Phases, calm_per_s: float, peak_per_s: float, deadline_s: float, seed: int = 0
) -> Demand:
    """Poisson in each part, prompts with equal chance."""
    rng, times, begins = generator(seed, "overload"), [], 0.0
    for seconds, per_s in ((phases.before_s, calm_per_s), (phases.peak_s, peak_per_s), (phases.after_s, calm_per_s)):
        count = max(1, int(rng.poisson(per_s * seconds)))
        times.append(begins + np.sort(rng.uniform(0.0, seconds, count)))
        begins += seconds
    moments = np.concatenate(times)
    prompts = rng.integers(len(case.measured("test").prompts), size=len(moments))
    return Demand(moments, prompts, deadline_s)


@contextmanager
def watched(pid: int) -> Iterator[list[tuple[float, int]]]:
    """(monotonic moment, resident bytes) of a process, again and again, read beside everything else."""
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def read() -> None:
        import os

        while not over.wait(SAMPLE_S):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                continue
            samples.append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE")))

    thread = threading.Thread(target=read, name="memory", daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def run(
    case: Case, fleet: str, phases: Phases, deadline: float, kill: str | None, load: dict[str, Any]
) -> dict[str, Any]:
    """Start the fleet twice: once to know what it can do and with which SLO, once to be overloaded."""
    with tempfile.TemporaryDirectory() as folder:
        with deployed(case, fleet, Path(folder) / "first", None) as running:
            deadline_s = deadline * measured(case, fleet, running).capacity(fleet)[1]
        with deployed(case, fleet, Path(folder) / "service", {"deadline_s": deadline_s} | load) as running:
            return overloaded(measured(case, fleet, running), running, fleet, phases, deadline_s, kill)


def overloaded(
    case: Case, running: Fleet, fleet: str, phases: Phases, deadline_s: float, kill: str | None
) -> dict[str, Any]:
    """What became of a service that is there already."""
    full, bearable = case.capacity(fleet)[0], sustainable(case, fleet, deadline_s)
    if kill is not None and kill not in running.deployment.nodes:
        raise BadRequest(f"there is no node {kill!r} to kill: choose {', '.join(running.deployment.nodes)}")
    demand = arrivals(case, phases, phases.calm * full, phases.times * bearable, deadline_s)
    at = phases.before_s + phases.peak_s / 2
    killing = [(at, lambda: running.kill(kill, signal.SIGKILL))] if kill is not None else []
    with watched(running.pid("gateway")) as memory:
        began = time.monotonic() + 0.5
        ends = sum((phases.before_s, phases.peak_s, phases.after_s)) + 900.0
        found: Run = running.ask(lambda asker: drive(asker, case, demand, deadline=False, at=killing), timeout_s=ends)
    status = running.status()
    return told(found, demand, phases, kill, [(moment - began, size) for moment, size in memory]) | {
        "deadline_s": deadline_s, "capacity_per_s": full, "sustainable_per_s": bearable, "kill": kill, "open": status["open"],
        "counters": status["load"]["counters"], "recovered": status["counters"].get("recovered", 0),
    }  # fmt: skip


def told(
    run: Run, demand: Demand, phases: Phases, kill: str | None, memory: Sequence[tuple[float, int]]
) -> dict[str, Any]:
    """Figures of a run; `memory` from the first request's moment on."""
    begins, ends = phases.before_s, phases.before_s + phases.peak_s
    part = np.digitize(demand.arrival_s, [begins, ends])  # 0 before, 1 peak, 2 after
    done = run.stage == DONE
    names = {DONE: "done", REFUSED: "refused"}  # no deadline is asked for, so that nothing is ended for being late
    parts = {}
    for number, name in enumerate(("before", "peak", "after")):
        mine = (part == number) & done
        parts[name] = {
            "requests": int((part == number).sum()),
            "stages": dict(Counter(names.get(int(s), "failed") for s in run.stage[part == number])),
            "late": int((run.seconds[mine] > demand.deadline_s).sum()),
            "p50_s": float(np.median(run.seconds[mine])) if mine.any() else None,
            "p95_s": float(np.quantile(run.seconds[mine], 0.95)) if mine.any() else None,
            "most_s": float(run.seconds[mine].max()) if mine.any() else None,
        }  # fmt: skip
    calm = run.seconds[(part == 0) & done]
    usual = SLACK * float(calm.max()) if len(calm) else 0.0
    slow = (part == 2) & done & (run.seconds > usual)
    refused = (part == 2) & (run.stage == REFUSED)
    sizes = {
        name: [size for moment, size in memory if low <= moment < high]
        for name, low, high in (("before", -1e9, begins), ("peak", begins, ends), ("after", ends, 1e9))
    }
    return {
        "parts": parts, "errors": sorted(set(run.errors))[:5], "failed": int((run.stage == FAILED).sum()),
        "usual_s": usual, "normal_after_s": float((demand.arrival_s[slow] - ends).max()) if slow.any() else 0.0,
        "last_refusal_after_s": float((demand.arrival_s[refused] - ends).max()) if refused.any() else 0.0,
        "of_killed": sum(kill in nodes for nodes in run.nodes) if kill else None,
        "refusal_p99_s": float(np.quantile(run.seconds[run.stage == REFUSED], 0.99)) if (run.stage == REFUSED).any() else None,
        "memory": {
            "before": max(sizes["before"], default=0), "most": max((s for _, s in memory), default=0),
            "after": sizes["after"][-1] if sizes["after"] else 0,
        },
        "series": {
            "asked_s": demand.arrival_s.round(3).tolist(), "seconds": np.nan_to_num(run.seconds).round(4).tolist(),
            "stage": run.stage.tolist(), "memory": [(round(moment, 2), size) for moment, size in memory],
        },
    }  # fmt: skip


def text(found: dict[str, Any], case: Case, fleet: str, phases: Phases, picture: str) -> str:
    """The report, without its title."""
    config, memory = case.config, found["memory"]
    lines = [
        f"{config.family}: {case.said_of(fleet)}."
        f" SLO {found['deadline_s']:.2f} s; full quality bears {found['capacity_per_s']:.2f} pictures/s,"
        f" the cheapest levels {found['sustainable_per_s']:.2f}/s. Calm: {phases.calm:g} of the former; peak: {phases.times:g}"
        f" times the latter for {phases.peak_s:g} s, then back.",
        "",
        "| | asked | done | of them after the SLO | refused | failed | p50 | p95 | slowest |",
        "|" + " --- |" * 9,
    ]
    for name, each in found["parts"].items():
        stages = each["stages"]
        times = [f"{each[key]:.2f} s" if each[key] is not None else "" for key in ("p50_s", "p95_s", "most_s")]
        counts = [stages.get("done", 0), each["late"], stages.get("refused", 0), stages.get("failed", 0)]
        lines.append(f"| {name} | {each['requests']} | {' | '.join(map(str, counts))} | {' | '.join(times)} |")
    failed = f"{found['failed']} failed ({'; '.join(found['errors'])})" if found["failed"] else "none failed"
    lines += [
        "",
        f"- Every accepted request ended: {found['open']} were open at the end, {failed}.",
        f"- Latency was as before {found['normal_after_s']:.1f} s after the peak's end (the last request that took more than"
        f" {found['usual_s']:.2f} s, {SLACK:g} x the slowest of the calm before); the last refusal was asked"
        f" {found['last_refusal_after_s']:.1f} s after it.",
        f"- Gateway's memory: {memory['before'] / 1e6:.0f} MB before, {memory['most'] / 1e6:.0f} MB at the most,"
        f" {memory['after'] / 1e6:.0f} MB after.",
    ]
    if found["refusal_p99_s"] is not None:
        lines.append(f"- Refused within {1000 * found['refusal_p99_s']:.0f} ms (99 %).")
    if found["kill"]:
        lines.append(
            f"- {found['kill']} was killed in the middle of the peak: {found['recovered']} requests were taken up elsewhere,"
            f" {found['failed']} lost."
        )
    return "\n".join(lines) + f"\n\n{shown(Path(picture))}\n"


def draw(found: dict[str, Any], phases: Phases, path: Path) -> None:
    """Latency of each request by when it was asked, and the gateway's memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    series = found["series"]
    asked, seconds, stage = (np.array(series[key]) for key in ("asked_s", "seconds", "stage"))
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, height_ratios=[3, 1])
    for which, colour, name in (
        (DONE, "#0a9a6f", "done"),
        (REFUSED, "#888888", "refused"),
        (FAILED, "#d1495b", "failed"),
    ):
        mine = stage == which
        top.scatter(asked[mine], seconds[mine], s=5, color=colour, label=f"{name} ({int(mine.sum())})")
    top.axhline(found["deadline_s"], color="#d27d00", lw=1, ls="--", label="SLO")
    begins, ends = phases.before_s, phases.before_s + phases.peak_s
    for axis in (top, bottom):
        axis.axvspan(begins, ends, color="#2f7fc4", alpha=0.12)
        if found["kill"]:
            axis.axvline((begins + ends) / 2, color="#d1495b", lw=1)
    top.set_ylabel("seconds")
    top.legend(fontsize=7)
    moments, sizes = zip(*series["memory"], strict=True) if series["memory"] else ((), ())
    bottom.plot(moments, np.array(sizes) / 1e6, color="#6b5fc7", lw=1)
    bottom.set_ylabel("gateway, MB")
    bottom.set_xlabel("asked at, s (shaded: the peak; line: a node killed)")
    figure.tight_layout()
    save_png(figure, path)
    plt.close(figure)
