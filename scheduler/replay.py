"""What a policy would have earned on a log of another one's decisions: IPS, SNIPS and doubly robust, with intervals.

With w_i = pi(a_i | x_i) / p_i, the chance of the logged action under the policy over its logged probability:

    IPS     mean(w r)                                       unbiased where the log supports the policy
    SNIPS   sum(w r) / sum(w)                               a little biased, steadier (Swaminathan and Joachims 2015)
    DR      mean(q(x, pi) + w (r - q(x, a)))                q: a ridge regression on features (Dudik, Langford and Li 2011)

q is fitted on other folds than it is used on, so that DR stays unbiased whatever q is worth. Intervals are normal, from the
estimates' influence values, or percentiles of bootstrapped logs.

What this cannot see: contexts are taken as they came. Where a policy's own choices would have changed later queues, a log
does not know, and policies are to be compared in the simulated environment. A policy that learns is evaluated as it
stands: it does not learn on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from relay.errors import BadRequest
from scheduler.decision_log import Entry
from scheduler.features import Features, featurise
from scheduler.policy import Policy, Replayable

LEAST_ESS, LEAST_SUPPORT = 50.0, 0.8  # below, no figure is given
_Z = 1.959963984540054  # of a two-sided 95 % interval


class Estimate(msgspec.Struct, frozen=True):
    """Mean reward a decision, and its 95 % interval."""

    value: float
    low: float
    high: float


class Weighted(NamedTuple):
    """A log as an estimator sees it, each (n,): reward, importance weight; of the reward model: of the logged action, and
    mean over the policy's."""

    reward: np.ndarray
    weight: np.ndarray
    model_logged: np.ndarray
    model_policy: np.ndarray


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`logged`: what the logging policy itself earned. `support`: share of the policy's choices that the log could have
    made. `left_out`: decisions that say nothing, and why."""

    policy: str
    rows: int
    left_out: dict[str, int]
    effective: float
    support: float
    support_from: str
    weight_mean: float
    weight_most: float
    interval: str
    logged: Estimate
    ips: Estimate
    snips: Estimate
    dr: Estimate


def replay(
    entries: Iterable[Entry],
    policy: Policy,
    *,
    interval: str = "normal",
    folds: int = 5,
    seed: int = 0,
    time_scale_s: float = 1.0,
    least_ess: float = LEAST_ESS,
    least_support: float = LEAST_SUPPORT,
) -> Report:
    """Evaluate a policy on a log. BadRequest where it cannot be asked, or where the log says too little about it."""
    if not isinstance(policy, Replayable):
        raise BadRequest(f"policy {policy.name} cannot say its probabilities, so a log says nothing about it")
    used, left_out = _usable(entries)
    if len(used) < 2 * folds:
        raise BadRequest(
            f"the log has {len(used)} decisions with a reward that chance made ({_said(left_out)} left out)"
        )
    wanted = [np.asarray(policy.distribution(each.context, each.actions), float) for each in used]
    reward = np.array([each.reward for each in used], float)
    chance = np.array([p[each.chosen] for p, each in zip(wanted, used, strict=True)])
    weight = chance / np.array([each.probability for each in used])
    support, support_from = _support(used, wanted, weight)
    effective = effective_size(weight)
    if effective < least_ess or support < least_support:
        raise BadRequest(
            f"the log says too little about policy {policy.name}: effective sample size {effective:.1f} of {len(used)} "
            f"(at least {least_ess:g}), support {support:.0%} (at least {least_support:.0%}); log more decisions, or a "
            "policy that explores more"
        )
    logged, expected = _model(used, wanted, reward, folds, seed, time_scale_s)
    rows = Weighted(reward, weight, logged, expected)
    ips, snips, dr = bootstrap(rows, seed=seed) if interval == "bootstrap" else estimate(rows)
    return Report(
        policy=policy.name, rows=len(used), left_out=left_out, effective=effective, support=support,
        support_from=support_from, weight_mean=float(weight.mean()), weight_most=float(weight.max()), interval=interval,
        logged=_normal(float(reward.mean()), reward - reward.mean()), ips=ips, snips=snips, dr=dr,
    )  # fmt: skip


def estimate(rows: Weighted) -> tuple[Estimate, Estimate, Estimate]:
    """IPS, SNIPS and DR with normal intervals."""
    (ips, snips, dr), influences = _points(rows)
    return _normal(ips, influences[0]), _normal(snips, influences[1]), _normal(dr, influences[2])


def bootstrap(rows: Weighted, draws: int = 1000, seed: int = 0) -> tuple[Estimate, Estimate, Estimate]:
    """The same with intervals from `draws` logs drawn from the log; the reward model is kept as it is."""
    rng, table = np.random.default_rng(seed), np.stack(rows, axis=1)
    points, _ = _points(rows)
    found = []
    for _ in range(draws):
        drawn = table[rng.integers(len(table), size=len(table))]
        found.append(_points(Weighted(*drawn.T))[0])
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    ips, snips, dr = (Estimate(p, float(a), float(b)) for p, a, b in zip(points, low, high, strict=True))
    return ips, snips, dr


def effective_size(weight: np.ndarray) -> float:
    """(sum w)^2 / sum w^2: as many decisions of the policy's own would say as much (Kish)."""
    squares = float((weight**2).sum())
    return float(weight.sum()) ** 2 / squares if squares else 0.0


