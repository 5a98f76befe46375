"""Each program and each set of nodes in turn: RISE's Round-Robin (arXiv 2606.17378, baselines)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.drawing import certain, one_hot
from scheduler.policy import Action, Context, Decision


class RoundRobin:
    """The action taken least often so far, the earlier one among equals; so nodes that come and go keep their turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def distribution(self, context: Context, actions: Sequence[Action]) -> tuple[float, ...]:
        return one_hot(len(actions), self._next(actions))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        index = self._next(actions)
        self.taken[str(actions[index])] += 1
        return certain(self.name, actions, index)

    def _next(self, actions: Sequence[Action]) -> int:
        return min(range(len(actions)), key=lambda i: self.taken[str(actions[i])])

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
