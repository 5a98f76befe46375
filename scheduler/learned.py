"""The two learners as one policy: the router picks the mode, the bandit the program and the nodes of that mode.

    modes that could be served now -> router: mode, with its probability (budget or promise, some exploration)
    actions of that mode           -> bandit: action, with its probability
    logged probability = router x bandit

A prompt is read once (`prepare`, some milliseconds, in whatever thread the caller likes) and kept for its later
attempts. Where the router cannot speak, the bandit chooses among all modes and the decision says so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from scheduler.policy import Action, Context, Decision, Policy, Replayable

if TYPE_CHECKING:
    import numpy as np

    from scheduler.router.budget import Budget
    from scheduler.router.promise import Promise
    from scheduler.router.router import Prediction, Router, RouterDecision

_KEPT = 4096  # prompts read and decisions awaited


class Learned:
    """`explore`: how often the router takes another mode than the best, which later evaluation needs."""

    name = "learned"

    def __init__(
        self,
        bandit: Policy,
        router: Router | None = None,
        *,
        budget: Budget | None = None,
        promise: Promise | None = None,
        explore: float = 0.02,
        rng: np.random.Generator | None = None,
    ):
        import numpy as np

        self.bandit, self.router = bandit, router
        self.budget, self.promise, self.explore = budget, promise, explore
        self.rng = rng or np.random.default_rng()
        self.router_error = ""  # why the last prompt was not read
        self._read: OrderedDict[str, Prediction] = OrderedDict()
        self._inner: OrderedDict[str, Decision] = OrderedDict()

    def prepare(self, prompt: str) -> None:
        """Let the router read a prompt before its decision is due. Never raises: a router that fails is done without."""
        if self.router is None or prompt in self._read:
            return
        try:
            self._read[prompt] = self.router.predict([prompt])
            self.router_error = ""
        except Exception as error:  # whatever it is, requests are served without it
            self.router_error = f"{type(error).__name__}: {error}"
            return
        while len(self._read) > _KEPT:
            self._read.popitem(last=False)

    def reading(self, prompt: str) -> Prediction | None:
        """What the router said of a prompt that it has read."""
        return self._read.get(prompt)

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        modes = list(dict.fromkeys(action.program.mode for action in actions))
        routed = self._routed(context.prompt, modes, budget=budget_of(context.notes))
        if routed is None:
            return self._kept(context, self.bandit.decide(context, actions), None, len(actions))
        mine = [action for action in actions if action.program.mode == routed.mode]
        context = msgspec.structs.replace(context, notes={**context.notes, **quality_notes(routed)})
        return self._kept(context, self.bandit.decide(context, mine), routed, len(actions))

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        """The probability of each action (A,) if `decide` were called now. A log that keeps no prompts lets the router read
        nothing: then it is the bandit's alone."""
        import numpy as np

        asks = self.bandit
        assert isinstance(asks, Replayable)
        modes = list(dict.fromkeys(action.program.mode for action in actions))
        budget = budget_of(context.notes)
        routed = self._routed(context.prompt, modes, explore=0.0, budget=budget) if context.prompt else None
        if routed is None:
            return np.asarray(asks.distribution(context, actions))
        context = msgspec.structs.replace(context, notes={**context.notes, **quality_notes(routed)})
        p = np.zeros(len(actions))
        for mode in modes:
            mine = [i for i, action in enumerate(actions) if action.program.mode == mode]
            others = max(len(modes) - 1, 1)
            share = 1 - self.explore * (len(modes) > 1) if mode == routed.mode else self.explore / others
            if share > 0:
                p[mine] = share * np.asarray(asks.distribution(context, [actions[i] for i in mine]))
        return p

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        """The bandit learns what it chose among the mode's actions; the router is trained apart."""
        inner = self._inner.pop(decision.id, None)
        if inner is not None:
            self.bandit.learn(inner, outcome)

    def _routed(
        self, prompt: str, modes: Sequence[str], explore: float | None = None, budget: Budget | None = None
    ) -> RouterDecision | None:
        from scheduler.router.settings import MODES

        known = [mode for mode in modes if mode in MODES]
        self.prepare(prompt)
        said = self._read.get(prompt)
        if self.router is None or said is None or len(known) < len(modes):
            return None
        return self.router.choose(
            said,
            budget or self.budget,
            explore=self.explore if explore is None else explore,
            rng=self.rng,
            allowed=known,
            promise=self.promise if budget is None else None,  # under pressure what can be had is planned, not promised
        )

    def _kept(self, context: Context, inner: Decision, routed: RouterDecision | None, actions: int) -> Decision:
        """The decision of both, remembered by its id until its outcome is known."""
        self._inner[inner.id] = inner
        while len(self._inner) > _KEPT:
            self._inner.popitem(last=False)
        notes: dict[str, Any] = {
            **inner.notes,
            "bandit_probability": inner.probability,
            "features": dict(context.notes),
        }
        if routed is None:
            notes["router"] = {"error": self.router_error} if self.router_error else None
            return msgspec.structs.replace(inner, policy=self.name, notes=notes, actions=actions, distribution=None)
        notes["router"] = {
            "mode": routed.mode, "probability": routed.probability, "reason": routed.reason, "explored": routed.explored,
            "quality": routed.quality, "promise": routed.promise, "versions": routed.versions,
        }  # fmt: skip
        return msgspec.structs.replace(
            inner, policy=self.name, probability=routed.probability * inner.probability, notes=notes, actions=actions,
            distribution=None,
        )  # fmt: skip


def budget_of(notes: Mapping[str, float]) -> Budget | None:
    """The load plan's shares per mode as the router's budget, where a context tells them (nodes.gateway.load)."""
    if "share_full_cloud" not in notes:
        return None
    from scheduler.router.budget import Budget

    return Budget(full=notes["share_full_cloud"], relay=notes.get("share_relay", 0.0))


def quality_notes(routed: RouterDecision) -> dict[str, float]:
    """What the bandit's features take from the router: the quality that it expects of each mode."""
    return {f"quality_{mode.replace('-', '_')}": value for mode, value in routed.quality.items()}
