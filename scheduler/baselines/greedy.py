"""A fixed handoff step, on whatever is done soonest: RISE's Greedy (arXiv 2606.17378, baselines)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relay.errors import BadRequest
from scheduler.action_table import table_of
from scheduler.drawing import certain, one_hot
from scheduler.policy import Action, Context, Decision


class Greedy:
    """Of the actions whose handoff s/T is nearest to `handoff`, of any family, the one with the least finish time.

    RISE does not say at which step its Greedy stands; its own "fast" setting is s = 15 of 50, hence the default.
    """

    name = "greedy"

    def __init__(self, handoff: float = 0.3):
        if not 0 <= handoff <= 1:
            raise BadRequest(f"policy greedy: handoff is a share of T, 0 to 1, not {handoff}")
        self.handoff = handoff

    def distribution(self, context: Context, actions: Sequence[Action]) -> tuple[float, ...]:
        return one_hot(len(actions), self._best(context, actions))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        return certain(self.name, actions, self._best(context, actions))

    def _best(self, context: Context, actions: Sequence[Action]) -> int:
        table = table_of(actions)
        apart = np.abs(table.member_steps[:, 0] - self.handoff)
        near = np.flatnonzero(apart <= apart.min() + 1e-9)
        return int(near[table.finish_s(context)[near].argmin()])

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""
