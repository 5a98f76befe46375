"""Arms: what RISE's scheduler chooses among, programs; their nodes are those that would be done soonest.

RISE's 11 arms are a family and a handoff step each, and its pools choose their own machine (arXiv 2606.17378, scheduler).
So policies over arms see one action a program, and a program that is not on offer now is no arm now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from relay.errors import BadRequest
from relay.program import check_choice
from scheduler.action_table import table_of
from scheduler.features import CONTEXT, RISE, context_features, rise_context
from scheduler.policy import Action, Context

Seen = Literal["rise", "all", "none"]
SEEN: dict[str, int] = {"rise": len(RISE), "all": len(CONTEXT), "none": 1}  # what of the context is seen -> numbers


class Offer(NamedTuple):
    """The arms of one moment: their programs' texts and, for each, the index of its soonest action."""

    texts: list[str]
    indices: np.ndarray


def offer(context: Context, actions: Sequence[Action]) -> Offer:
    table = table_of(actions)
    finish = table.finish_s(context)
    return Offer(
        [text for text, _ in table.arms], np.array([mine[finish[mine].argmin()] for _, mine in table.arms], np.intp)
    )


def check_seen(policy: str, seen: str) -> int:
    """How many numbers that is; BadRequest where there is no such kind."""
    check_choice(f"context of policy {policy}", seen, tuple(SEEN))
    return SEEN[seen]


def observe(context: Context, seen: str) -> np.ndarray:
    """The context as a vector: RISE's eight numbers, all of ours, or a constant."""
    if seen == "none":
        return np.ones(1)
    return rise_context(context) if seen == "rise" else np.array(context_features(context))


def over_actions(count: int, arms: Offer, probabilities: np.ndarray) -> np.ndarray:
    """A distribution over arms as one over all actions."""
    spread = np.zeros(count)
    spread[arms.indices] = probabilities
    return spread


def softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
    powers = np.exp((scores - scores.max()) / temperature)
    return powers / powers.sum()


class Slots:
    """Programs -> places in a network's output, given as they appear."""

    def __init__(self, policy: str, most: int):
        self.policy, self.most = policy, most
        self._places: dict[str, int] = {}

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """The places of these programs; BadRequest where there are more programs than places."""
        for text in texts:
            if text not in self._places:
                if len(self._places) == self.most:
                    raise BadRequest(f"policy {self.policy}: more than {self.most} programs; raise its option `arms`")
                self._places[text] = len(self._places)
        return np.array([self._places[text] for text in texts])
