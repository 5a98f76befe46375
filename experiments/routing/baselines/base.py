"""What the routers of the comparison share: the labels they learn from, and the settings that a search may change.

Every learner is a dataclass whose fields are its settings; `SPACE` says what the search tries for each. All have the
interface of `experiments.routing.data.PromptRouter`; those that can also say what each mode is worth have `values`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.routing.data import EDGE, FULL, RoutingData, Split
from scheduler.router.prs import gap_scale, prs, superiority

Floats = NDArray[np.float64]
GAMMAS = (1.0, 3.0, 10.0, 30.0)  # Gamma of PRS, which the paper does not say


class Learner(Protocol):
    """A router with settings to search."""

    SPACE: ClassVar[Mapping[str, Sequence[Any]]]
    name: str
    capped: bool

    def fit(self, data: RoutingData, seed: int) -> None: ...

    def score(self, split: Split) -> Floats: ...


def pair(split: Split) -> tuple[Floats, Floats]:
    """RouteT2I's two ways: qualities (N, M) of the edge (small member alone) and of the cloud (large member alone)."""
    return split.quality[:, EDGE], split.quality[:, FULL]


def asked(data: RoutingData) -> Floats:
    """The share of the train prompts that each metric applies to, (M,)."""
    return (~np.isnan(pair(data.train)[0])).mean(0)


def prs_of(data: RoutingData, split: Split, gamma: float) -> Floats:
    """PRS (N,) of a split, on the train prompts' scales.

    A metric that few prompts ask for weighs more on those, as in the token router's training: dP counts metrics alike.
    """
    return prs(superiority(*pair(split), gap_scale(*pair(data.train)), gamma), 1 / asked(data))


def pairwise_difference(labels: Floats) -> float:
    """Mean |y_j - y_k| over all pairs of prompts."""
    ordered = np.sort(labels)
    n = len(ordered)
    return float(2 * ((2 * np.arange(1, n + 1) - n - 1) * ordered).sum() / n**2)
