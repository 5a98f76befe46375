"""Is the simulation of systems under load right? The same requests through real processes and through the simulation.

Ours decides in the gateway, the others at the asker; each deployment's simulation is given the step-time curves that its own
nodes measured at their start and what the service adds to one request alone, nothing else. Goals: the median within 10 %, the
99th percentile and the violations within what a bootstrap of the real run could have been (95 %, blocks of requests that came
one after the other, since they share queues).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.load.case import Case, Cell
from experiments.load.real import FAILED, Run, asked_for, deployed, drive, measured
from experiments.load.service import DONE, Demand, Service
from experiments.load.systems import systems

BLOCK, DRAWS = 20, 2000
SIMULATED = 5  # runs of the same requests: systems draw, too
CLOSE = 0.10
REST_S, NEXT_TO_NOTHING = 90.0, 0.02
Floats = NDArray[np.float64]


def run(
    case: Case, fleet: str, who: Sequence[str], traces: Sequence[str], seconds: float, load: float, deadline: float,
    say: Callable[[str], None], seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row each system and trace. A deployment of its own says first what the capacity is, so that all meet the same
    requests; those that decide in the gateway have one each, the others one together."""
    rows: list[dict[str, Any]] = []
    ours = [name for name in who if in_gateway(case, name)]
    with tempfile.TemporaryDirectory() as folder:
        with deployed(case, fleet, Path(folder) / "first", None) as running:
            first = measured(case, fleet, running)
        asked = {
            trace: asked_for(first, Cell(fleet=fleet, trace=trace, load=load, deadline=deadline), seed, seconds)
            for trace in traces
        }
        deadline_s = deadline * first.capacity(fleet)[1]
        groups = [[name] for name in ours] + [[name for name in who if name not in ours]]
        for number, group in enumerate(each for each in groups if each):
            limits = {"deadline_s": deadline_s} | settings_of(case, group[0]) if group[0] in ours else None
            with deployed(case, fleet, Path(folder) / f"service-{number}", limits) as running:
                here = measured(case, fleet, running)
                for trace in traces:
                    for name in group:
                        forgotten(running)
                        rows.append(compared(here, running, fleet, name, trace, asked[trace], seed))
                        real, told = rows[-1]["real"], rows[-1]["simulated"]
                        say(f"{trace} {name}: p50 {real['p50_s']:.3f} s, simulated {told['p50_s']:.3f} s")
    return rows


def in_gateway(case: Case, name: str) -> bool:
    """Whether the gateway has this system's rule. Others name their levels at the asker."""
    return case.config.systems[name].system == "ours"


def settings_of(case: Case, name: str) -> dict[str, Any]:
    """As its `load:` has them."""
    return case.config.systems[name].settings | case.tuned.get(name, {})


def forgotten(running: Any) -> None:
    """Wait until the gateway plans for next to nothing again, as a simulation begins; at most `REST_S`."""
    ends = time.monotonic() + REST_S
    while (load := running.status()["load"]) is not None and time.monotonic() < ends:
        if not load["pressed"] and load["demand_per_s"] < NEXT_TO_NOTHING:
            return
        time.sleep(0.5)


def compared(
    case: Case, running: Any, fleet: str, name: str, trace: str, demand: Demand, seed: int = 0
) -> dict[str, Any]:
    """One system and trace, really and simulated. `case`: `measured` of this deployment."""
    system = None
    if not in_gateway(case, name):
        system = case.system(name, fleet, demand.deadline_s, seed, case.tuned.get(name, {}))
    lasts = float(demand.arrival_s[-1]) + 900.0
    real: Run = running.ask(
        lambda asker: drive(asker, case, demand, system=system, fleet=fleet, said=f"{trace}, {name}"), timeout_s=lasts
    )
    moved = Demand(np.maximum.accumulate(real.asked_s - real.asked_s.min()), demand.prompt, demand.deadline_s)
    quality = case.measured("test").quality
    done = real.stage == DONE
    simulated = []
    for draw in range(SIMULATED):
        again = case.system(name, fleet, demand.deadline_s, draw, case.tuned.get(name, {}))
        outcome = Service(case.world(fleet), case.works_of(fleet), case.measured("test"), again, moved, draw).run()
        simulated.append(figures(outcome.stage, outcome.seconds, outcome.quality))
    drawn = np.where(done & (real.level >= 0), quality[demand.prompt, np.maximum(real.level, 0)], np.nan)
    told = {key: float(np.nanmean([each[key] for each in simulated])) for key in simulated[0]}
    return {
        "system": name, "rule": systems()[case.config.systems[name].system].rule, "trace": trace,  # type: ignore[attr-defined]
        "requests": len(real.stage), "deadline_s": demand.deadline_s, "failed": int((real.stage == FAILED).sum()),
        "errors": sorted(set(real.errors))[:3], "real": figures(real.stage, real.seconds, drawn),
        "interval": intervals(real.stage, real.seconds, seed), "simulated": told, "capacity": case.capacity(fleet),
    }  # fmt: skip


