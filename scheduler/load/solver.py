"""How much of which work goes where: the levels' loads that keep deadlines and give the best pictures.

    maximise    sum_{c,l} z[c,l] q[c,l]  -  sum_c shed[c] penalty
    subject to  sum_l z[c,l] + shed[c] = demand[c]                 every class of prompts is served or told so
                sum_p x[l,m,p] = sum_c z[c,l]                      each leg of a level is walked by some pool
                sum_{l,m} x[l,m,p] seconds[l,m,p] <= busy[p] n[p]  no pool does more than it can

z: requests a second of class c at level l; x: of level l's leg of member m on pool p (identical nodes are one pool, so a
thousand nodes of three kinds are three). After Argus (arXiv 2511.06724): max sum load x quality s.t. sum load = demand,
load <= capacity(level); there every worker is at one level, here a node's members stay loaded and it mixes levels, so
the problem is a linear one and HiGHS solves it exactly, where a rounded gradient method would not.

`busy[p]`: what may be planned of a pool's time, so that waits leave room within the deadline (`queueing`): it starts high
and is lowered until the levels in use keep it. The duals of the capacities are the pools' prices: quality lost a second
of their time taken away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from relay.errors import BadRequest
from scheduler.load.queueing import mean_wait, most_busy, wait_quantile

if TYPE_CHECKING:
    from numpy.typing import NDArray

MOST_BUSY = 0.95  # of a pool's time that is ever planned: a measured step time has an error too
SHED = 2.0  # what a request that is not served costs, in qualities: more than the best picture is worth
ROUNDS = 6


@dataclass(frozen=True)
class Pool:
    """Identical nodes. `servers`: requests that one of them works on at once (its batch at the best throughput)."""

    name: str
    count: int
    servers: int = 1


@dataclass(frozen=True)
class Leg:
    """What a request of a level takes of one kind of node, by pool: `busy_s` of its time (at its best batch), `latency_s`
    of the clock, transfer to the next leg included."""

    busy_s: Mapping[str, float]
    latency_s: Mapping[str, float]


@dataclass(frozen=True)
class LevelLoad:
    """A level as the solver sees it: its legs in order."""

    name: str
    legs: tuple[Leg, ...]


@dataclass(frozen=True)
class Problem:
    """`quality` (classes, levels) in 0..1; `demand` (classes,) requests a second; `deadline_s` of every request."""

    pools: tuple[Pool, ...]
    levels: tuple[LevelLoad, ...]
    quality: NDArray[np.float64]
    demand: NDArray[np.float64]
    deadline_s: float
    quantile: float = 0.99  # of requests that shall keep it
    variation: float = 0.5  # of arrivals and work, see `queueing.mean_wait`
    # Share of each pool's time that may be planned, by whoever has made room for waits; None: lowered here until levels fit
    caps: Mapping[str, float] | None = None


@dataclass
class Plan:
    """`served` (classes, levels) and `shed` (classes,): requests a second. `loads`: (level, leg, pool) -> requests a second."""

    served: NDArray[np.float64]
    shed: NDArray[np.float64]
    loads: dict[tuple[int, int, str], float]
    busy: dict[str, float]  # planned share of each pool's time
    prices: dict[str, float]  # quality a second of one node's time is worth
    quality: float  # mean over what is served
    latency_s: dict[int, float]  # of the levels in use: the quantile's estimate
    allowed: tuple[int, ...] = field(default=())  # levels that can keep the deadline at all

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of each class's served requests, per level; zero where a class has none."""
        total = self.served.sum(axis=1, keepdims=True)
        return np.divide(self.served, total, out=np.zeros_like(self.served), where=total > 0)


def solve(problem: Problem) -> Plan:
    """The best plan whose levels keep the deadline by the queueing estimate. BadRequest where nothing could serve."""
    check(problem)
    grouped, groups = _grouped(problem)
    allowed = [i for i, level in enumerate(grouped.levels) if _fastest(level) < problem.deadline_s]
    if not allowed:
        fastest = min(map(_fastest, grouped.levels))
        raise BadRequest(
            f"no level keeps a deadline of {problem.deadline_s:g} s: the fastest takes {fastest:.3g} s on idle nodes"
        )
    if grouped.caps is not None:
        return spread(solved_at(grouped), groups)
    program = _Linear(grouped, allowed)
    caps = {pool.name: MOST_BUSY for pool in grouped.pools}
    for _ in range(ROUNDS):
        plan = program.solved(caps)
        late = [i for i, seconds in plan.latency_s.items() if seconds > problem.deadline_s]
        if not late:
            return spread(plan, groups)
        for name, cap in _lowered(grouped, plan, late).items():
            caps[name] = min(caps[name], cap)
    kept = [i for i in allowed if i not in late] or allowed
    return spread(_Linear(grouped, kept).solved(caps), groups)


