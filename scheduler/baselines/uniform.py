"""Any action, each as likely as any other: what fills a log that every other policy can be judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scheduler.drawing import draw
from scheduler.policy import Action, Context, Decision


class Uniform:
    """`seed`: None draws anew in each process."""

    name = "random"

    def __init__(self, seed: int | None = None):
        self._rng = np.random.default_rng(seed)

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        return np.full(len(actions), 1 / len(actions))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        return draw(self.name, actions, self.distribution(context, actions), self._rng)[1]

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
