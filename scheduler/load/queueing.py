"""How long work waits for a node: the estimate that the solver plans with.

A node that shares its steps among a batch behaves like a few servers that each take a request for its whole time, so the
M/D/c queue is the picture. Mean wait after Sakasegawa (1977), whose formula is exact for M/M/1 and within a few per cent
of M/D/c with the factor 1/2 of constant service; the tail is exponential with the heavy-traffic rate of the same queue
(Kingman's: P{W > t} ~ P{W > 0} exp(-t P{W > 0} / E W)).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def mean_wait(busy: float, servers: int, service_s: float, variation: float = 0.5) -> float:
    """Seconds that a request waits on average; inf where the queue grows for ever.

    `busy`: share of all servers' time that is taken, 0..1. `variation`: (ca^2 + cs^2) / 2 of gaps and service times,
    1/2 for Poisson arrivals of equal work, more for bursts.
    """
    if busy <= 0:
        return 0.0
    if busy >= 1:
        return math.inf
    return variation * service_s * busy ** (math.sqrt(2 * (servers + 1)) - 1) / (servers * (1 - busy))


def wait_quantile(q: float, busy: float, servers: int, service_s: float, variation: float = 0.5) -> float:
    """Seconds that a share `q` of requests waits at most."""
    mean = mean_wait(busy, servers, service_s, variation)
    if not 0 < mean < math.inf:
        return mean
    waits = busy ** (math.sqrt(2 * (servers + 1)) - 1)  # P{W > 0}, by the same formula
    return max(0.0, mean / waits * math.log(waits / (1 - q))) if waits > 1 - q else 0.0


def most_busy(
    slack_s: float, servers: ArrayLike, service_s: ArrayLike, q: float = 0.99, variation: float = 0.5
) -> NDArray[np.float64]:
    """Of each node (N,), or of one: the largest share of its time that may be planned so that a share `q` of waits stays
    within `slack_s`. `wait_quantile` turned round, by halving."""
    count, service = np.asarray(servers, float), np.asarray(service_s, float)
    if slack_s <= 0:
        return np.zeros(service.shape)
    power = np.sqrt(2 * (count + 1)) - 1
    low, high = np.zeros(service.shape), np.ones(service.shape)
    for _ in range(40):
        middle = (low + high) / 2
        waits = middle**power  # P{W > 0}; the mean wait over it has no power in it
        tail = variation * service / (count * (1 - middle)) * np.log(np.maximum(waits / (1 - q), 1.0))
        fits = tail <= slack_s
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return low
