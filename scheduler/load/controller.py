"""The decisions under load, every control period and every request. The same object in simulation and gateway: no clock.

    arrived    a request came, with its predicted quality at each level            (each request)
    control    demand estimated -> plan solved -> prices, shares                   (each period)
    allow      wanted level by prediction and prices -> shift to the plan's shares
               -> only what is expected to keep the deadline on the nodes as they are

`wanted` is the level whose predicted quality, less what its work costs at the plan's prices, is largest: what a prompt can
bear. Where all prompts that come would want otherwise than planned, `shift` moves them (Argus, arXiv 2511.06724): an excess
to the next safer level, a deficit pulls from the nearest safer one. Between two periods the nodes' queues say more than
any plan: a level that would end too late is not allowed, and where none would keep the deadline, nothing is.

Levels that begin from a cached latent are planned and chosen by what is expected of them, which every period learns
anew from what the starts of earlier ones spared (`starts`); without such levels nothing of that is there.

Without pressure (no price, nothing shed, the safest level in time) every level is allowed: nothing is changed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest
from scheduler.load.estimator import LoadEstimator
from scheduler.load.expected import Holding, Station, Work, ends_s, level_load
from scheduler.load.lag import Overruns
from scheduler.load.planning import best_plan, kind
from scheduler.load.settings import LoadSettings
from scheduler.load.shift import shift
from scheduler.load.solver import Plan
from scheduler.load.starts import Starts

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

FINE = 1.05  # demands within this factor share a plan
NOTHING = 1e-6  # of quality a request: the solver's tolerance
MOST_PLANS = 4096  # that are remembered
RECENT = 400  # prompts that say what is asked at present
SURGE, LEAST_SURGE = 1.25, 4  # times what was planned for; and requests


@dataclass(frozen=True)
class Allowed:
    """`level`: where the shift put the prompt, None where no level keeps its deadline. `levels`: what may serve it, by
    index. `ends_s`: when each level would end if it were placed now. `pressed`: whether anything was held back."""

    level: int | None
    levels: tuple[int, ...]
    ends_s: tuple[float, ...]
    pressed: bool
    wanted: int | None = None


@dataclass(frozen=True)
class Asking:
    """What a plan is asked for: nodes, recent prompts' predictions (N, L), requests a second of each class."""

    stations: tuple[Station, ...]
    asked: NDArray[np.float64]
    per_s: NDArray[np.float64]
    key: tuple[object, ...]


Found = tuple[Plan, int] | str  # a plan and its batch, or why there is none


