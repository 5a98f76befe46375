"""What ours is compared with: the rule of each paper as its summary gives it, on our levels, nodes and batches.

Each stands for its paper's *rule*, not for its code: batching is the step engine's and placing the same for all. Whatever a
paper's system does not do (admission, for one) its stand-in does not do either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.load.service import CONTROL_S, Asked
from experiments.load.systems import Floats, Known, Plain, Unfit
from experiments.simulate.scheduling import Range
from scheduler.load.expected import Station, level_load, pools
from scheduler.load.similarity import skip_of
from scheduler.load.solver import LevelLoad, Problem, solve

FAR_S = 1e6  # a deadline that binds nothing: for solvers whose rule has no waits in it


class ClipperHA(Plain):
    """Clipper (NSDI 2017), highest accuracy."""

    name = "Clipper-HA"
    rule = "always the level of the best mean quality"

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        return self.known.safest_first[0]


class ClipperHT(Plain):
    """Clipper, highest throughput."""

    name = "Clipper-HT"
    rule = "always the level of which the nodes could do most a second"

    def __init__(self, known: Known, rng: np.random.Generator):
        super().__init__(known, rng)
        self._level: int | None = None

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        if self._level is None:
            self._level = int(np.argmax(rates(self.known, stations)))
        return self._level


class _Counting(Plain):
    """One that estimates demand: a weighted mean of arrivals a second, times headroom."""

    def __init__(self, known: Known, rng: np.random.Generator, weight: float = 0.5, headroom: float = 1.1):
        super().__init__(known, rng)
        self.weight, self.headroom = weight, headroom
        self.mean: float | None = None
        self._came = 0

    def demand(self) -> float:
        """Requests a second to plan for; the period is over."""
        rate, self._came = self._came / CONTROL_S, 0
        self.mean = rate if self.mean is None else self.mean + self.weight * (rate - self.mean)
        return self.headroom * self.mean


class Proteus(_Counting):
    """Proteus (ASPLOS 2024): accuracy scaling by an integer program, one query like another."""

    name = "Proteus-like"
    rule = (
        "every second the level shares of the best mean quality whose load fits the capacity, batches no longer than a share"
        " of the SLO; a prompt gets a level by these shares at random"
    )
    space: ClassVar[dict[str, Any]] = {
        "weight": [0.2, 0.35, 0.5, 0.8],
        "headroom": Range(low=1.0, high=1.8),
        "batch_share": [0.35, 0.5, 0.65, 0.8],
    }

    def __init__(self, known: Known, rng: np.random.Generator, batch_share: float = 0.5, **counting: Any):
        super().__init__(known, rng, **counting)
        self.batch_share = batch_share
        self._shares: Floats | None = None
        self._plans: dict[int, Floats] = {}

    def control(self, stations: Sequence[Station]) -> None:
        demand = self.demand()
        key = round(20 * demand)
        if key not in self._plans:
            self._plans[key] = self._planned(demand, stations)
        self._shares = self._plans[key]

    def _planned(self, demand: float, stations: Sequence[Station]) -> Floats:
        """Each level on each node at the largest batch that takes no longer than `batch_share` of the SLO."""
        known = self.known
        loads = []
        for work in known.works:
            fits = _largest(known, work, stations, self.batch_share * known.deadline_s)
            loads.append(fits or LevelLoad(str(work), ()))
        open_ = [i for i, load in enumerate(loads) if load.legs] or [int(np.argmax(rates(known, stations)))]
        loads = [loads[i] if loads[i].legs else level_load(known.works[i], stations, 1) for i in open_]
        quality = known.mean[open_][None]
        plan = solve(Problem(pools(stations, 1), tuple(loads), quality, np.array([demand]), FAR_S))
        shares = np.zeros(len(known.works))
        served = plan.served[0].clip(min=0.0)  # the solver leaves dust below zero
        shares[open_] = served / served.sum() if served.sum() > 1e-9 else 0.0
        if served.sum() <= 1e-9:  # nothing asked yet
            shares[open_[int(np.argmax(quality))]] = 1.0
        return shares

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        self._came += 1
        if self._shares is None:
            return self.known.safest_first[0]
        return int(self.rng.choice(len(self._shares), p=self._shares))


class Sommelier(Plain):
    """Sommelier (SIGMOD 2022), as Argus's authors use it: each worker goes to a cheaper variant by its own load."""

    name = "Sommelier-like"
    rule = "the node with the least backlog serves at one level less for each `step` of the SLO that its backlog lasts"
    space: ClassVar[dict[str, Any]] = {"step": Range(low=0.03, high=0.6, log=True)}

    def __init__(self, known: Known, rng: np.random.Generator, step: float = 0.2):
        super().__init__(known, rng)
        self.step = step

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        waits = [each.backlog_s / each.batch for each in stations if each.role == "edge"]
        if not waits:
            return self.known.safest_first[-1]
        line = _front(self.known, stations)
        down = int(min(waits) / (self.step * self.known.deadline_s))
        return line[min(down, len(line) - 1)]


