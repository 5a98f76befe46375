"""Draw one action from a distribution, so that the probability in the log is the one that was drawn with."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from scheduler.policy import Action, Decision

if TYPE_CHECKING:
    import numpy as np

_SESSION, _NUMBERS = secrets.token_hex(4), itertools.count(1)


def new_decision_id() -> str:
    """A name for a decision that no other one of this process has, nor of any other in all likelihood."""
    return f"{_SESSION}-{next(_NUMBERS)}"


def normalised(probabilities: Any) -> np.ndarray:
    """Probabilities (A,) as float64 of sum 1; BadRequest where they are none."""
    import numpy as np

    p = np.asarray(probabilities, np.float64)
    total = p.sum()
    if not (np.isfinite(total) and total > 0 and p.min() >= 0):
        raise BadRequest(f"not a distribution over actions: {p.tolist()[:8]}")
    return p / total


def draw(
    policy: str, actions: Sequence[Action], probabilities: Any, rng: np.random.Generator, **notes: Any
) -> tuple[int, Decision]:
    """One action's index, drawn by `probabilities` (A,), and the decision that says so."""
    p = normalised(probabilities)
    edges = p.cumsum()
    index = int(edges.searchsorted(rng.random() * edges[-1], side="right"))
    return index, decided(policy, actions, p, index, **notes)


def decided(policy: str, actions: Sequence[Action], p: np.ndarray, index: int, **notes: Any) -> Decision:
    """The decision for `actions[index]`, chosen by the distribution `p`."""
    return Decision(
        action=actions[index],
        probability=float(p[index]),
        policy=policy,
        actions=len(actions),
        notes=notes,
        id=new_decision_id(),
        distribution=tuple(p.tolist()),
    )


def certain(policy: str, actions: Sequence[Action], index: int, **notes: Any) -> Decision:
    """The decision of a policy that leaves nothing to chance."""
    return Decision(
        action=actions[index],
        probability=1.0,
        policy=policy,
        actions=len(actions),
        notes=notes,
        id=new_decision_id(),
        distribution=one_hot(len(actions), index),
    )


def one_hot(count: int, index: int) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(count))
