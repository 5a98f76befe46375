"""RouteT2I's dP: how much of the gap between the members a routing closes, metric by metric (arXiv 2411.13787, tables).

    dP = 100 * mean over metrics i of (q_i(route) - q_i(small)) / |q_i(large) - q_i(small)|

with q_i a mean over the prompts that metric i applies to (nan elsewhere). The bars make a metric on which the large
member is worse count against it: sending all prompts to the large member is 100 less 20 for each tenth metric it loses.
dP is a sum over the prompts that are sent, each with a worth of its own, so an exact best routing exists.

Arrays are (N prompts, M metrics); `worth` (N,) is in per cent of dP. A router's scores (N,) stand where PRS stands: the
large member gets the prompts with the lowest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from relay.errors import BadRequest

Array = np.ndarray
ROUNDS = 2000


def delta_p_of_means(route: Sequence[float], small: Sequence[float], large: Sequence[float]) -> float:
    """dP of a published row of means."""
    r, s, g = (np.asarray(v, dtype=float) for v in (route, small, large))
    return float(100 * ((r - s) / np.abs(g - s)).mean())


def column_means(values: Array) -> Array:
    """(N, M) to (M,), each over the prompts that the metric applies to; nan where it applies to none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=0)


def worth(quality: Array, small: Array, large: Array, gap: Array | None = None) -> Array:
    """What each prompt adds to dP when it gets `quality` instead of the small member's picture, (N,).

    `gap` (M,): |q_i(large) - q_i(small)| where it is known from more prompts than these; default: from these.
    """
    gap = np.abs(column_means(large) - column_means(small)) if gap is None else gap
    if not (gap > 0).all():
        raise BadRequest("a metric has no gap between the members, so no dP: leave it out")
    counted = np.maximum((~np.isnan(small)).sum(0), 1)
    return 100 * np.nan_to_num((quality - small) / (counted * gap)).mean(1)


def worth_by(quality: Array, small: Array, gap: Array, asked: Array) -> Array:
    """Each prompt's own worth (N,), whose mean over prompts is dP / 100, with given gaps (M,) and shares (M,) of prompts
    that a metric applies to: what a learner regresses, and what needs no other prompt of its split."""
    return np.nan_to_num((quality - small) / (gap * asked)).mean(1)


def delta_p(quality: Array, small: Array, large: Array) -> float:
    """dP of pictures of `quality`, whichever program drew each."""
    return float(worth(quality, small, large).sum())


def order(scores: Array, seed: int = 0) -> Array:
    """Prompts from the one that most needs the large member to the one that least does; ties in random order."""
    if not np.isfinite(scores).all():
        raise BadRequest("a router gave a score that is no number")
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    return shuffled[np.argsort(scores[shuffled], kind="stable")]


def send(scores: Array, share: float, seed: int = 0) -> Array:
    """(N,) bool: the prompts that go to the large member, exactly floor(share * N) of them."""
    sent = np.zeros(len(scores), dtype=bool)
    sent[order(scores, seed)[: math.floor(share * len(scores) + 1e-9)]] = True
    return sent


def tied(scores: Array, share: float) -> float:
    """Share of all prompts that stand at the threshold's own score, so that chance says which of them are sent."""
    count = math.floor(share * len(scores) + 1e-9)
    if not 0 < count < len(scores):
        return 0.0
    ranked = np.sort(scores)
    at = ranked[count - 1]
    return float((scores == at).mean()) if ranked[count] == at else 0.0


def curve(scores: Array, value: Array, seed: int = 0) -> Array:
    """dP when 0, 1, ... N prompts are sent, (N + 1,); `value` is each prompt's worth."""
    return np.concatenate([[0.0], np.cumsum(value[order(scores, seed)])])


def savings(dp: Array, targets: Sequence[float]) -> list[float | None]:
    """Per target, 100 * (1 - the smallest share sent that reaches it); None where no share does."""
    found: list[float | None] = []
    for target in targets:
        reached = np.flatnonzero(dp >= target)
        found.append(float(100 * (1 - reached[0] / (len(dp) - 1))) if len(reached) else None)
    return found


@dataclass(frozen=True)
class Gap:
    """A metric's means, and the large member's lead with its 95 % interval over prompts."""

    metric: str
    small: float
    large: float
    gap: float
    low: float
    high: float
    wins: float  # share of the prompts where the large member is ahead, of those where the two differ
    prompts: int

    @property
    def clear(self) -> bool:
        """Outside noise: the interval does not hold zero."""
        return self.low > 0 or self.high < 0


def gaps(metrics: Sequence[str], small: Array, large: Array, seed: int = 0) -> list[Gap]:
    """Each metric's gap between the members on the same prompts, with a paired bootstrap interval."""
    rng = np.random.default_rng(seed)
    found = []
    for i, metric in enumerate(metrics):
        there = ~np.isnan(small[:, i])
        d = (large - small)[there, i]
        if not len(d):
            raise BadRequest(f"no prompt has a score of the metric '{metric}'")
        draws = np.concatenate([d[rng.integers(len(d), size=(100, len(d)))].mean(1) for _ in range(ROUNDS // 100)])
        low, high = np.quantile(draws, [0.025, 0.975])
        differ = d[d != 0]
        wins = float((differ > 0).mean()) if len(differ) else 0.5
        means = float(small[there, i].mean()), float(large[there, i].mean())
        found.append(Gap(metric, *means, float(d.mean()), float(low), float(high), wins, len(d)))
    return found


def redraw(
    routed: Sequence[Array], small: Array, large: Array, other: Sequence[Array] | None = None, rounds: int = ROUNDS
) -> Array:
    """dP of routings redrawn over seeds and prompts together, (rounds,), the gaps anew in each draw.

    `routed`: for each seed the qualities (N, M) of what was chosen; with `other`, dP less that of the other routings
    on the same prompts.
    """
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(small), np.full(len(small), 1 / len(small)), size=rounds).astype(float)
    gap = counts @ np.nan_to_num(large - small)  # (rounds, M): sums over prompts, so the number of prompts cancels
    # a draw in which a metric has no gap or applies to no prompt leaves it out
    per_gap = np.where(gap != 0, 1 / np.abs(np.where(gap != 0, gap, 1)), np.nan)

    def of(several: Sequence[Array]) -> Array:
        found = np.stack([100 * np.nanmean(counts @ np.nan_to_num(one - small) * per_gap, axis=1) for one in several])
        return found[rng.integers(len(several), size=rounds), np.arange(rounds)]

    return of(routed) - of(other) if other is not None else of(routed)


def interval(draws: Array) -> tuple[float, float]:
    """95 % of the draws."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)