def figures(stage: NDArray[np.int64], seconds: Floats, quality: Floats) -> dict[str, float]:
    """Median and 99th percentile of what came in time, violations, mean quality."""
    done = stage == DONE
    took = seconds[done]
    return {
        "p50_s": float(np.median(took)) if done.any() else float("nan"),
        "p99_s": float(np.quantile(took, 0.99)) if done.any() else float("nan"),
        "violations": float(1 - done.mean()), "quality": float(np.nanmean(quality[done])) if done.any() else float("nan"),
    }  # fmt: skip


def intervals(stage: NDArray[np.int64], seconds: Floats, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % of a circular block bootstrap over requests in the order of their coming."""
    rng, count = np.random.default_rng(seed), len(stage)
    length = max(1, min(BLOCK, count // 10))
    found: dict[str, list[float]] = {"p50_s": [], "p99_s": [], "violations": []}
    for _ in range(DRAWS):
        starts = rng.integers(count, size=-(-count // length))
        rows = ((starts[:, None] + np.arange(length)) % count).ravel()[:count]
        drawn = figures(stage[rows], seconds[rows], seconds[rows])
        for key, values in found.items():
            values.append(drawn[key])
    return {
        key: (float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975)))
        for key, values in found.items() if not np.isnan(values).all()
    }  # fmt: skip


def agrees(row: dict[str, Any]) -> dict[str, bool]:
    """Which goals a row keeps."""
    real, simulated, interval = row["real"], row["simulated"], row["interval"]
    inside = {
        key: interval[key][0] - 1e-9 <= simulated[key] <= interval[key][1] + 1e-9
        for key in ("p99_s", "violations") if key in interval
    }  # fmt: skip
    return {"p50_s": bool(abs(simulated["p50_s"] / real["p50_s"] - 1) <= CLOSE), **inside}


def text(case: Case, fleet: str, rows: Sequence[dict[str, Any]], seconds: float, load: float, deadline: float) -> str:
    """The report, without its title."""
    head = [
        "trace", "system", "requests", "p50", "simulated", "off by", "p99 [95 %]", "simulated", "violations [95 %]",
        "simulated", "quality", "simulated",
    ]  # fmt: skip
    lines = [
        f"{seconds:g} s of each trace at {load:g} times the fleet's full-cloud capacity"
        f" ({rows[0]['capacity'][0]:.2f} pictures/s), deadline {deadline:g} times its latency ({rows[0]['deadline_s']:.2f} s);"
        f" {case.said_of(fleet)};"
        f" {case.config.family}. Simulated: mean over {SIMULATED} draws of the system, given each deployment's own"
        " curves and the moments at which requests really came.",
        "",
        f"| {' | '.join(head)} |",
        "|" + " --- |" * len(head),
    ]
    for row in rows:
        real, told, fine = row["real"], row["simulated"], agrees(row)
        unknown = (float("nan"), float("nan"))
        (p99_low, p99_high), (low, high) = (row["interval"].get(key, unknown) for key in ("p99_s", "violations"))
        said = {
            "p50_s": f"{told['p50_s'] / real['p50_s'] - 1:+.1%}", "p99_s": f"{told['p99_s']:.2f} s",
            "violations": f"{told['violations']:.1%}",
        }  # fmt: skip
        said = {key: value if fine.get(key) else f"**{value}**" for key, value in said.items()}
        cells = [
            row["trace"], row["system"], row["requests"], f"{real['p50_s']:.3f} s", f"{told['p50_s']:.3f} s",
            said["p50_s"], f"{real['p99_s']:.2f} s [{p99_low:.2f}, {p99_high:.2f}]", said["p99_s"],
            f"{real['violations']:.1%} [{low:.1%}, {high:.1%}]", said["violations"], f"{real['quality']:.3f}",
            f"{told['quality']:.3f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    kept = [fine for row in rows for fine in agrees(row).values()]
    lines += [
        "",
        f"Bold: outside the goal (p50 within {CLOSE:.0%}; p99 and violations inside the real run's interval)."
        f" {sum(kept)} of {len(kept)} goals are kept.",
    ]
    lines += [
        f"\n{row['system']}, {row['trace']}: {row['failed']} ended in another error: {'; '.join(row['errors'])}"
        for row in rows
        if row["failed"]
    ]
    return "\n".join(lines) + "\n"
