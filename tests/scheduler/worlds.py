"""Small worlds that policies decide in: nodes, programs, actions, and a bandit problem whose best arms are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from relay.program import Leg, Program
from scheduler.policy import Action, Context, Decision, NodeState

CURVES = {
    "mini-sd3": {"large": {1: 0.02, 4: 0.05}, "small": {1: 0.005, 4: 0.012}},
    "mini-sdxl": {"large": {1: 0.03}, "small": {1: 0.009}},
}
PROMPTS = (
    "a red circle",
    'the word "CAT" in red on a white background',
    "a large red heart at the top left, two small blue dotted circles and a green star at the bottom, on a yellow background",
)


def program(family: str = "mini-sd3", s: int = 10, small: int | None = None, total: int = 28) -> Program:
    """s steps of the large member, then `small` of the small one; s = T is full-cloud, s = 0 edge-only."""
    n = total - s if small is None else small
    if s == total:
        return Program(family, (Leg("large", total, 0, total),), "exact", (4.5,))
    if s == 0:
        return Program(family, (Leg("small", total, 0, total),), "exact", (4.5,))
    return Program(family, (Leg("large", total, 0, s), Leg("small", n + s, s, n + s)), "exact", (4.5, 4.5))


def node(name: str, **facts: Any) -> NodeState:
    role = "device" if name.startswith("phone") else "edge"
    mine = {f: {m: c for m, c in members.items() if role == "edge" or m == "small"} for f, members in CURVES.items()}
    return NodeState(**{"name": name, "role": role, "curves": mine, "batch": 4} | facts)


def context(job: str = "job", prompt: str = PROMPTS[0], nodes: tuple[NodeState, ...] = (), **facts: Any) -> Context:
    some = nodes or (node("edge-1"), node("phone-1", battery=0.5, round_trip_s=0.03, bytes_per_s=1e6))
    sizes = {"mini-sd3": 20_000, "mini-sdxl": 5_000}
    facts = {"latent_bytes": sizes, "image_bytes": dict.fromkeys(sizes, 90_000)} | facts
    return Context(job=job, prompt=prompt, nodes={each.name: each for each in some}, **facts)


def actions(
    programs: list[Program], edges: tuple[str, ...] = ("edge-1",), phones: tuple[str, ...] = ("phone-1",)
) -> list[Action]:
    """Every program on every pair of nodes."""
    found = []
    for each in programs:
        places: list[tuple[str, ...]] = [()]
        for leg in each.legs:
            places = [(*before, name) for before in places for name in (edges if leg.member == "large" else phones)]
        found += [Action(each, names) for names in places]
    return found


ARMS = [program("mini-sd3", 28), program("mini-sd3", 10), program("mini-sd3", 0), program("mini-sdxl", 10)]


class Problem:
    """Four arms; which is best hangs on the preference and on the text flag, and rewards are noisy.

    Text wants full-cloud of mini-sd3; else speed wants edge-only and quality wants the mini-sdxl relay.
    """

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)
        self.actions = actions(ARMS)

    def contexts(self, count: int) -> Iterator[Context]:
        for i in range(count):
            prompt = PROMPTS[self.rng.integers(3)]
            yield context(f"job-{i}", prompt, preference=float(self.rng.integers(2)))

    def mean(self, told: Context, action: Action) -> float:
        best = 0 if '"' in told.prompt else 2 if told.preference > 0.5 else 3
        return 0.6 if action.program == ARMS[best] else -0.2

    def reward(self, told: Context, action: Action) -> float:
        return float(self.mean(told, action) + 0.1 * self.rng.standard_normal())


def play(policy: Any, problem: Problem, count: int, late: int = 0) -> tuple[float, list[Decision]]:
    """Mean true reward of the last third, and all decisions; each reward comes `late` decisions after its own."""
    values, decisions, waiting = [], [], []
    for told in problem.contexts(count):
        decision = policy.decide(told, problem.actions)
        decisions.append(decision)
        values.append(problem.mean(told, decision.action))
        waiting.append((decision, {"reward": problem.reward(told, decision.action)}))
        if len(waiting) > late:
            policy.learn(*waiting.pop(0))
    for each in waiting:
        policy.learn(*each)
    return float(np.mean(values[-count // 3 :])), decisions


UNIFORM = 0.25 * 0.6 - 0.75 * 0.2  # what drawing at random earns
