"""How much longer nodes take than they said: what a curve taken alone on a machine does not know.

A node measures its steps when it starts. A machine that others use as well is slower from then on, and nobody says so:
admission that believes the curves then lets in several times what can be done in time, and all that was let in waits
as many times longer. So every stretch that ends tells, by the time that it spent on its node over what was expected when it
was given to it; one that has not ended tells as soon as it is later than that. Mean of the ratio's logarithm, quick to
rise, slow to fall; never below 1, since to expect less than was measured alone is to hope.

A node on which nothing lies forgets, so that after everything was refused something is let in again.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

LEAST_S = 0.25  # what is expected to take less counts as this: below, it is overheads that are compared
MOST = 32.0
RISE, FALL, REST = 0.25, 0.05, 0.1
GRAIN = 1.25  # lags are told in powers of this: plans are made for each


class Lags:
    """By node, 1: as it said."""

    def __init__(self) -> None:
        self._log: dict[str, float] = {}

    def observe(self, node: str, seconds: float, expected_s: float) -> None:
        """A stretch took, or has been taking, so long; `expected_s` by the node's own curve."""
        ratio = math.log(min(max(seconds / max(expected_s, LEAST_S), 1.0), MOST))
        before = self._log.get(node, 0.0)
        self._log[node] = before + (RISE if ratio > before else FALL) * (ratio - before)

    def rest(self, node: str) -> None:
        """A period in which nothing lay on it."""
        if node in self._log:
            self._log[node] *= 1 - REST

    def of(self, node: str) -> float:
        """1 where it is as it said, to within `GRAIN`."""
        return float(GRAIN ** int(self._log.get(node, 0.0) / math.log(GRAIN) + 1e-9))


class Overruns:
    """How far requests overrun what was predicted for them when they were placed, which lags (means) do not say: of the
    latest ones nine in ten took at most `factor` times as long. Time left is counted by it, so that who is let in at the
    brink is in time as often as that.

    A period in which nothing is open counts as one that kept its word, so that after a flood it is forgotten.
    """

    REACH, SHARE, LEAST = 64, 0.9, 8

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=self.REACH)
        self.factor = 1.0  # also where too few are known; read by every request, so worked out as requests end

    def observe(self, seconds: float, predicted_s: float) -> None:
        self._ratios.append(min(max(seconds / max(predicted_s, LEAST_S), 1.0), MOST))
        if len(self._ratios) >= self.LEAST:
            self.factor = float(np.quantile(self._ratios, self.SHARE))

    def rest(self) -> None:
        """A period in which nothing was open."""
        if self._ratios:
            self.observe(0.0, LEAST_S)
