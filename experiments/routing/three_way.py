"""Quality against mean cost for two ways and three at equal budgets: the table that no paper has.

A budget says what a prompt may cost in the mean, as a share of full-cloud's cost. A router that says what each mode is
worth for each prompt spends it as a knapsack: every prompt starts with the cheapest mode and is upgraded, best worth per
cost first, while the budget holds. What is said to be no gain is not bought. Two-way is the same without the relay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.routing.data import EDGE, FULL, MODES, RELAY
from relay.errors import BadRequest
from relay.program import Program
from scheduler.outcomes import read_table

Floats = NDArray[np.float64]
WAYS: dict[str, tuple[int, ...]] = {"two-way": (EDGE, FULL), "three-way": (EDGE, RELAY, FULL)}


def mode_costs(programs: Mapping[str, str], folder: Path) -> Floats:
    """Cost of each mode (3,) as a share of full-cloud's: steps x measured seconds of a step at batch 1."""
    curves = read_table(folder, "curves").filter(batch=1)
    costs = []
    for mode in MODES:
        program = Program.parse(programs[mode])
        cost = 0.0
        for leg in program.legs:
            found = curves.filter(family=program.family, member=leg.member)["step_s"]
            if not len(found):
                raise BadRequest(f"{folder} holds no step time of {program.family}'s {leg.member} member at batch 1")
            cost += leg.steps * float(found.mean())  # type: ignore[arg-type]
        costs.append(cost)
    return np.array(costs) / costs[FULL]


def spend(values: Floats, costs: Floats, budget: float, ways: Sequence[int]) -> NDArray[np.int64]:
    """The mode of each prompt (N,), from what each mode is said to be worth (N, 3), at a mean cost of at most `budget`.

    Each prompt's upgrades are the upper hull of its worth over cost, so that better ones come first.
    """
    cheapest = min(ways, key=lambda mode: costs[mode])
    if costs[cheapest] > budget:
        raise BadRequest(f"a budget of {budget:.2f} does not pay for {MODES[cheapest]} ({costs[cheapest]:.2f})")
    upgrades = sorted(
        ((-(gain / cost), i, step, mode, cost) for i, row in enumerate(values)
         for step, (mode, gain, cost) in enumerate(_hull(row, costs, ways))),
    )  # fmt: skip
    chosen = np.full(len(values), cheapest)
    left = (budget - costs[cheapest]) * len(values) + 1e-9
    stopped: set[int] = set()
    for _, i, _, mode, cost in upgrades:
        if cost > left:
            stopped.add(i)  # a later upgrade of this prompt stands on this one
        if i in stopped:
            continue
        chosen[i], left = mode, left - cost
    return chosen


def _hull(row: Floats, costs: Floats, ways: Sequence[int]) -> list[tuple[int, float, float]]:
    """(mode, gain, cost) of each step up from the cheapest mode, with gain per cost positive and falling."""
    at = min(ways, key=lambda mode: costs[mode])
    steps = []
    while better := [m for m in ways if costs[m] > costs[at] and row[m] > row[at]]:
        best = max(better, key=lambda m: (row[m] - row[at]) / (costs[m] - costs[at]))
        steps.append((best, float(row[best] - row[at]), float(costs[best] - costs[at])))
        at = best
    return steps


def blend(quality: Floats, costs: Floats, budget: float, ways: Sequence[int]) -> Floats:
    """Shares of the modes (3,) that a router which knows no prompt, only means (3,), would take for the budget."""
    shares = np.zeros(len(MODES))
    at, left = min(ways, key=lambda mode: costs[mode]), budget
    shares[at], left = 1.0, budget - costs[at]
    for mode, _, cost in _hull(quality, costs, ways):
        moved = min(1.0, max(0.0, left / cost))
        shares[at], shares[mode], left = 1 - moved, moved, left - moved * cost
        at = mode
        if left <= 1e-12:
            break
    return shares
