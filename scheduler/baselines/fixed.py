"""One program for every prompt, on the nodes that are done soonest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relay.errors import BadRequest
from scheduler.drawing import certain, one_hot
from scheduler.finish_time import finish_time
from scheduler.policy import Action, Context, Decision


class Fixed:
    """`program` in its text form; None: the first program on offer. BadRequest at a decision that does not offer it."""

    name = "fixed"

    def __init__(self, program: str | None = None):
        self.program = program

    def distribution(self, context: Context, actions: Sequence[Action]) -> tuple[float, ...]:
        return one_hot(len(actions), self._best(context, actions))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        return certain(self.name, actions, self._best(context, actions))

    def _best(self, context: Context, actions: Sequence[Action]) -> int:
        wanted = self.program or str(actions[0].program)
        mine = [i for i, action in enumerate(actions) if str(action.program) == wanted]
        if not mine:
            raise BadRequest(f"policy fixed: {wanted} is not on offer for this request")
        return min(mine, key=lambda i: finish_time(context, actions[i]))

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
