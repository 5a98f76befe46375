"""How many step at once: a member's seconds a step over batch size, as measured, kept true by what steps take.

A larger batch is worth its longer step only while it makes more images x steps a second, and where that ends is the
machine's affair: two CPU cores are full at 8 mini images, an accelerator perhaps not at 32. So the choice rests on the
curve t(B) and on no constant of ours:

    good    every B whose throughput B / t(B) is within 3 % of the best within the bound
    least   the smallest of them: beyond it a batch mostly makes its members' step longer
    B       of the good ones below 2 least, the one with the smallest round(n / B) t(B)

Of n waiting, B at a time, each waits floor(n / B) or ceil(n / B) rounds, so round(n / B) t(B) is what the one in the
middle waits for a step. Simulated with the curves of two cores, of a flat accelerator and a linear one, closed and
open arrivals, mixed and equal s: against `least` alone the median falls by up to 40 % where n is between 1.5 and 2
times `least`, and against taking all n by 10 to 50 %; throughput is the same. A flat curve takes everything, a linear
one takes walks one at a time.

A wrong or stale curve heals. Every step's time enters a running median of its batch size; the curve is then what was
given times measured / given, interpolated in log B between the sizes measured, so that a machine that became slower
all over keeps its curve's shape. Sizes that are never chosen would never be measured: a few steps in every 64 probe
twice or half the chosen size.

Knows neither tensors nor walks.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

import numpy as np

from relay.errors import BadRequest

NEARLY_BEST = 0.97  # of the best throughput
WINDOW = 9  # step times that a running median looks back on
TRUSTED = (
    3  # a size counts as measured after so many; the first step of a size is slow (kernels are chosen, memory taken)
)
FADES_S = 10.0  # half of how much slower a node was found is forgotten in so long without a step
PROBE_EVERY, PROBE_STEPS = 64, TRUSTED
UNKNOWN_S = 0.001  # before anything is known; short, so that a new shape is soon measured


def faded(slower: float, idle_s: float) -> float:
    """What is still believed of a node that was found slower and has not stepped for a while: one that is thought slow gets no
    work, and would never show that it no longer is."""
    return 1 + (slower - 1) * 0.5 ** (max(idle_s, 0.0) / FADES_S)


class StepTimes:
    """Seconds of one step at batch sizes 1 to `largest`.

    `curve`: batch size -> seconds of a step, linear between its sizes, not better than proportional above them; None
    knows nothing and is flat until measured. `weight`: what one image of this batch costs in images of the curve
    (other sizes, unguided). BadRequest on a curve that is no times.
    """

    def __init__(self, curve: Mapping[int, float] | None, largest: int, weight: float = 1.0):
        if curve and not all(size >= 1 and math.isfinite(s) and s > 0 for size, s in curve.items()):
            raise BadRequest(f"a step-time curve maps batch sizes to seconds above 0, not {dict(curve)}")
        self.sizes = np.arange(1, largest + 1)
        self._given = _read(curve, self.sizes * weight) if curve else np.full(largest, UNKNOWN_S)
        self._now = self._given
        self._taken: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._steps = 0

    def seconds(self, batch: int) -> float:
        """Of one step of `batch` images, as known now."""
        return float(self._now[batch - 1])

    def given(self, batch: int) -> float:
        """The same as the curve had it before anything was measured here."""
        return float(self._given[batch - 1])

    def observe(self, batch: int, seconds: float) -> None:
        """A step of `batch` images took `seconds`."""
        self._steps += 1
        taken = self._taken.setdefault(batch, deque(maxlen=WINDOW))
        taken.append(seconds)
        if len(taken) < TRUSTED:
            return
        self._medians[batch] = statistics.median(taken)
        measured = sorted(self._medians)
        off = [self._medians[size] / self._given[size - 1] for size in measured]
        self._now = self._given * np.interp(np.log(self.sizes), np.log(measured), off)

    def choose(self, waiting: int, bound: int) -> int:
        """How many of `waiting` take the next step, at most `bound` (up to `largest`)."""
        most = min(waiting, bound)
        throughput = self.sizes[:most] / self._now[:most]
        good = self.sizes[:most][throughput >= NEARLY_BEST * throughput.max()]
        good = good[good < 2 * good[0]]
        rounds = np.maximum(np.floor(waiting / good + 0.5), 1)
        best = int(good[np.argmin(rounds * self._now[good - 1])])
        turn, step = divmod(self._steps, PROBE_EVERY)
        if not turn or step >= PROBE_STEPS:
            return best
        return min(2 * best, most) if turn % 2 else max(best // 2, 1)


def _read(curve: Mapping[int, float], images: np.ndarray) -> np.ndarray:
    """Seconds at `images`, which need not be whole. Above the curve's sizes proportional: no gain that none measured."""
    sizes = np.array(sorted(curve), dtype=float)
    seconds = np.array([curve[int(size)] for size in sizes])
    first, last = sizes[0], sizes[-1]
    read = np.interp(images, sizes, seconds)
    read = np.where(images > last, seconds[-1] * images / last, read)
    if len(sizes) == 1:
        return read
    # Below them on the first line's way down, which may not go below what proportional images would take.
    slope = (seconds[1] - seconds[0]) / (sizes[1] - first)
    below = np.maximum(seconds[0] + slope * (images - first), seconds[0] * images / first)
    return np.where(images < first, below, read)
