"""RouteT2I's measure of "which mode draws this prompt better" (arXiv 2411.13787, Problem Formulation).

    D_i = sigmoid((q(I_e, m_i) - q(I_c, m_i)) / (Gamma |mu_i(I_e) - mu_i(I_c)|))        in 0..1, 1/2: alike
    PRS = sum_i w_i D_i                                                                 > 1/2: the edge's is better

The paper does not say Gamma and w_i. Here w_i = 1/M unless said otherwise, and Gamma is chosen on validation prompts
(experiments.training.router). Two cases it does not treat: a metric that does not apply to a prompt (nan) has D = 1/2,
so it speaks for nobody; and a gap |mu_i(e) - mu_i(c)| smaller than its own standard error is replaced by that, or a
metric on which the two members do not differ would decide alone, by its noise.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


def gap_scale(edge: Floats, cloud: Floats) -> Floats:
    """|mu_i(edge) - mu_i(cloud)| (M,) of qualities (N, M), not below its standard error (paired, over prompts)."""
    apart = edge - cloud
    count = np.maximum((~np.isnan(apart)).sum(axis=0), 1)
    error = np.nanstd(apart, axis=0) / np.sqrt(count)
    return np.maximum(np.maximum(np.abs(np.nanmean(apart, axis=0)), error), 1e-6)


def superiority(edge: Floats, cloud: Floats, scale: Floats, gamma: float) -> Floats:
    """D_i (N, M) of qualities (N, M): > 1/2 where the edge's is better, 1/2 where the metric does not apply."""
    d = sigmoid((edge - cloud) / (gamma * scale))
    return np.where(np.isnan(d), 0.5, d)


def prs(d: Floats, weights: Floats | None = None) -> Floats:
    """PRS (N,) of D (N, M)."""
    return d.mean(axis=-1) if weights is None else d @ (weights / weights.sum())
