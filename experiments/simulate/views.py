"""Policies that are kept from something, which is what an ablation takes away; and a router that reads a prompt once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from scheduler.policy import Action, Context, Decision, Policy


class Blind:
    """Sees one and the same context at every decision: no prompt, no wish, nodes at rest. What it learns of is true."""

    def __init__(self, policy: Policy):
        self.policy, self.name = policy, policy.name
        self._nodes: dict[str, Any] = {}

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        for name, state in context.nodes.items():
            if name not in self._nodes:
                self._nodes[name] = msgspec.structs.replace(
                    state, backlog_s=0.0, running=0, queued=0, battery=None, round_trip_s=None, bytes_per_s=None
                )
        seen = msgspec.structs.replace(
            context, prompt="", preference=0.5, deadline_s=None, prompt_features={}, notes={},
            nodes={name: self._nodes[name] for name in context.nodes},
        )  # fmt: skip
        return self.policy.decide(seen, actions)

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        self.policy.learn(decision, outcome)


class Frozen:
    """Decides and learns no more."""

    def __init__(self, policy: Policy):
        self.policy, self.name = policy, policy.name

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        return self.policy.decide(context, actions)

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """It does not."""


class Remembering:
    """A router (`scheduler.router.router.Router`) whose predictions are kept: a table asks for the same prompts again."""

    def __init__(self, router: Any):
        self._router = router
        self._kept: dict[str, Any] = {}

    def predict(self, prompts: Sequence[str]) -> Any:
        (prompt,) = prompts
        if prompt not in self._kept:
            self._kept[prompt] = self._router.predict(prompts)
        return self._kept[prompt]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._router, name)
