"""Means with bootstrap intervals, and the share of the gap closed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 2000


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % percentile-bootstrap interval over prompts."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(data), size=(ROUNDS, len(data)))
    low, high = np.quantile(data[draws].mean(1), [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 of a single value, which says nothing of it."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def gap_closed(
    relay: Sequence[float], small: Sequence[float], large: Sequence[float]
) -> tuple[float, float, float] | None:
    """(relay - small) / (large - small) with a paired bootstrap interval; None where the gap itself is not clear of zero.

    The honest companion of "x % of the large member's score": a ratio near 1 means little where the small member
    is near 1 too.
    """
    r, s, g = (np.asarray(v, dtype=float) for v in (relay, small, large))
    draws = np.random.default_rng(0).integers(len(r), size=(ROUNDS, len(r)))
    gaps = (g - s)[draws].mean(1)
    if np.quantile(gaps, 0.025) <= 0:
        return None
    shares = (r - s)[draws].mean(1)[gaps > 0] / gaps[gaps > 0]  # of forty draws at most one has none
    low, high = np.quantile(shares, [0.025, 0.975])
    return float((r - s).mean() / (g - s).mean()), float(low), float(high)
