"""SAC for discrete actions (Christodoulou 2019, arXiv 1910.07207), a baseline of RISE's; stable-baselines3 has none.

Two networks estimate each arm's reward, a third is the policy: it maximises the lower estimate plus temperature times
entropy, and the temperature follows a target entropy. Every request is an episode of one step, as in the bandits, so an
estimate's target is the reward itself and no target networks are needed. A gradient step a reward, on a batch of what was
seen so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relay.errors import BadRequest
from scheduler.baselines.arms import Offer, Slots, check_seen, observe, offer, over_actions
from scheduler.drawing import draw, normalised
from scheduler.pending import Pending
from scheduler.policy import Action, Context, Decision
from scheduler.reward import reward_in


class SAC:
    """`entropy`: target, as a share of the highest, ln(arms on offer); `memory`: rewards kept to learn from again."""

    name = "sac"

    def __init__(
        self,
        arms: int = 32,
        learning_rate: float = 3e-3,
        batch: int = 64,
        memory: int = 2000,
        entropy: float = 0.2,
        temperature: float = 0.1,
        updates: int = 1,
        warm_up: int = 32,
        hidden: int = 64,
        context: str = "rise",
        seed: int | None = None,
        pending: int = 4096,
    ):
        if not (0 <= entropy < 1 and temperature > 0 and batch > 0 and memory >= batch):
            raise BadRequest("policy sac: entropy is 0 to below 1, temperature above 0, memory at least a batch")
        from scheduler.baselines.own_randomness import OwnRandomness

        self._size, self.seen, self._slots = check_seen(self.name, context), context, Slots(self.name, arms)
        self.arms, self.batch, self.updates, self.warm_up, self.entropy = arms, batch, updates, warm_up, entropy
        self._random = OwnRandomness(seed)
        self._rng = np.random.default_rng(seed)
        with self._random.here():
            self._build(hidden, learning_rate, temperature)
        self._contexts = np.zeros(
            (memory, self._size + arms), np.float32
        )  # the last `arms` numbers: which were on offer
        self._places = np.zeros(memory, np.int64)
        self._rewards = np.zeros(memory, np.float32)
        self._stored = 0
        self._pending: Pending[tuple[np.ndarray, int]] = Pending(pending)

    def _build(self, hidden: int, rate: float, temperature: float) -> None:
        import torch
        from torch import nn

        def network() -> nn.Module:
            size = self._size
            return nn.Sequential(
                nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, self.arms)
            )

        self._actor, self._critics = network(), nn.ModuleList([network(), network()])
        self._log_temperature = torch.tensor(math.log(temperature), requires_grad=True)
        self._optimisers = [
            torch.optim.Adam(parameters, lr=rate)
            for parameters in (self._critics.parameters(), self._actor.parameters(), [self._log_temperature])
        ]

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        arms = offer(context, actions)
        return over_actions(len(actions), arms, self._look(context, arms)[0])

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        arms = offer(context, actions)
        p, seen, places = self._look(context, arms)
        index, decision = draw(self.name, actions, over_actions(len(actions), arms, p), self._rng)
        self._pending.put(decision.id, (seen, int(places[np.flatnonzero(arms.indices == index)[0]])))
        return decision

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        if (reward := reward_in(outcome)) is None or (kept := self._pending.take(decision.id)) is None:
            return
        row = self._stored % len(self._rewards)
        self._contexts[row], self._places[row] = kept
        self._rewards[row] = reward
        self._stored += 1
        if self._stored >= self.warm_up:
            for _ in range(self.updates):
                self._step()

    def _look(self, context: Context, arms: Offer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Probabilities of the arms on offer, what the networks saw, the arms' places."""
        import torch

        places = self._slots.of(arms.texts)
        mask = np.zeros(self.arms, np.float32)
        mask[places] = 1.0
        seen = np.concatenate([observe(context, self.seen), mask]).astype(np.float32)
        with torch.no_grad():
            chances = self._policy(torch.from_numpy(seen[None])).exp()[0].numpy()
        return normalised(chances[places]), seen, places

    def _policy(self, seen: Any) -> Any:
        """ln of each arm's probability, (B, arms); -inf in effect where it is not on offer."""
        logits = self._actor(seen[:, : self._size]).masked_fill(seen[:, self._size :] < 0.5, -1e8)
        return logits.log_softmax(1)

    def _step(self) -> None:
        import torch

        rows = self._rng.integers(min(self._stored, len(self._rewards)), size=self.batch)
        seen, place, reward = (torch.from_numpy(each[rows]) for each in (self._contexts, self._places, self._rewards))
        on_critics, on_actor, on_temperature = self._optimisers
        estimates = [critic(seen[:, : self._size]) for critic in self._critics]
        loss = sum(((each.gather(1, place[:, None])[:, 0] - reward) ** 2).mean() for each in estimates)
        _descend(on_critics, loss)

        log_p = self._policy(seen)
        p, temperature = log_p.exp(), self._log_temperature.exp()
        least = torch.minimum(*estimates).detach()
        _descend(on_actor, (p * (temperature.detach() * log_p - least)).sum(1).mean())

        target = self.entropy * seen[:, self._size :].sum(1).clamp(min=1).log()
        above = (-(p * log_p).sum(1) - target).detach()  # entropy above its target lowers the temperature
        _descend(on_temperature, (self._log_temperature * above).mean())


def _descend(optimiser: Any, loss: Any) -> None:
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