def solved_at(problem: Problem) -> Plan:
    """As `solve`, where no two pools are alike, nothing is to be checked, and `caps` says how busy each may be."""
    assert problem.caps is not None
    allowed = [i for i, level in enumerate(problem.levels) if _fastest(level) < problem.deadline_s]
    return _Linear(problem, allowed).solved(
        {pool.name: min(problem.caps[pool.name], MOST_BUSY) for pool in problem.pools}
    )


def _grouped(problem: Problem) -> tuple[Problem, dict[str, tuple[Pool, ...]]]:
    """The problem with pools that do everything in the same time as one, and which pools each of them is."""
    kinds: dict[Any, list[Pool]] = {}
    for pool in problem.pools:
        if pool.count > 0:
            does = tuple(
                (leg.busy_s.get(pool.name), leg.latency_s.get(pool.name))
                for level in problem.levels
                for leg in level.legs
            )
            cap = None if problem.caps is None else problem.caps[pool.name]
            kinds.setdefault((pool.servers, cap, does), []).append(pool)
    groups = {members[0].name: tuple(members) for members in kinds.values()}
    pools = tuple(Pool(name, sum(p.count for p in members), members[0].servers) for name, members in groups.items())
    levels = tuple(
        LevelLoad(
            level.name,
            tuple(
                Leg(
                    {name: leg.busy_s[name] for name in groups if name in leg.busy_s},
                    {name: leg.latency_s[name] for name in groups if name in leg.latency_s},
                )
                for leg in level.legs
            ),
        )
        for level in problem.levels
    )
    return replace(problem, pools=pools, levels=levels), groups


def spread(plan: Plan, groups: Mapping[str, tuple[Pool, ...]]) -> Plan:
    """The plan over the pools as they were given: each of a group takes its part."""
    loads: dict[tuple[int, int, str], float] = {}
    for (level, leg, name), load in plan.loads.items():
        total = sum(pool.count for pool in groups[name])
        loads |= {(level, leg, pool.name): load * pool.count / total for pool in groups[name]}
    each = {pool.name: name for name, pools in groups.items() for pool in pools}
    return replace(
        plan, loads=loads, busy={pool: plan.busy[name] for pool, name in each.items()},
        prices={pool: plan.prices[name] for pool, name in each.items()},
    )  # fmt: skip


def check(problem: Problem) -> None:
    """BadRequest names what cannot be."""
    classes, levels = problem.quality.shape
    if levels != len(problem.levels) or classes != len(problem.demand):
        raise BadRequest(
            f"quality is {classes} x {levels}, for {len(problem.demand)} classes, {len(problem.levels)} levels"
        )
    if not np.isfinite(problem.quality).all() or not np.isfinite(problem.demand).all() or (problem.demand < 0).any():
        raise BadRequest("qualities and demands are finite, and no demand is negative")
    if not any(pool.count > 0 for pool in problem.pools):
        raise BadRequest("there is no node: zero capacity serves nothing")
    if problem.deadline_s <= 0:
        raise BadRequest(f"a deadline of {problem.deadline_s:g} s cannot be kept")


def _fastest(level: LevelLoad) -> float:
    return sum(min(leg.latency_s.values(), default=np.inf) for leg in level.legs)


