"""What is left to any system: violations if all nodes did a given share of the most that they can.

A fleet ends at most `most_per_s` requests a second, at the levels that take least of its nodes, whatever their pictures. Of
requests that come faster than that, as many are in time as a single server of this rate has in time when it turns away, at
once, each that it would end too late: with equal work and equal deadlines nobody else has more (Moore 1968, the rule for the
fewest late jobs). No latency of a level, no batch that must fill, no quality and no moment of surprise is in it, so no system
reaches it at 100 %; what a system has lies at the share of that rate that it makes use of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from relay.batching import NEARLY_BEST
from scheduler.load.expected import Station, Work, level_load, pools
from scheduler.load.solver import MOST_BUSY, Problem, solved_at

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANY_S = 1e6  # a deadline that every level keeps
FLOOD = 1e6  # requests a second: more than there are nodes for


def most_per_s(works: Sequence[Work], stations: Sequence[Station]) -> float:
    """Requests a second that the nodes end at most, each all its time at its best batch."""
    batch = max(station.batch for station in stations)
    loads = tuple(level_load(work, stations, batch) for work in works)
    limits = dict.fromkeys((station.name for station in stations), MOST_BUSY)
    nothing = np.zeros((1, len(loads)))  # no quality: a request that is served is worth not being shed
    plan = solved_at(Problem(pools(stations, batch), loads, nothing, np.array([FLOOD]), ANY_S, caps=limits))
    return float(plan.served.sum()) / MOST_BUSY / NEARLY_BEST


def least_violations(arrival_s: NDArray[np.float64], deadline_s: float, per_s: float) -> float:
    """Share of the requests that come at `arrival_s` and cannot all be in time at `per_s` requests a second."""
    ends, late = 0.0, 0
    for comes in arrival_s.tolist():
        done = max(ends, comes) + 1 / per_s
        if done > comes + deadline_s:
            late += 1
        else:
            ends = done
    return late / max(len(arrival_s), 1)
