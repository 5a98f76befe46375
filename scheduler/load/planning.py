"""The plan for nodes as they are: which batch to plan at, how much of the deadline is for work and how much for waits.

A larger batch makes more of a node and each picture later; a larger part of the deadline for work admits better levels and
leaves waits less, so that nodes may be planned less busy. Both are tried out, since there are few; for each the solver is
exact, and one that cannot be better than what is found, as its prices show, is left out. A level that would be too slow on
one node at the batch that is tried has that node at the largest batch at which it is in time, or keeps its others: a slow
node is planned for what it can do in time, and does not hold the fast ones to small batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest
from scheduler.load.expected import Holding, Station, Work, level_load, within
from scheduler.load.queueing import most_busy
from scheduler.load.settings import LoadSettings
from scheduler.load.solver import MOST_BUSY, SHED, Leg, LevelLoad, Plan, Pool, Problem, solved_at, spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

BATCHES = (1, 2, 4, 8, 16, 32)  # at which plans are tried; the engine takes any between
REACHES = (0.5, 0.7, 0.85)  # of the deadline that levels may take with no wait, likewise
FACTORS = (0.7, 1.0, 1.4)  # by which one trial's prices are tried on the others
NEVER, TINY = 1e40, 1e-20
SAME = 1e-9  # plans whose worth differs by less are as good; the earlier trial's is taken


@dataclass(frozen=True)
class _Trial:
    """Levels at one batch and reach. `kept`: which levels those are; `wait_s`: what each leg may wait. `busy` (kept, legs,
    stations): seconds of a station's time, `NEVER` where it does not walk that leg; a leg that is not there costs nothing."""

    batch: int
    levels: tuple[LevelLoad, ...]
    kept: tuple[int, ...]
    wait_s: float
    busy: NDArray[np.float64]


def best_plan(
    stations: Sequence[Station], works: Sequence[Work], quality: NDArray[np.float64], demand: NDArray[np.float64],
    settings: LoadSettings, before: int = 1,
) -> tuple[Plan, int]:  # fmt: skip
    """The best plan for `demand` (classes,) requests a second of `quality` (classes, levels), and its batch.

    BadRequest where no level keeps the deadline or no node is there. How busy a node may be planned depends on how long it
    serves a request, and that on the plan: trials are compared by a first guess, and the best is made again by what it
    says itself. A trial is not solved where the prices of one that was show that it cannot be better (`_bound`). `before`:
    the batch of the plan before, where the search begins; what it finds does not depend on it.
    """
    groups: dict[tuple[object, ...], list[Station]] = {}
    for station in stations:
        groups.setdefault((*kind(station)[1:], station.encode_s, station.decode_s), []).append(station)
    fleet = _Fleet([each[0] for each in groups.values()], [len(each) for each in groups.values()], stations)
    trials = _trials(fleet.stations, works, settings)
    solved: dict[int, tuple[float, Plan]] = {}
    limits = [_caps(trial, fleet, settings, _guess(trial, fleet.stations)) for trial in trials]
    nothing = np.zeros(len(fleet.stations))
    hopes = np.array([_bound(t, fleet, quality, demand, caps, nothing) for t, caps in zip(trials, limits, strict=True)])
    # under little load nothing is better than the first, under more hardly anything than what was best before
    number: int | None = next((n for n, trial in enumerate(trials) if trial.batch == before), 0)
    while number is not None:
        plan = _solved(trials[number], fleet, quality, demand, settings, limits[number])
        solved[number] = float((plan.served * quality).sum() - SHED * plan.shed.sum()), plan
        prices = np.array([plan.prices[each.name] for each in fleet.stations])
        for n in set(range(len(trials))) - set(solved):
            for factor in FACTORS:
                hopes[n] = min(hopes[n], _bound(trials[n], fleet, quality, demand, limits[n], factor * prices))
        number = _next(hopes, solved)
    best = max(worth for worth, _ in solved.values())
    chosen = min(number for number, (worth, _) in solved.items() if worth >= best - SAME)
    trial, plan = trials[chosen], solved[chosen][1]
    again = _solved(trial, fleet, quality, demand, settings, _caps(trial, fleet, settings, _served(plan, trial, fleet)))
    names = {each[0].name: tuple(Pool(one.name, 1) for one in each) for each in groups.values()}
    return spread(again, names), trial.batch