def _points(rows: Weighted) -> tuple[tuple[float, float, float], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The three estimates, and for each what every row adds to its deviation."""
    reward, weight, logged, expected = rows
    weighted = weight * reward
    robust = expected + weight * (reward - logged)
    total = weight.mean()
    ips, dr = float(weighted.mean()), float(robust.mean())
    snips = float(weighted.mean() / total) if total else 0.0
    apart = weight * (reward - snips) / total if total else np.zeros_like(weight)  # by the delta method
    return (ips, snips, dr), (weighted - ips, apart, robust - dr)


def _normal(value: float, influence: np.ndarray) -> Estimate:
    half = _Z * float(np.sqrt((influence**2).sum() / (len(influence) - 1) / len(influence)))
    return Estimate(value, value - half, value + half)


def _usable(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, int]]:
    """Decisions that chance made and whose reward is known; how many are not, by reason."""
    used, left_out = [], dict.fromkeys(("pinned", "fallback", "without a reward"), 0)
    for each in entries:
        mark = next((mark for mark in ("pinned", "fallback") if mark in each.marks), None)
        if mark:
            left_out[mark] += 1
        elif each.reward is None:
            left_out["without a reward"] += 1
        else:
            used.append(each)
    return used, left_out


def _support(used: Sequence[Entry], wanted: Sequence[np.ndarray], weight: np.ndarray) -> tuple[float, str]:
    """Share of the policy's choices that had a logged probability above 0.

    Exact where distributions were logged. Else from the weights, whose mean is that share in expectation: a log that could
    not have made a third of the choices gives weights of mean two thirds.
    """
    known = [(each.distribution, p) for each, p in zip(used, wanted, strict=True) if each.distribution is not None]
    if len(known) == len(used):
        return float(np.mean([p[np.array(logged) > 0].sum() for logged, p in known])), "logged distributions"
    return min(1.0, float(weight.mean())), "mean weight"


def _model(
    used: Sequence[Entry], wanted: Sequence[np.ndarray], reward: np.ndarray, folds: int, seed: int, time_scale_s: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of the reward model: its value of each logged action, and its mean over the policy's choices; by cross-fitting.

    Its inputs: a constant, the context, the action's features and labels, and the products of context and labels.
    """
    seen = [featurise(each.context, each.actions, time_scale_s) for each in used]
    number: dict[str, int] = {}
    for each in seen:
        for own in each.labels:
            for label in own:
                number.setdefault(label, len(number))
    inputs = np.array([_row(features, each.chosen, number) for features, each in zip(seen, used, strict=True)])
    logged, expected = np.empty(len(used)), np.empty(len(used))
    for rows, weights in cross_fit(inputs, reward, folds, seed):
        for i in rows:
            values = _values(seen[i], weights, number)
            logged[i], expected[i] = values[used[i].chosen], values @ wanted[i]
    return logged, expected


def cross_fit(
    inputs: np.ndarray, reward: np.ndarray, folds: int = 5, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of each fold, and the weights of a ridge regression on all other folds. `inputs` (n, D), first a constant."""
    fold = np.random.default_rng(seed).permutation(len(inputs)) % folds
    for k in range(folds):
        yield np.flatnonzero(fold == k), ridge(inputs[fold != k], reward[fold != k])


def ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Weights (D,) of a regularised linear regression; the first input is the constant and is not penalised."""
    gram = inputs.T @ inputs
    strength = np.full(len(gram), penalty)
    strength[0] = 1e-6
    gram[np.diag_indices_from(gram)] += strength
    return np.linalg.solve(gram, inputs.T @ targets)


def _row(features: Features, chosen: int, number: dict[str, int]) -> np.ndarray:
    """The inputs of one action, (1 + C + F + L + L C,)."""
    hot = np.zeros(len(number))
    hot[[number[label] for label in features.labels[chosen]]] = 1.0
    products = np.outer(hot, features.context).ravel()
    return np.concatenate([[1.0], features.context, features.actions[chosen], hot, products])


def _values(features: Features, weights: np.ndarray, number: dict[str, int]) -> np.ndarray:
    """Weights times the inputs of each action, (A,), without writing those out."""
    c, f, many = len(features.context), features.actions.shape[1], len(number)
    shared, of_action, of_label, products = np.split(weights, np.cumsum([1 + c, f, many]))
    each_label = of_label + products.reshape(many, c) @ features.context
    named = np.array([sum(each_label[number[label]] for label in own) for own in features.labels])
    return shared[0] + shared[1:] @ features.context + features.actions @ of_action + named


def _said(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in left_out.items() if count) or "none"


def as_dict(report: Report) -> dict[str, Any]:
    return msgspec.to_builtins(report)
