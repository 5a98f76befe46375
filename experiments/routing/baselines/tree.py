"""A gradient-boosted tree on what a prompt says on its surface: no text encoder at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from experiments.routing.baselines.base import GAMMAS, Floats, asked, pair, prs_of
from experiments.routing.baselines.syntax import features, words
from experiments.routing.data import EDGE, RoutingData, Split
from experiments.routing.delta_p import worth_by
from relay.errors import BadRequest

VOCABULARY = 96  # most frequent words of the train prompts, counted each


@dataclass
class BoostedTree:
    """Regresses PRS on counts of syntax and of frequent words; for three ways, each mode's worth over the small member."""

    name = "boosted-tree"
    capped = True
    gamma: float = 1.0
    learning_rate: float = 0.1
    max_leaf_nodes: int = 15
    min_samples_leaf: int = 20
    l2_regularization: float = 0.0
    max_iter: int = 100
    SPACE: ClassVar[dict[str, Any]] = {
        "gamma": GAMMAS, "learning_rate": (0.02, 0.05, 0.1), "max_leaf_nodes": (4, 8, 15, 31),
        "min_samples_leaf": (5, 20, 50), "l2_regularization": (0.0, 1.0, 10.0), "max_iter": (50, 100, 200, 400),
    }  # fmt: skip

    def fit(self, data: RoutingData, seed: int) -> None:
        counted = Counter(word for prompt in data.train.prompts for word in set(words(prompt)))
        self._vocabulary = [word for word, _ in sorted(counted.items(), key=lambda kv: (-kv[1], kv[0]))[:VOCABULARY]]
        self._data, self._seed = data, seed
        self._modes: list[Any] | None = None
        self._prs = self._regressor().fit(self._read(data.train), prs_of(data, data.train, self.gamma))

    def score(self, split: Split) -> Floats:
        return self._prs.predict(self._read(split)).clip(0, 1)

    def values(self, split: Split) -> Floats:
        """(N, 3): each mode's predicted worth, in mean gaps over the small member's picture."""
        if self._modes is None:
            train, small = self._data.train, pair(self._data.train)[0]
            gap = self._data.gap()
            self._modes = [
                self._regressor().fit(
                    self._read(train), worth_by(train.quality[:, mode], small, gap, asked(self._data))
                )
                for mode in range(EDGE)
            ]
        read = self._read(split)
        return np.stack([*(model.predict(read) for model in self._modes), np.zeros(len(split))], axis=1)

    def _regressor(self) -> Any:
        try:
            from sklearn.ensemble import HistGradientBoostingRegressor
        except ImportError:
            raise BadRequest(
                "the boosted tree needs scikit-learn: pip install 'relay-inference[experiments]'"
            ) from None
        return HistGradientBoostingRegressor(
            learning_rate=self.learning_rate, max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=self.min_samples_leaf, l2_regularization=self.l2_regularization, max_iter=self.max_iter,
            max_features=0.5, early_stopping=False, random_state=self._seed,
        )  # fmt: skip

    def _read(self, split: Split) -> Floats:
        rows = []
        for prompt in split.prompts:
            said = Counter(words(prompt))
            rows.append([*features(prompt), *(said[word] for word in self._vocabulary)])
        return np.array(rows, dtype=float)
