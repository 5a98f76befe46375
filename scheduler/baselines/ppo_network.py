"""What `ppo.py` takes of stable-baselines3: its PPO over a network that masks the actions that are not on offer."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy


class _Masked(ActorCriticPolicy):
    """The last numbers of an observation say which actions are on offer, 1 or 0."""

    def get_distribution(self, obs: Any) -> Distribution:
        distribution: Any = super().get_distribution(obs)
        logits = distribution.distribution.logits
        absent = obs[:, -logits.shape[1] :] < 0.5
        return distribution.proba_distribution(action_logits=logits.masked_fill(absent, -1e8))

    def evaluate_actions(
        self, obs: Any, actions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class _Spaces(gym.Env):
    """The spaces alone: nobody steps it."""

    def __init__(self, size: int, arms: int):
        self.observation_space = gym.spaces.Box(0.0, 1.0, (size + arms,), np.float32)
        self.action_space = gym.spaces.Discrete(arms)


def make_ppo(size: int, arms: int, hidden: int, **options: Any) -> PPO:
    """stable-baselines3's PPO for `size` numbers of context and `arms` actions, to be fed by hand. Episodes of one step."""
    layers = {"net_arch": {"pi": [hidden, hidden], "vf": [hidden, hidden]}}
    model = PPO(_Masked, _Spaces(size, arms), device="cpu", policy_kwargs=layers, **options)
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.policy.set_training_mode(False)
    return model
