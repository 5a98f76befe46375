"""Routers that learn nothing: chance, counting nouns, and the two oracles, which look at the answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.routing.baselines.base import Floats, pair, prs_of
from experiments.routing.baselines.syntax import noun_count
from experiments.routing.data import RoutingData, Split
from experiments.routing.delta_p import worth


@dataclass
class Random:
    name = "random"
    capped = False
    seed: int = 0

    def fit(self, data: RoutingData, seed: int) -> None:
        self.seed = seed

    def score(self, split: Split) -> Floats:
        return np.random.default_rng([self.seed, len(split)]).random(len(split))


@dataclass
class NounCount:
    """More nouns, more need of the large member (RouteT2I's own observation). Ties are many, and chance breaks them."""

    name = "noun-count"
    capped = False

    def fit(self, data: RoutingData, seed: int) -> None:
        pass

    def score(self, split: Split) -> Floats:
        return 1 / (1 + np.array([noun_count(prompt) for prompt in split.prompts], dtype=float))


@dataclass
class OraclePrs:
    """True PRS of the pictures themselves: RouteT2I's own label, so what its router would score if it never erred."""

    gamma: float = 1.0
    name = "oracle-prs"
    capped = True

    def fit(self, data: RoutingData, seed: int) -> None:
        self._data = data

    def score(self, split: Split) -> Floats:
        return prs_of(self._data, split, self.gamma)


@dataclass
class OracleDeltaP:
    """Each prompt's true worth in dP, which is the best order there is for dP: no router can be above it."""

    name = "oracle-dp"
    capped = False

    def fit(self, data: RoutingData, seed: int) -> None:
        pass

    def score(self, split: Split) -> Floats:
        small, large = pair(split)
        return -worth(large, small, large)