class _Fleet:
    """Stations of which no two are alike, and how many there are of each. `alike`: how many share a queue in the estimate of
    waits, those with links of the same order."""

    def __init__(self, stations: Sequence[Station], counts: Sequence[int], of: Sequence[Station]):
        self.stations, self.counts = tuple(stations), np.array(counts, float)
        share = Counter(kind(each)[1:] for each in of)
        self.alike = np.array([share[kind(each)[1:]] for each in stations], float)


def _next(hopes: NDArray[np.float64], solved: Mapping[int, tuple[float, Plan]]) -> int | None:
    """The trial that may be best; None where none of those not solved can be, nor as good and before the best."""
    best = max(worth for worth, _ in solved.values())
    first = min(number for number, (worth, _) in solved.items() if worth >= best - SAME)
    left = [n for n in range(len(hopes)) if n not in solved and hopes[n] > best + (SAME if n > first else -SAME)]
    return max(left, key=lambda n: float(hopes[n]), default=None)


def _trials(stations: Sequence[Station], works: Sequence[Work], settings: LoadSettings) -> list[_Trial]:
    if not stations:
        raise BadRequest("there is no node: zero capacity serves nothing")
    deadline, found = settings.deadline_s, []
    place = {station.name: i for i, station in enumerate(stations)}
    holding: Holding = {}
    before: dict[float, dict[int, LevelLoad]] = {}  # reach -> levels at the batch before
    for batch in [b for b in BATCHES if b <= max(each.batch for each in stations)]:
        loads = [level_load(work, stations, batch, holding) for work in works]
        for reach in REACHES:
            fine = {i: kept for i, load in enumerate(loads) if (kept := within(load, reach * deadline)) is not None}
            both = {i: _with(fine.get(i), before.get(reach, {}).get(i)) for i in range(len(works))}
            fine = {
                i: kept for i, load in both.items()
                if load is not None and (kept := within(load, reach * deadline)) is not None
            }  # fmt: skip
            before[reach] = fine
            if fine:
                legs = max(len(load.legs) for load in fine.values())
                busy = np.full((len(fine), legs, len(stations)), NEVER)
                for n, load in enumerate(fine.values()):
                    busy[n, len(load.legs) :] = 0.0
                    for m, leg in enumerate(load.legs):
                        busy[n, m, [place[name] for name in leg.busy_s]] = list(leg.busy_s.values())
                found.append(_Trial(batch, tuple(fine.values()), tuple(fine), (1 - reach) * deadline / legs, busy))
    if not found:
        alone = [level_load(work, stations, 1) for work in works]
        fastest = min(sum(min(leg.latency_s.values(), default=np.inf) for leg in load.legs) for load in alone)
        raise BadRequest(
            f"no level keeps a deadline of {deadline:g} s: the fastest takes {fastest:.3g} s on idle nodes"
        )
    return found


def _with(load: LevelLoad | None, smaller: LevelLoad | None) -> LevelLoad | None:
    """A level at a batch, and on the nodes that are too slow for that at the batch that they still can."""
    if load is None or smaller is None:
        return load or smaller
    legs = (
        Leg({**before.busy_s, **leg.busy_s}, {**before.latency_s, **leg.latency_s})
        for leg, before in zip(load.legs, smaller.legs, strict=True)
    )
    return LevelLoad(load.name, tuple(legs))


