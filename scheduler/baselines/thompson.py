"""Linear Thompson sampling, an arm a program (Agrawal and Goyal, ICML 2013), with the probability of each arm in closed form.

Each arm's reward is linear in the context with Gaussian noise, so its value here and now is Gaussian, N(m_a, s_a^2). An arm
is to be drawn as often as its sampled value is the highest, which is

    P(a) = integral of phi(z) prod_{b != a} Phi((m_a + s_a z - m_b) / s_b) dz

The integral is summed over 256 quantiles of z, and the arm is drawn from these numbers: so what the log says is exactly
what was drawn with, which sampling the values themselves could not say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np

from relay.errors import BadRequest
from scheduler.baselines.arms import Offer, check_seen, observe, offer, over_actions
from scheduler.drawing import draw
from scheduler.pending import Pending
from scheduler.policy import Action, Context, Decision
from scheduler.reward import reward_in

_QUANTILES = 256


class _Arm:
    """Posterior of theta_a: precision and precision times mean."""

    def __init__(self, size: int, prior: float):
        self.precision = np.eye(size) * prior
        self.weighted = np.zeros(size)

    def value(self, c: np.ndarray) -> tuple[float, float]:
        """Mean and standard deviation of theta_a . c."""
        seen = np.linalg.solve(self.precision, c)
        return float(seen @ self.weighted), max(float(c @ seen), 1e-12) ** 0.5


class Thompson:
    """`noise`: standard deviation of a reward; `prior`: precision of each weight before anything was seen; `width`: factor
    on the posterior's spread; `forget`: factor a reward on what was learned before, 1 forgets nothing."""

    name = "thompson"

    def __init__(
        self,
        noise: float = 0.3,
        prior: float = 4.0,
        width: float = 1.0,
        forget: float = 1.0,
        context: str = "rise",
        seed: int | None = None,
        pending: int = 4096,
    ):
        self._size = check_seen(self.name, context) + 1
        if not (noise > 0 and prior > 0 and width > 0 and 0 < forget <= 1):
            raise BadRequest("policy thompson: noise, prior and width must be above 0, forget above 0 and at most 1")
        self.noise, self.prior, self.width, self.forget, self.seen = noise, prior, width, forget, context
        self._arms: dict[str, _Arm] = {}
        self._rng = np.random.default_rng(seed)
        self._pending: Pending[tuple[str, np.ndarray]] = Pending(pending)

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        arms = offer(context, actions)
        return over_actions(len(actions), arms, self._probabilities(self._see(context), arms))

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        c, arms = self._see(context), offer(context, actions)
        index, decision = draw(
            self.name, actions, over_actions(len(actions), arms, self._probabilities(c, arms)), self._rng
        )
        self._pending.put(decision.id, (str(actions[index].program), c))
        return decision

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        if (reward := reward_in(outcome)) is None or (kept := self._pending.take(decision.id)) is None:
            return
        text, c = kept
        arm = self._arms.setdefault(text, _Arm(self._size, self.prior))
        arm.precision *= self.forget
        arm.precision[np.diag_indices(self._size)] += (1 - self.forget) * self.prior
        arm.weighted *= self.forget
        arm.precision += np.outer(c, c) / self.noise**2
        arm.weighted += reward * c / self.noise**2

    def _see(self, context: Context) -> np.ndarray:
        return np.append(observe(context, self.seen), 1.0)

    def _probabilities(self, c: np.ndarray, arms: Offer) -> np.ndarray:
        values = [(self._arms.get(text) or _Arm(self._size, self.prior)).value(c) for text in arms.texts]
        mean, spread = np.array(values).T
        return chances(mean, spread * self.width)


def chances(mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """How often each of independent Gaussians (A,) is the highest, sum 1."""
    sampled = mean[:, None] + spread[:, None] * _quantiles()  # (A, Q)
    below = _normal_cdf((sampled[:, :, None] - mean) / spread)  # (A, Q, A): chance that b stays below this value of a
    below[np.arange(len(mean)), :, np.arange(len(mean))] = 1.0
    p = below.prod(axis=2).mean(axis=1)
    return p / p.sum()


@cache
def _quantiles() -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / _QUANTILES) for i in range(_QUANTILES)])


def _normal_cdf(x: np.ndarray) -> np.ndarray:
    """Phi, to 1e-7 (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(x))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-np.minimum(x * x, 1400.0) / 2) / np.sqrt(2 * np.pi) * series
    return np.where(x >= 0, 1 - tail, tail)