class _Linear:
    """The linear program over the allowed levels; only how much of each pool's time may be planned changes.

    Columns: z of each class and level, x of each leg and pool, shed of each class. Rows: classes, legs; below, pools.
    """

    def __init__(self, problem: Problem, allowed: Sequence[int]):
        from scipy.sparse import csc_array

        self.problem, self.allowed = problem, tuple(allowed)
        classes, levels = len(problem.demand), len(self.allowed)
        self.pools = {pool.name: i for i, pool in enumerate(problem.pools)}
        self.counts = np.array([pool.count for pool in problem.pools], float)
        legs = [(i, m) for i in self.allowed for m in range(len(problem.levels[i].legs))]
        self.x = [(i, m, name) for i, m in legs for name in problem.levels[i].legs[m].busy_s]
        seconds = np.array([s for i, m in legs for s in problem.levels[i].legs[m].busy_s.values()], float)
        pool = np.array([self.pools[name] for *_, name in self.x], int)
        row = np.repeat(
            classes + np.arange(len(legs)), [len(problem.levels[i].legs[m].busy_s) for i, m in legs]
        )  # of the leg that each x walks
        self.first_x = classes * levels
        self.shed = self.first_x + len(self.x)
        self.cost = np.concatenate(
            [-problem.quality[:, list(self.allowed)].ravel(), np.zeros(len(self.x)), np.full(classes, SHED)]
        )
        place = {level: n for n, level in enumerate(self.allowed)}
        of_leg = np.array([place[i] for i, _ in legs], int)
        own = np.arange(classes)
        z = own[:, None] * levels + of_leg[None, :]  # (classes, legs)
        there = np.broadcast_to(classes + np.arange(len(legs)), z.shape)
        columns = np.concatenate(
            [np.arange(self.first_x), self.shed + own, self.first_x + np.arange(len(self.x)), z.ravel()]
        )
        rows = np.concatenate([np.repeat(own, levels), own, row, there.ravel()])
        values = np.concatenate([np.ones(self.first_x + classes + len(self.x)), np.full(z.size, -1.0)])
        shape = (classes + len(legs), len(self.cost))
        self.equal = csc_array((values, (rows, columns)), shape=shape)
        self.busy = csc_array(
            (seconds, (pool, self.first_x + np.arange(len(self.x)))), shape=(len(self.pools), len(self.cost))
        )
        self.targets = np.concatenate([problem.demand, np.zeros(len(legs))])

    def solved(self, caps: Mapping[str, float]) -> Plan:
        from scipy.optimize import linprog

        limits = self.counts * np.array([caps[name] for name in self.pools])
        found = linprog(
            self.cost, A_ub=self.busy, b_ub=limits, A_eq=self.equal, b_eq=self.targets, method="highs-ds",
            options={"presolve": False},  # there is nothing to be found, and looking takes time
        )  # fmt: skip
        if found.status != 0:
            raise BadRequest(f"the load cannot be planned: {found.message}")
        quality = self.problem.quality
        served = np.zeros_like(quality)
        served[:, list(self.allowed)] = found.x[: self.first_x].reshape(len(served), -1)
        walked = found.x[self.first_x : self.shed]
        loads = {self.x[n]: float(walked[n]) for n in np.flatnonzero(walked > 1e-12)}
        used, marginals = (limits - found.slack) / self.counts, -found.ineqlin.marginals
        plan = Plan(
            served=served, shed=found.x[self.shed :], loads=loads,
            busy={name: float(used[r]) for name, r in self.pools.items()},
            prices={name: float(marginals[r]) for name, r in self.pools.items()},
            quality=float((served * quality).sum() / max(served.sum(), 1e-12)), latency_s={}, allowed=self.allowed,
        )  # fmt: skip
        plan.latency_s = {i: _latency(self.problem, plan, i) for i in self.allowed if served[:, i].sum() > 1e-9}
        return plan


def _latency(problem: Problem, plan: Plan, level: int) -> float:
    """The deadline's quantile of a level's latency: its slowest pools in use, the longest wait at its quantile, the others'
    at their means (waits at different nodes are not all long at once)."""
    servers = {pool.name: pool.servers * pool.count for pool in problem.pools}
    total, tails, means = 0.0, [], []
    for m, leg in enumerate(problem.levels[level].legs):
        used = [name for name in leg.busy_s if plan.loads.get((level, m, name), 0.0) > 1e-9]
        if not used:
            continue
        slowest = max(used, key=lambda name: leg.latency_s[name])
        total += leg.latency_s[slowest]
        ask = plan.busy[slowest], servers[slowest], leg.latency_s[slowest]
        tails.append(wait_quantile(problem.quantile, *ask, variation=problem.variation))
        means.append(mean_wait(*ask, variation=problem.variation))
    extra = max((tail - mean for tail, mean in zip(tails, means, strict=True)), default=0.0)
    return total + sum(means) + max(0.0, extra)


def _lowered(problem: Problem, plan: Plan, late: Sequence[int]) -> dict[str, float]:
    """For the pools that late levels use: the share of their time at which each leg's wait fits into its part of the slack."""
    servers = {pool.name: pool.servers * pool.count for pool in problem.pools}
    caps: dict[str, float] = {}
    for level in late:
        legs = problem.levels[level].legs
        slack = problem.deadline_s - sum(
            max((leg.latency_s[n] for n in leg.busy_s if plan.loads.get((level, m, n), 0.0) > 1e-9), default=0.0)
            for m, leg in enumerate(legs)
        )
        for m, leg in enumerate(legs):
            for name in leg.busy_s:
                if plan.loads.get((level, m, name), 0.0) > 1e-9:
                    part = slack / len(legs)
                    fits = float(
                        most_busy(part, servers[name], leg.latency_s[name], problem.quantile, problem.variation)
                    )
                    caps[name] = min(caps.get(name, MOST_BUSY), fits, 0.9 * plan.busy[name] + 0.1 * fits)
    return caps
