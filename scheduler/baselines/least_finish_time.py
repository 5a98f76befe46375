"""The action that is done soonest by the measured step times, backlogs and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.drawing import certain, one_hot
from scheduler.finish_time import finish_time
from scheduler.policy import Action, Context, Decision


class LeastFinishTime:
    """With several programs on offer this is the fastest one, whatever it draws; for one program, the best nodes."""

    name = "least-finish-time"

    def distribution(self, context: Context, actions: Sequence[Action]) -> tuple[float, ...]:
        return one_hot(len(actions), self._best(context, actions)[0])

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        best, seconds = self._best(context, actions)
        return certain(self.name, actions, best, finish_s=seconds)

    def _best(self, context: Context, actions: Sequence[Action]) -> tuple[int, float]:
        seconds = [finish_time(context, action) for action in actions]
        best = min(range(len(actions)), key=seconds.__getitem__)
        return best, seconds[best]

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
