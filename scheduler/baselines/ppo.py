"""PPO (Schulman et al. 2017), stable-baselines3's, learning from requests as they come: RISE's strongest baseline.

A gateway asks for decisions, it is no environment to be stepped; so stable-baselines3's network, roll-out buffer and loss
are used, and its loop is not. Every request is an episode of one step, as in the bandits: rewards come late and out of
turn, and what an action does to later queues is in nobody's reward. Its advantage is then reward - V(context).

A roll-out has at most 128 requests: with more it would hardly be trained at all within the 2,000 requests of RISE's table.
Programs are a padded discrete action; those that are not on offer are masked out, in choice and in loss alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from relay.errors import BadRequest
from scheduler.baselines.arms import Offer, Slots, check_seen, observe, offer, over_actions
from scheduler.drawing import draw, normalised
from scheduler.pending import Pending
from scheduler.policy import Action, Context, Decision
from scheduler.reward import reward_in

MOST_STEPS = 128


class PPO:
    """`steps`: requests a roll-out, 2 to 128; `arms`: most programs; the rest are stable-baselines3's options."""

    name = "ppo"

    def __init__(
        self,
        steps: int = 64,
        arms: int = 32,
        learning_rate: float = 3e-3,
        epochs: int = 10,
        batch: int = 32,
        clip_range: float = 0.2,
        entropy: float = 0.01,
        hidden: int = 64,
        context: str = "rise",
        seed: int | None = None,
        pending: int = 4096,
    ):
        if not 2 <= steps <= MOST_STEPS:
            raise BadRequest(f"policy ppo: steps, the requests of a roll-out, are 2 to {MOST_STEPS}, not {steps}")
        self._size, self.seen, self._slots = check_seen(self.name, context), context, Slots(self.name, arms)
        self.arms, self.steps, self.updates = arms, steps, 0
        try:
            from scheduler.baselines.ppo_network import make_ppo
        except ImportError:
            raise BadRequest("policy ppo needs stable-baselines3: pip install 'relay-inference[rl]'") from None
        from scheduler.baselines.own_randomness import OwnRandomness

        self._random = OwnRandomness(seed)
        self._rng = np.random.default_rng(seed)
        with self._random.here():
            self._model: Any = make_ppo(
                self._size, arms, hidden, n_steps=steps, learning_rate=learning_rate, n_epochs=epochs,
                batch_size=min(batch, steps), clip_range=clip_range, ent_coef=entropy,
            )  # fmt: skip
        self._pending: Pending[tuple[Any, ...]] = Pending(pending)

    def distribution(self, context: Context, actions: Sequence[Action]) -> np.ndarray:
        arms = offer(context, actions)
        return over_actions(len(actions), arms, self._look(context, arms)[0])

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        arms = offer(context, actions)
        p, seen, value, places = self._look(context, arms)
        index, decision = draw(self.name, actions, over_actions(len(actions), arms, p), self._rng)
        arm = int(np.flatnonzero(arms.indices == index)[0])
        self._pending.put(decision.id, (seen, places[arm], value, float(np.log(p[arm]))))
        return decision

    def learn(self, decision: Decision, outcome: Mapping[str, Any]) -> None:
        if (reward := reward_in(outcome)) is None or (kept := self._pending.take(decision.id)) is None:
            return
        import torch

        seen, place, value, log_probability = kept
        buffer = self._model.rollout_buffer
        buffer.add(
            seen[None], np.array([[place]]), np.array([reward], np.float32), np.ones(1, np.float32), value,
            torch.tensor([log_probability]),
        )  # fmt: skip
        if buffer.full:
            buffer.compute_returns_and_advantage(last_values=torch.zeros(1), dones=np.ones(1))
            with self._random.here():
                self._model.train()
            buffer.reset()
            self.updates += 1

    def _look(self, context: Context, arms: Offer) -> tuple[np.ndarray, np.ndarray, Any, np.ndarray]:
        """Probabilities of the arms on offer, what the network saw, its value, the arms' places."""
        import torch

        places = self._slots.of(arms.texts)
        mask = np.zeros(self.arms, np.float32)
        mask[places] = 1.0
        seen = np.concatenate([observe(context, self.seen), mask]).astype(np.float32)
        with torch.no_grad():
            observed = torch.from_numpy(seen[None])
            chances = self._model.policy.get_distribution(observed).distribution.probs[0].numpy()
            value = self._model.policy.predict_values(observed)[0]
        return normalised(chances[places]), seen, value, places