def _caps(
    trial: _Trial, fleet: _Fleet, settings: LoadSettings, service_s: NDArray[np.float64]
) -> NDArray[np.float64]:  # fmt: skip
    """(stations,): share of its time that each may be planned. `service_s`: for how long each serves a request; 0: never."""
    servers = np.array([min(trial.batch, each.batch) for each in fleet.stations]) * fleet.alike
    busy = most_busy(trial.wait_s, servers, service_s, settings.quantile, settings.variation)
    return np.minimum(np.where(service_s > 0, busy, 1.0), MOST_BUSY)


def _bound(
    trial: _Trial, fleet: _Fleet, quality: NDArray[np.float64], demand: NDArray[np.float64], caps: NDArray[np.float64],
    prices: NDArray[np.float64],
) -> float:  # fmt: skip
    """No plan of this trial is worth more: any prices (stations,) that are not negative say so, by the dual of the plan's
    program. A class is worth its best level less the level's work at these prices, or is shed; a node what it could sell."""
    prices = np.maximum(prices, 0.0) + TINY  # what a station does not walk costs all, whatever its time does
    cost = (prices * trial.busy).min(-1).sum(-1)  # (kept,)
    best = (quality[:, list(trial.kept)] - cost).max(1)
    return float((demand * np.maximum(best, -SHED)).sum() + (prices * fleet.counts * caps).sum())


def _solved(
    trial: _Trial, fleet: _Fleet, quality: NDArray[np.float64], demand: NDArray[np.float64], settings: LoadSettings,
    caps: NDArray[np.float64],
) -> Plan:  # fmt: skip
    """The exact plan of a trial, its indices those of all levels."""
    kept = list(trial.kept)
    pools = tuple(
        Pool(each.name, int(count), min(trial.batch, each.batch))
        for each, count in zip(fleet.stations, fleet.counts, strict=True)
    )
    limits = {each.name: float(cap) for each, cap in zip(fleet.stations, caps, strict=True)}
    plan = solved_at(
        Problem(pools, trial.levels, quality[:, kept], demand, settings.deadline_s, settings.quantile,
                settings.variation, limits)
    )  # fmt: skip
    served = np.zeros_like(quality)
    served[:, kept] = plan.served
    plan.served, plan.allowed = served, tuple(kept[i] for i in plan.allowed)
    plan.loads = {(kept[i], leg, name): load for (i, leg, name), load in plan.loads.items()}
    plan.latency_s = {kept[i]: seconds for i, seconds in plan.latency_s.items()}
    return plan


def _guess(trial: _Trial, stations: Sequence[Station]) -> NDArray[np.float64]:
    """(stations,): seconds that each serves a request, as if it were given all its levels alike; 0 where it has none."""
    total, count = dict.fromkeys((each.name for each in stations), 0.0), Counter[str]()
    for level in trial.levels:
        for leg in level.legs:
            count.update(list(leg.latency_s))
            for name, seconds in leg.latency_s.items():
                total[name] += seconds
    return np.array([total[each.name] / max(count[each.name], 1) for each in stations])


def _served(plan: Plan, trial: _Trial, fleet: _Fleet) -> NDArray[np.float64]:
    """(stations,): seconds that each serves a request of this plan, on average; the guess where it has none."""
    place = {level: i for i, level in enumerate(trial.kept)}
    total: dict[str, float] = {}
    count: dict[str, float] = {}
    for (level, leg, name), load in plan.loads.items():
        seconds = trial.levels[place[level]].legs[leg].latency_s[name]
        total[name], count[name] = total.get(name, 0.0) + load * seconds, count.get(name, 0.0) + load
    guess = _guess(trial, fleet.stations)
    mean = {name: total[name] / count[name] for name in count}
    return np.array([mean.get(each.name, guess[i]) for i, each in enumerate(fleet.stations)])


def kind(station: Station) -> tuple[object, ...]:
    """What of a node a plan depends on, its name first; links by their order of magnitude, since they are measured anew all
    the time."""
    curves = tuple((f, m, tuple(sorted(c.items()))) for f, ms in station.curves.items() for m, c in ms.items())
    link = round(2 * math.log(station.bytes_per_s)), round(20 * station.round_trip_s)
    return station.name, station.role, station.batch, curves, link