class DiffServe(_Counting):
    """DiffServe (MLSys 2025): a cascade whose share of second passes follows the load."""

    name = "DiffServe-like"
    rule = (
        "first the `light` level; a discriminator (here the judge, which looks at the picture) sends the worst of them to the"
        " best level as far as its capacity reaches, by a threshold chosen every second"
    )
    space: ClassVar[dict[str, Any]] = {
        "light": [-1, -2, -3, -4],
        "weight": [0.2, 0.35, 0.5, 0.8],
        "headroom": Range(low=1.0, high=1.8),
        "reach": [0.5, 0.7, 0.85, 1.0],
    }

    def __init__(
        self, known: Known, rng: np.random.Generator, light: int = -1, reach: float = 0.85, **counting: Any
    ):  # fmt: skip
        """`light`: its place among the levels, the boldest is -1. `reach`: share of the capacity that is planned."""
        super().__init__(known, rng, **counting)
        self.light, self.heavy = known.safest_first[light], known.safest_first[0]
        self.reach = reach
        self.threshold = np.inf
        self._scores = np.sort(known.judged[:, self.light])
        self._heavy_s = 0.0

    def control(self, stations: Sequence[Station]) -> None:
        rate, demand = rates(self.known, stations), self.demand()
        left = max(0.0, 1 - demand / max(rate[self.light], 1e-9)) if self._same_node() else 1.0
        share = min(1.0, self.reach * left * rate[self.heavy] / max(demand, 1e-9))
        self.threshold = float(np.quantile(self._scores, share)) if share < 1 else np.inf
        loads = [level_load(self.known.works[self.heavy], stations, 1)]
        self._heavy_s = sum(min(leg.latency_s.values(), default=0.0) for leg in loads[0].legs)

    def _same_node(self) -> bool:
        """Whether both levels use edges."""
        return any(member == "large" for member, _ in self.known.works[self.light].legs)

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        self._came += 1
        return self.light

    def again(self, asked: Asked, level: int, quality: float, left_s: float) -> int | None:
        if level != self.light or quality >= self.threshold or left_s < self._heavy_s:
            return None  # what could not be in time is not begun: the light picture is there
        return self.heavy


class Nirvana(Plain):
    """NIRVANA (NSDI 2024): a latent cache; how much is skipped is by similarity alone, whatever the load."""

    name = "NIRVANA-like"
    rule = (
        "full-cloud, started from the latent of an earlier prompt that spares most steps, at most `most` of T, among those that"
        " the family's thresholds of similarity allow; nothing depends on the load"
    )
    space: ClassVar[dict[str, Any]] = {"most": [0.1, 0.2, 0.3, 0.4, 0.5]}
    starts = True

    def __init__(self, known: Known, rng: np.random.Generator, most: float = 0.5):
        super().__init__(known, rng)
        full = [i for i, work in enumerate(known.works) if work.program.mode == "full-cloud" and work.skipped]
        if not full:
            raise Unfit("NIRVANA-like needs levels that start from cached latents, and none was measured here")
        total = known.works[full[0]].program.legs[0].steps_total
        within = [i for i in full if known.works[i].skipped <= skip_of(most, total)]
        # a level allows every start up to its K, so the boldest holds the others
        self.level = max(within or full[:1], key=lambda i: known.works[i].skipped)

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        return self.level


def rates(known: Known, stations: Sequence[Station]) -> Floats:
    """(L,): requests a second that the nodes could do of each level alone, at their best batches."""
    found = []
    for work in known.works:
        load = level_load(work, stations, max((each.batch for each in stations), default=1))
        found.append(min((sum(1 / busy for busy in leg.busy_s.values()) for leg in load.legs), default=0.0))
    return np.array(found)


def _front(known: Known, stations: Sequence[Station]) -> list[int]:
    """Levels from the best on, each next one with a higher throughput than all before."""
    rate, line = rates(known, stations), list[int]()
    for level in known.safest_first:
        if not line or rate[level] > rate[line[-1]]:
            line.append(level)
    return line


def _largest(known: Known, work: Any, stations: Sequence[Station], within_s: float) -> LevelLoad | None:
    """The level's load at the largest batch whose fastest way takes no longer; None where not even a single one does."""
    best = None
    for batch in (1, 2, 4, 8, 16, 32):
        load = level_load(work, stations, batch)
        if sum(min(leg.latency_s.values(), default=np.inf) for leg in load.legs) <= within_s:
            best = load
    return best