class Controller:
    """`works`: the levels, `sample` (N, L): predicted quality of each level for prompts as they are expected, which says
    what is asked before enough has come. Levels are taken in the order of their mean quality, the safest first; the
    indices that callers give and get are those of `works`. `plans`: those that another controller of the same settings,
    levels and sample has solved; a simulation's runs share them."""

    def __init__(
        self, settings: LoadSettings, works: Sequence[Work], sample: ArrayLike, rng: np.random.Generator,
        plans: dict[tuple[object, ...], Found] | None = None,
    ):  # fmt: skip
        known = np.asarray(sample, float)
        if not works or known.ndim != 2 or known.shape[1] != len(works) or not len(known):
            raise BadRequest(f"{len(works)} levels need predicted qualities of some prompts at each of them")
        if not np.isfinite(known).all():
            raise BadRequest("a level's predicted quality is no number")
        self.settings, self.rng = settings, rng
        self.starts = Starts(works)
        self._rates = self.starts.rates()
        self.works = self.starts.works(self._rates)
        known = self.starts.bounded(known)
        self.estimator = LoadEstimator(settings.period_s, settings.rise, settings.fall, settings.arrivals_quantile)
        self.classes = min(settings.classes, len(known))
        bears = _bears(known)
        self._bounds = np.quantile(bears, np.arange(1, self.classes) / self.classes)
        of = np.searchsorted(self._bounds, bears, side="right")
        self._known = np.stack(
            [known[of == c].mean(0) if (of == c).any() else known.mean(0) for c in range(self.classes)]
            + [known.mean(0)]
        )  # (classes + 1, L), the last of all together
        self._expect()
        self._recent: deque[NDArray[np.float64]] = deque(known[-RECENT:], maxlen=RECENT)
        self._came = 0
        self._plans: dict[tuple[object, ...], Found] = {} if plans is None else plans
        self.overruns = Overruns()  # told by the caller, who has a clock, of each request that ends
        self.plan: Plan | None = None
        self.batch = 1  # the plan's
        self.cost: NDArray[np.float64] = np.zeros(len(works))  # quality that a level's work is worth elsewhere
        self.moves: NDArray[np.float64] = np.eye(len(works))
        self._work_s = np.zeros(len(works))
        self._worked: object = None  # the nodes that it was worked out for
        self.why_not = ""  # why there is no plan
        self.solved = 0  # plans made, not remembered

    # --- each request ---

    def arrived(self, quality: ArrayLike, count: int = 1) -> None:
        """A request came whose predicted quality at each level is (L,)."""
        self._came += count
        self._recent.append(self.starts.bounded(np.asarray(quality, float)))

    def started(self, level: int, share: float) -> None:
        """A request that was put to this level began at this share of the steps that it skips; 0 of a miss."""
        self.starts.observe(level, share)

    def allow(
        self, quality: ArrayLike, left_s: float, stations: Sequence[Station], among: Sequence[int] | None = None
    ) -> Allowed:  # fmt: skip
        """What may serve a prompt of this predicted quality (L,) that must have its picture in `left_s`, counted by how far the
        latest requests overran what was predicted. `among`: the levels that may serve it at all; a request that fixes its
        seed begins from no cached latent."""
        left_s /= self.overruns.factor
        predicted = self.starts.expected(self.starts.bounded(np.asarray(quality, float)), self._rates)
        open_ = np.zeros(len(self.works), bool)
        open_[list(range(len(self.works)) if among is None else among)] = True
        holding: Holding = {}
        ends = np.array([ends_s(work, stations, holding)[0] for work in self.works])
        in_time = (ends <= self.settings.margin * left_s) & open_
        if not in_time.any():  # the margin is for those who come next; one who would just be in time is not sent away
            in_time = (ends <= left_s) & open_
        told, safest = tuple(ends.tolist()), int(self.safest_first[open_[self.safest_first]][0])
        if not self.pressed and in_time[safest]:
            return Allowed(safest, tuple(np.flatnonzero(open_).tolist()), told, False)
        if not in_time.any():
            return Allowed(None, (), told, True)
        worth = np.where(open_, predicted - self.cost, -np.inf)
        wanted = int(worth.argmax())
        level = int(self.rng.choice(len(self.works), p=self.moves[wanted]))
        if not open_[level] and open_[self.starts.noise[level]]:
            self.started(level, 0.0)
        if not in_time[level]:
            level = int(np.where(in_time, worth, -np.inf).argmax())
        close = (predicted >= predicted[level] - self.settings.tolerance) & (self.cost <= self.cost[level] + 1e-12)
        close &= in_time & (self._work_s <= self._work_s[level] + 1e-12)
        close[level] = True
        return Allowed(level, tuple(np.flatnonzero(close).tolist()), told, True, wanted)

    @property
    def surged(self) -> bool:
        """More has come in this period than was planned for: to wait for its end would be to serve it by a plan for less."""
        return self._came > max(SURGE * self.demand * self.settings.period_s, LEAST_SURGE)

    # --- each period ---

    @property
    def pressed(self) -> bool:
        """Whether the plan holds anything back: somebody is shed, or a class is not served at its best level. A price alone
        says nothing: at a corner of the plan one may stand where nothing is lost."""
        if self.plan is None:
            return bool(self.why_not)
        served = self.plan.served.clip(min=0.0)
        lost = (served * (self.quality.max(1, keepdims=True) - self.quality)).sum()
        return bool(self.plan.shed.sum() > 1e-9 or lost > NOTHING * served.sum())

    @property
    def prices(self) -> dict[str, float]:
        """Node -> quality that a second of its time is worth; zero everywhere without pressure."""
        if self.plan is None:
            return {}
        return dict(self.plan.prices) if self.pressed else dict.fromkeys(self.plan.prices, 0.0)

    @property
    def demand(self) -> float:
        return self.estimator.demand

    def shares(self) -> NDArray[np.float64]:
        """Of the requests that are served, each level's (L,), as planned."""
        served = np.zeros(len(self.works)) if self.plan is None else self.plan.served.sum(0).clip(min=0.0)
        return np.asarray(served / served.sum()) if served.sum() > 1e-9 else np.zeros(len(self.works))

    def control(self, stations: Sequence[Station], over: bool = True) -> None:
        """The period is over (or what came in it `surged`): plan for the nodes that are there."""
        asking = self.begin(stations, over)
        self.finish(asking, self.known(asking) or self.solved_for(asking))

    def begin(self, stations: Sequence[Station], over: bool = True) -> Asking:
        """What the next plan must serve."""
        if over:
            self.estimator.observe(self._came)
            self._came = 0
        else:
            self.estimator.surge(self._came)
        asked = np.stack(tuple(self._recent))
        of = np.searchsorted(self._bounds, _bears(asked), side="right")
        if (rates := self.starts.rates()) != self._rates:
            self._rates, self.works = rates, self.starts.works(rates)
            self._expect()
        # in whole classes: as they were made, one each; finer and the chance of the draw would ask for plans of its own
        parts = np.round(self.classes * np.bincount(of, minlength=self.classes) / len(asked)).astype(int)
        demand = self.demand
        bucket = math.ceil(math.log(demand) / math.log(FINE)) if demand > 0 else None
        fleet = tuple(map(kind, stations))
        per_s = parts / max(parts.sum(), 1) * (FINE**bucket if bucket is not None else 0.0)
        asked = self.starts.expected(asked, self._rates)
        return Asking(tuple(stations), asked, per_s, (fleet, bucket, *parts.tolist(), *self._rates))

    def known(self, asking: Asking) -> Found | None:
        """What was solved for the same before."""
        return self._plans.get(asking.key)

    def finish(self, asking: Asking, found: Found) -> None:
        """From now on this plan holds."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[asking.key] = found
        if (worked := (asking.key[0], self._rates)) != self._worked:
            self._worked, self._work_s = worked, self._mean_work(asking.stations)
        if isinstance(found, str):
            self.plan, self.why_not = None, found
            self.cost, self.moves = np.zeros(len(self.works)), np.eye(len(self.works))
            return
        (self.plan, self.batch), self.why_not = found, ""
        self.cost = self._costs(asking.stations)
        self.moves = self._shifted(asking.asked)

    def solved_for(self, asking: Asking) -> Found:
        """The best plan, or why there is none. Takes up to some tenths of a second, and may run in another thread."""
        self.solved += 1
        try:
            return best_plan(asking.stations, self.works, self.quality, asking.per_s, self.settings, self.batch)
        except BadRequest as error:
            return str(error)

    def _expect(self) -> None:
        """Expected quality of each class (classes, L), and levels from the safest on; from noise before a cached start."""
        *each, mean = self.starts.expected(self._known, self._rates)
        self.quality = np.stack(each)
        self.safest_first = np.lexsort((self.starts.skipped, -mean))

    def _costs(self, stations: Sequence[Station]) -> NDArray[np.float64]:
        """(L,): each leg's work at the prices of the node that does it cheapest; what nobody can do costs all."""
        prices, found = self.prices, np.zeros(len(self.works))
        holding: Holding = {}
        for i, work in enumerate(self.works):
            load = level_load(work, stations, self.batch, holding)
            for leg in load.legs:
                found[i] += min((prices.get(name, 0.0) * busy for name, busy in leg.busy_s.items()), default=1.0)
        return found

    def _mean_work(self, stations: Sequence[Station]) -> NDArray[np.float64]:
        """(L,): seconds of nodes' time, mean over the nodes that could do each leg."""
        found, most = np.zeros(len(self.works)), max((each.batch for each in stations), default=1)
        holding: Holding = {}
        for i, work in enumerate(self.works):
            for leg in level_load(work, stations, most, holding).legs:
                found[i] += float(np.mean(list(leg.busy_s.values()))) if leg.busy_s else 0.0
        return found

    def _shifted(self, asked: NDArray[np.float64]) -> NDArray[np.float64]:
        """(L, L): from the level that a prompt wants to where it is served, by the levels' own indices."""
        assert self.plan is not None
        planned = self.shares()
        if not planned.sum():
            return np.eye(len(self.works))
        line = self.safest_first
        wanted = np.bincount((asked - self.cost).argmax(1), minlength=len(self.works)) / len(asked)
        moved = np.zeros((len(line), len(line)))
        moved[np.ix_(line, line)] = shift(wanted[line], planned[line]).clip(min=0.0)
        return moved / moved.sum(1, keepdims=True)


def _bears(quality: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much a prompt loses by less work, on average over the levels (N,): what classes are made of."""
    return np.asarray(quality.max(1) - quality.mean(1))
