"""One program for every prompt, on the nodes that are done soonest: RISE's Greedy (arXiv 2606.17378, baselines)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relay.errors import BadRequest
from scheduler.finish_time import finish_time
from scheduler.policy import Action, Context, Decision


class Fixed:
    """`program` in its text form; None: the first program on offer. BadRequest at a decision that does not offer it."""

    name = "fixed"

    def __init__(self, program: str | None = None):
        self.program = program

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        wanted = self.program or str(actions[0].program)
        mine = [action for action in actions if str(action.program) == wanted]
        if not mine:
            raise BadRequest(f"policy fixed: {wanted} is not on offer for this request")
        best = min(mine, key=lambda action: finish_time(context, action))
        return Decision(action=best, probability=1.0, policy=self.name, actions=len(actions))

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
