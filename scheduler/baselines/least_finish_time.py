"""The action that is done soonest by the measured step times, backlogs and links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scheduler.finish_time import finish_time
from scheduler.policy import Action, Context, Decision


class LeastFinishTime:
    """With several programs on offer this is the fastest one, whatever it draws; for one program, the best nodes."""

    name = "least-finish-time"

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        seconds = [finish_time(context, action) for action in actions]
        best = min(range(len(actions)), key=seconds.__getitem__)
        notes = {"finish_s": seconds[best]}
        return Decision(action=actions[best], probability=1.0, policy=self.name, actions=len(actions), notes=notes)

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
