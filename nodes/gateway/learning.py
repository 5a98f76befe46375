"""The policy of a gateway out of its config: one that does not learn by name, or the learned one with its files.

policy: learned                        # all by default, or
policy:
  name: learned
  budget: {full: 0.25, relay: 0.5}     # shares of requests that full-cloud and relay may take; default: configs/router.yaml
  promise: {epsilon: 0.02, delta: 0.1} # or instead: how much quality may be lost to full-cloud
  router: true                         # false: the bandit chooses among all modes
  explore: 0.02                        # how often the router takes another mode
  bandit: {explore: squarecb, epsilon: 0.02}
  reward: my/reward.yaml               # default: configs/reward.yaml
  warm: true                           # where nothing was learned yet: true the shipped start, LOG a decision log, false nothing

Whatever of it is missing or damaged is said in the status; the gateway then serves with less, down to the fallback.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from nodes.deployment import LEARNED
from relay.errors import BadRequest, RelayError
from scheduler.baselines import load_policy

if TYPE_CHECKING:
    from nodes.deployment import GatewayConfig
    from nodes.gateway.deciding import Decider
    from scheduler.bandit import Bandit
    from scheduler.learned import Learned
    from scheduler.reward import Reward
    from scheduler.router.router import Router

log = logging.getLogger("relay.gateway")
MODEL = "bandit.model"  # in the gateway's store
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class PromiseConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    epsilon: Share
    delta: Annotated[float, msgspec.Meta(gt=0, lt=1)] | None = 0.1  # None: in expectation


class LearnedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    budget: dict[str, Any] | None = None
    promise: PromiseConfig | None = None
    router: bool = True
    explore: Share = 0.02
    bandit: dict[str, Any] = {}
    reward: str | None = None
    warm: bool | str = True
    seed: int | None = None


def read_learned(options: dict[str, Any]) -> LearnedConfig:
    """BadRequest names the key."""
    try:
        return msgspec.convert(options, LearnedConfig)
    except msgspec.ValidationError as error:
        raise BadRequest(f"policy learned: {error}") from None


def load_decider(decider: Decider, config: GatewayConfig, families: Sequence[str]) -> None:
    """The policy that the config names; BadRequest where there is none such. Takes seconds where models are loaded."""
    options = {"name": config.policy} if isinstance(config.policy, str) else dict(config.policy)
    name = str(options.pop("name", ""))
    if name == LEARNED:
        load_learned(decider, read_learned(options), families, Path(config.store))
    else:
        decider.policy = load_policy(name, **options)


def load_learned(decider: Decider, config: LearnedConfig, families: Sequence[str], store: Path) -> None:
    """Give the decider its reward and its policy; takes seconds. What fails is said in `decider.broken`."""
    from scheduler.reward import load_reward

    try:
        reward = load_reward(Path(config.reward) if config.reward else None)
        decider.reward = reward
        decider.model = store / MODEL
        learned, said = make_learned(config, families, reward, store / MODEL)
    except (RelayError, ImportError, OSError) as error:
        decider.broken = str(error)
        log.error("no learned policy: %s; %s decides", error, decider.fallback.name)
        return
    decider.broken = said
    decider.policy = learned
    log.info("policy learned: router %s, bandit %s", "for " + ", ".join(families) if learned.router else "none",
             learned.bandit.version)  # type: ignore[attr-defined]  # fmt: skip


def make_learned(
    config: LearnedConfig, families: Sequence[str], reward: Reward, model: Path | None
) -> tuple[Learned, str]:
    """The policy, and what it must do without. RelayError where there is no bandit to be had."""
    import numpy as np

    from scheduler.learned import Learned
    from scheduler.router.budget import Budget

    bandit = make_bandit(config, reward, model)
    router, said = _router(config, families)
    budget = promise = None
    if config.budget is not None:
        try:
            budget = msgspec.convert(config.budget, Budget)
        except msgspec.ValidationError as error:
            raise BadRequest(f"policy learned: budget: {error}") from None
    if router is not None and config.promise is not None:
        promise = router.promise(config.promise.epsilon, config.promise.delta, explore=config.explore, budget=budget)
    learned = Learned(
        bandit, router, budget=budget, promise=promise, explore=config.explore, rng=np.random.default_rng(config.seed)
    )
    return learned, said


def make_bandit(config: LearnedConfig, reward: Reward, model: Path | None) -> Bandit:
    """The bandit alone, with what it learned, if `model` is there, or else as `warm` says."""
    from scheduler.bandit import SHIPPED, Bandit, Logged
    from scheduler.decision_log import read_log

    def bandit_of(path: Path | None) -> Bandit:
        try:
            return Bandit(path=path, **options)
        except TypeError as error:
            raise BadRequest(f"policy learned: bandit: {error}") from None

    options = {"time_scale_s": reward.scales["seconds"], "seed": config.seed} | config.bandit
    if model is not None and model.exists():
        return bandit_of(model)
    if config.warm is True:
        try:
            return bandit_of(SHIPPED)
        except BadRequest as error:  # other options than it was learned with
            log.info("the bandit begins with nothing: %s", error)
    bandit = bandit_of(None)
    if not isinstance(config.warm, str):
        return bandit
    learned = bandit.warm_start(
        Logged(entry.context, entry.actions, entry.chosen, entry.probability, entry.reward)
        for entry in read_log(Path(config.warm))
        if entry.reward is not None and not entry.marks
    )
    log.info("the bandit begins with %d decisions of %s", learned, config.warm)
    return bandit


def _router(config: LearnedConfig, families: Sequence[str]) -> tuple[Router | None, str]:
    """The router of those families on offer that one was trained for; what is done without, and why."""
    if not config.router:
        return None, ""
    from scheduler.router.router import Router

    found: list[Any] = []
    lacking: list[str] = []
    for family in families:
        try:
            found += Router.load(family).trained
        except (RelayError, OSError) as error:
            lacking.append(str(error))
            log.warning("no router for %s: %s", family, error)
    if not found:
        return None, "no router, so the bandit chooses among all modes: " + "; ".join(lacking)
    return Router(found), "; ".join(lacking)
