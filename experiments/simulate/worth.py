"""What the simulation tells a reward (`scheduler.reward`) of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from experiments.simulate.scores import Cell
from experiments.simulate.world import Placed
from scheduler.policy import Context

Reward = Callable[[Mapping[str, Any]], float | None]


def known_of(context: Context, placed: Placed, seconds: float, scores: Cell, stage: str = "done") -> dict[str, Any]:
    """As `scheduler.reward.Reward.of` reads it. The battery is that of the device that works, when it was decided."""
    battery = context.nodes[placed.device].battery if placed.device is not None else None
    return {
        "stage": stage, "scores": scores, "seconds": seconds, "preference": context.preference,
        "prompt": context.prompt, "program": placed.program, "battery": battery,
    }  # fmt: skip


def parts_of(reward: Reward, known: Mapping[str, Any]) -> tuple[float | None, Mapping[str, float]]:
    """A reward's value and, where it tells them, its terms inside the tanh."""
    if (of := getattr(reward, "of", None)) is None:
        return reward(known), {}
    found = of(known)
    return found.value, found.terms
