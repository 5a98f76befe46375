"""Each program and each set of nodes in turn: RISE's Round-Robin (arXiv 2606.17378, baselines)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.policy import Action, Context, Decision


class RoundRobin:
    """The action taken least often so far, the earlier one among equals; so nodes that come and go keep their turn."""

    name = "round-robin"

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        action = min(actions, key=lambda each: self.taken[str(each)])
        self.taken[str(action)] += 1
        return Decision(action=action, probability=1.0, policy=self.name, actions=len(actions))

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
