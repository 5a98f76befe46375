"""Policies by name: those that do not learn, which a learned one must beat, RISE's and other learners, and our bandit."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from relay.errors import BadRequest
from scheduler.policy import Policy

# name -> where it is; nothing of it is imported before it is asked for: some need torch, one Vowpal Wabbit
_WHERE = {
    "fixed": "scheduler.baselines.fixed:Fixed",
    "random": "scheduler.baselines.uniform:Uniform",
    "round-robin": "scheduler.baselines.round_robin:RoundRobin",
    "least-finish-time": "scheduler.baselines.least_finish_time:LeastFinishTime",
    "greedy": "scheduler.baselines.greedy:Greedy",
    "linucb": "scheduler.baselines.linucb:LinUCB",
    "thompson": "scheduler.baselines.thompson:Thompson",
    "ppo": "scheduler.baselines.ppo:PPO",
    "sac": "scheduler.baselines.sac:SAC",
    "bandit": "scheduler.bandit:Bandit",
}
NAMES = tuple(_WHERE)


def load_policy(name: str, **options: Any) -> Policy:
    """A policy by name with its options; BadRequest where there is none, or where it needs a package that is not here."""
    if name not in _WHERE:
        raise BadRequest(f"unknown policy {name!r}: choose one of {', '.join(NAMES)}")
    module, _, kind = _WHERE[name].partition(":")
    maker = getattr(import_module(module), kind)
    try:
        return maker(**options)
    except TypeError as error:
        raise BadRequest(f"policy {name}: {error}") from None
