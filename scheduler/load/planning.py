"""The plan for nodes as they are: which batch to plan at, how much of the deadline is for work and how much for waits.

A larger batch makes more of a node and each picture later; a larger part of the deadline for work admits better levels and
leaves waits less, so that nodes may be planned less busy. Both are tried out, since there are few; for each the solver is
exact. A level that would be too slow on one node keeps its others: a slow node is planned for what it can do in time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest
from scheduler.load.expected import Station, Work, level_load, pools, within
from scheduler.load.queueing import most_busy
from scheduler.load.settings import LoadSettings
from scheduler.load.solver import SHED, LevelLoad, Plan, Problem, solve

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCHES = (1, 2, 4, 8, 16, 32)  # at which plans are tried; the engine takes any between
REACHES = (0.5, 0.7, 0.85)  # of the deadline that levels may take with no wait, likewise


@dataclass(frozen=True)
class _Trial:
    """Levels at one batch and reach. `kept`: which levels those are; `wait_s`: what each leg may wait."""

    batch: int
    levels: tuple[LevelLoad, ...]
    kept: tuple[int, ...]
    wait_s: float


def best_plan(
    stations: Sequence[Station], works: Sequence[Work], quality: NDArray[np.float64], demand: NDArray[np.float64],
    settings: LoadSettings,
) -> tuple[Plan, int]:  # fmt: skip
    """The best plan for `demand` (classes,) requests a second of `quality` (classes, levels), and its batch.

    BadRequest where no level keeps the deadline or no node is there. How busy a node may be planned depends on how long it
    serves a request, and that on the plan: trials are compared by a first guess, and the best is made again by what it
    says itself.
    """
    best: tuple[float, _Trial, Plan] | None = None
    trials = _trials(stations, works, settings)
    for trial in trials:
        plan = _solved(trial, stations, quality, demand, settings, _guess(trial, stations))
        worth = float((plan.served * quality).sum() - SHED * plan.shed.sum())
        if best is None or worth > best[0] + 1e-9:
            best = worth, trial, plan
    assert best is not None
    _, trial, plan = best
    again = _solved(trial, stations, quality, demand, settings, _served(plan, trial, stations))
    return again, trial.batch


def _trials(stations: Sequence[Station], works: Sequence[Work], settings: LoadSettings) -> list[_Trial]:
    if not stations:
        raise BadRequest("there is no node: zero capacity serves nothing")
    deadline, found = settings.deadline_s, []
    for batch in [b for b in BATCHES if b <= max(each.batch for each in stations)]:
        loads = [level_load(work, stations, batch) for work in works]
        for reach in REACHES:
            fine = {i: kept for i, load in enumerate(loads) if (kept := within(load, reach * deadline)) is not None}
            if fine:
                legs = max(len(load.legs) for load in fine.values())
                found.append(_Trial(batch, tuple(fine.values()), tuple(fine), (1 - reach) * deadline / legs))
    if not found:
        alone = [level_load(work, stations, 1) for work in works]
        fastest = min(sum(min(leg.latency_s.values(), default=np.inf) for leg in load.legs) for load in alone)
        raise BadRequest(
            f"no level keeps a deadline of {deadline:g} s: the fastest takes {fastest:.3g} s on idle nodes"
        )
    return found


def _solved(
    trial: _Trial, stations: Sequence[Station], quality: NDArray[np.float64], demand: NDArray[np.float64],
    settings: LoadSettings, service_s: Mapping[str, float],
) -> Plan:  # fmt: skip
    """The exact plan of a trial, its indices those of all levels. `service_s`: seconds that each node serves a request."""
    alike = Counter(kind(station)[1:] for station in stations)
    caps = {}
    for station in stations:
        servers = min(trial.batch, station.batch) * alike[kind(station)[1:]]
        seconds = service_s[station.name]
        caps[station.name] = (
            most_busy(trial.wait_s, servers, seconds, settings.quantile, settings.variation) if seconds else 1.0
        )
    kept = list(trial.kept)
    plan = solve(
        Problem(pools(stations, trial.batch), trial.levels, quality[:, kept], demand, settings.deadline_s, caps=caps)
    )
    served = np.zeros_like(quality)
    served[:, kept] = plan.served
    plan.served, plan.allowed = served, tuple(kept[i] for i in plan.allowed)
    plan.loads = {(kept[i], leg, name): load for (i, leg, name), load in plan.loads.items()}
    plan.latency_s = {kept[i]: seconds for i, seconds in plan.latency_s.items()}
    return plan


def _guess(trial: _Trial, stations: Sequence[Station]) -> dict[str, float]:
    """Node -> seconds that it serves a request, as if it were given all its levels alike; 0 where it has none."""
    found = {}
    for station in stations:
        own = [
            leg.latency_s[station.name] for level in trial.levels for leg in level.legs if station.name in leg.latency_s
        ]
        found[station.name] = sum(own) / len(own) if own else 0.0
    return found


def _served(plan: Plan, trial: _Trial, stations: Sequence[Station]) -> dict[str, float]:
    """Node -> seconds that it serves a request of this plan, on average; the guess where it has none."""
    place = {level: i for i, level in enumerate(trial.kept)}
    total: dict[str, float] = {}
    count: dict[str, float] = {}
    for (level, leg, name), load in plan.loads.items():
        seconds = trial.levels[place[level]].legs[leg].latency_s[name]
        total[name], count[name] = total.get(name, 0.0) + load * seconds, count.get(name, 0.0) + load
    guess = _guess(trial, stations)
    return {name: total[name] / count[name] if name in count else seconds for name, seconds in guess.items()}


def kind(station: Station) -> tuple[object, ...]:
    """What of a node a plan depends on, its name first; links by their order of magnitude, since they are measured anew all
    the time."""
    curves = tuple((f, m, tuple(sorted(c.items()))) for f, ms in station.curves.items() for m, c in ms.items())
    link = round(2 * math.log(station.bytes_per_s)), round(20 * station.round_trip_s)
    return station.name, station.role, station.batch, curves, link
