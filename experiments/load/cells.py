"""Cells run and kept: one small JSON a system, cell and seed; what is there is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from experiments.load.case import TEST, VALIDATION, Case, Cell
from experiments.load.service import DONE, LATE, REFUSED, Outcome
from experiments.load.systems import Unfit, systems
from experiments.simulate.scheduling import Contender
from experiments.simulate.search import drawn
from relay.errors import BadRequest
from relay.files import write_atomically
from relay.program import Program

Said = Callable[[str], None]
VIOLATION = (
    1.0  # what a request that is late or refused costs in tuning, in relative qualities, beside its lost picture
)


def all_cells(case: Case) -> Iterator[Cell]:
    config = case.config
    for fleet, trace, load, deadline in product(config.fleets, config.traces, config.loads, config.deadlines):
        yield Cell(fleet=fleet, trace=trace, load=load, deadline=deadline)


def goal_cells(case: Case) -> list[Cell]:
    """One a fleet and trace: at the load and deadline that the goals are about."""
    return [cell for cell in all_cells(case) if (cell.load, cell.deadline) == case.goal]


def names(case: Case, only: Sequence[str] | None) -> list[str]:
    """Systems asked for; those that this case cannot hold are left out where nobody named them."""
    if unknown := [name for name in only or () if name not in case.config.systems]:
        raise BadRequest(f"no system {unknown[0]!r} in the config: choose {', '.join(case.config.systems)}")
    return [n for n in case.config.systems if n in (only or case.config.systems)]


def run_cell(
    case: Case, folder: Path, name: str, cell: Cell, seed: int, requests: int, split: str = TEST,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of one run (`figures`), from disk where it was run before."""
    chosen = dict(case.tuned.get(name, {}) if settings is None else settings)
    digest = case.digest(name, cell, chosen, requests, split)
    where = folder / split / cell.fleet / cell.trace / f"{cell.load:g}-{cell.deadline:g}" / name
    path = where / f"{seed:02d}-{digest}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    outcome = case.run(name, cell, seed, split, requests, chosen)
    found = figures(case, cell, outcome, split)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(found) + "\n")
    return found


def figures(case: Case, cell: Cell, outcome: Outcome, split: str) -> dict[str, Any]:
    """Of one run. Quality is relative to what full-cloud measured for the same prompts; `gap`: (mean - edge-only) /
    (full-cloud - edge-only) of them; `edge_s`, `device_s`: seconds of nodes' time a picture that came in time."""
    modes = [work.program.mode for work in case.works]
    measured = case.measured(split).quality
    done = outcome.stage == DONE
    count = len(done)
    roles = {name: node.role for name, node in case.config.fleets[cell.fleet].nodes.items()}
    busy = {role: sum(s for name, s in outcome.busy_s.items() if roles[name] == role) for role in ("edge", "device")}
    pictures = max(int(done.sum()), 1)
    found: dict[str, Any] = {
        "requests": count, "late": float((outcome.stage == LATE).mean()), "refused": float((outcome.stage == REFUSED).mean()),
        "violations": float(1 - done.mean()), "per_s": float(done.sum() / max(outcome.arrival_s[-1], 1e-9)),
        "edge_s": busy["edge"] / pictures, "device_s": busy["device"] / pictures,
        "levels": (np.bincount(outcome.level[done], minlength=len(case.works)) / pictures).round(5).tolist(),
    }  # fmt: skip
    if done.any():
        full = measured[outcome.prompt[done], modes.index("full-cloud")].mean()
        mean = outcome.quality[done].mean()
        found |= {"quality": float(mean / full), "p50_s": float(np.median(outcome.seconds[done]))}
        found["p99_s"] = float(np.quantile(outcome.seconds[done], 0.99))
        if "edge-only" in modes:
            small = measured[outcome.prompt[done], modes.index("edge-only")].mean()
            found["gap"] = float((mean - small) / (full - small))
    return found


def worth(found: Mapping[str, Any]) -> float:
    """What tuning maximises, for every system alike: relative quality of what came in time, less violations."""
    return float((1 - found["violations"]) * found.get("quality", 0.0) - VIOLATION * found["violations"])


def search(case: Case, folder: Path, only: Sequence[str] | None, say: Said) -> dict[str, Any]:
    """Every system's settings by random search on validation prompts; the first configuration is the one that is given."""
    how, found = case.config.search, {}
    for name in names(case, only):
        contestant = case.config.systems[name]
        if contestant.tuned_as is not None:
            continue
        space = systems()[contestant.system].space  # type: ignore[attr-defined]
        tried: list[dict[str, Any]] = []
        configurations = drawn(Contender(policy=name, space=space), how.configurations, how.seed) if space else [{}]
        for number, settings in enumerate(configurations):
            try:
                reached = [
                    worth(run_cell(case, folder, name, cell, seed, how.requests, VALIDATION, settings))
                    for seed in how.seeds
                    for cell in _search_cells(case)
                ]
            except Unfit as error:
                say(f"{name}: left out: {error}")
                break
            tried.append({"settings": settings, "worth": float(np.mean(reached))})
            say(f"{name} {number + 1}/{len(configurations)}: {np.mean(reached):.4f} {settings}")
        if tried:
            best = max(tried, key=lambda each: float(each["worth"]))
            found[name] = {**best, "tried": tried}
    return found


def _search_cells(case: Case) -> list[Cell]:
    how = case.config.search
    return [
        Cell(fleet=fleet, trace=trace, load=load, deadline=deadline)
        for fleet, trace, load, deadline in product(case.config.fleets, how.traces, how.loads, how.deadlines)
    ]


def level_names(case: Case) -> list[str]:
    """Short names of the levels: full-cloud, 10+6, edge-only."""
    return [short_name(work.program, work.skipped) for work in case.works]


def short_name(program: Program, skipped: int = 0) -> str:
    steps = program.steps
    said = program.mode if program.mode in ("full-cloud", "edge-only") else f"{steps['large']}+{steps['small']}"
    return said + (f" from {skipped}" if skipped else "")
