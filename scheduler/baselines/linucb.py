"""RISE's scheduler (arXiv 2606.17378): LinUCB with a count bonus, softmax over its scores, forced first pulls.

    score_a = theta_a . c + alpha sqrt(c' A_a^-1 c) + beta sqrt(ln(n + 1) / (1 + n_a))

c: RISE's eight numbers (`scheduler.features.rise_context`); an arm: a program, on the nodes that are done soonest; n, n_a:
decisions so far, and those for arm a. An arm is drawn by softmax(score / temperature), where arms with fewer than
`least_pulls` decisions are drawn first. alpha, beta and the temperature decay with n. Neither the paper nor its summaries
give their values: the defaults are ours, and experiments tune them on validation.

Counts go by decisions, not by rewards: with rewards that come late an arm would be forced again and again. Among several
arms to be forced each is as likely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relay.errors import BadRequest
from scheduler.baselines.arms import Offer, check_seen, observe, offer, over_actions, softmax
from scheduler.drawing import draw
from scheduler.pending import Pending
from scheduler.policy import Action, Context, Decision
from scheduler.reward import reward_in


class _Arm:
    def __init__(self, size: int, ridge: float):
        self.inverse = np.eye(size) / ridge  # A^-1, A = ridge I + sum c c'
        self.b = np.zeros(size)
        self.theta = np.zeros(size)
        self.pulls = 0

    def learn(self, c: np.ndarray, reward: float) -> None:
        seen = self.inverse @ c
        self.inverse -= np.outer(seen, seen) / (1 + c @ seen)  # Sherman-Morrison
        self.b += reward * c
        self.theta = self.inverse @ self.b


class LinUCB:
    """Ablations of the paper: `context="none"` sees a constant, `least_pulls=0` forces nothing. `seed`: of the draws."""

    name = "linucb"

    def __init__(
        self,
        alpha: float = 0.5,
        beta: float = 0.2,
        temperature: float = 0.2,
        decay: float = 0.998,
        temperature_decay: float = 0.995,
        least_temperature: float = 0.02,
        least_pulls: int = 3,
        ridge: float = 1.0,
        context: str = "rise",
        seed: int | None = None,
        pending: int = 4096,
    ):
        self._size = check_seen(self.name, context)
        if not (ridge > 0 and temperature > 0 and least_temperature > 0):
            raise BadRequest("policy linucb: ridge, temperature and least_temperature must be above 0")
        if not (0 < decay <= 1 and 0 < temperature_decay <= 1):
            raise BadRequest("policy linucb: decay and temperature_decay are factors a decision, above 0 and at most 1")
        self.alpha, self.beta, self.decay, self.ridge = alpha, beta, decay, ridge
        self.temperature, self.temperature_decay, self.least_temperature = (
            temperature,
            temperature_decay,
            least_temperature,
        )
        self.least_pulls, self.seen = least_pulls, context
        self.decisions = 0
        self._arms: dict[str, _Arm] = {}
        self._rng = np.random.default_rng(seed)
        self._pending: Pending[tuple[str, np.ndarray]] = Pending(pending)

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        arms = offer(context, actions)
        return over_actions(len(actions), arms, self._probabilities(observe(context, self.seen), arms)[0])

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        c, arms = observe(context, self.seen), offer(context, actions)
        p, forced = self._probabilities(c, arms)
        index, decision = draw(
            self.name, actions, over_actions(len(actions), arms, p), self._rng, **({"forced": True} if forced else {})
        )
        text = str(actions[index].program)
        self._arm(text).pulls += 1
        self.decisions += 1
        self._pending.put(decision.id, (text, c))
        return decision

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        if (reward := reward_in(outcome)) is not None and (kept := self._pending.take(decision.id)):
            text, c = kept
            self._arm(text).learn(c, reward)

    def _probabilities(self, c: np.ndarray, arms: Offer) -> tuple[np.ndarray, bool]:
        known = [self._arms.get(text) or _Arm(self._size, self.ridge) for text in arms.texts]
        starved = np.array([arm.pulls < self.least_pulls for arm in known])
        if starved.any():
            return starved / starved.sum(), True
        n, fading = self.decisions, self.decay**self.decisions
        scores = [
            arm.theta @ c
            + self.alpha * fading * np.sqrt(max(c @ arm.inverse @ c, 0.0))
            + self.beta * fading * np.sqrt(np.log(n + 1) / (1 + arm.pulls))
            for arm in known
        ]
        temperature = max(self.temperature * self.temperature_decay**n, self.least_temperature)
        return softmax(np.array(scores), temperature), False

    def _arm(self, text: str) -> _Arm:
        return self._arms.setdefault(text, _Arm(self._size, self.ridge))
