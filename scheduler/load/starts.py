"""What cached starts are worth to a plan: how much of its K steps a level really spares, as it turns out.

A level that skips K steps is assigned before anybody knows whether a latent of a like prompt is there: the edge that walks
looks for one. Its *rate* is the share of K that is spared on average: 1 of a start at step K, a part of a start at an
earlier step, 0 of a miss, which costs the cold work. So what is expected of it lies on a line between both:

    work     = cold - rate x (cold - from K)
    quality  = cold - rate x (cold - from K)      a cached start never counts as better than its program from noise

Deadlines are another matter: a miss must keep them too, so the clock is the cold walk's (`Work.surest`).

Estimate: the mean over the starts that were assigned so far, of which the older ones are forgotten (`MEMORY`), drawn to
`GUESS` as if that had been seen `WEIGHT` times. The guess is on the bold side, since a level that nobody tries tells
nothing; what it costs is quality that a miss does not even lose, and time that the next plans know of. A request that the
plan put to such a level and that may not start from the cache counts as a miss: on average plans reckon with those too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from scheduler.load.expected import Work

GUESS, WEIGHT = 0.5, 10.0
MEMORY = 300.0  # starts
PARTS = 20  # plans are made for rates rounded to such parts: one that moves a little asks for no new plan


class Starts:
    """Rates of the levels that skip steps; `of`: levels, a cached one with its program's from noise among them."""

    def __init__(self, of: Sequence[Work]):
        self._first = tuple(of)
        noise = {str(work.program): i for i, work in enumerate(of) if not work.skipped}
        if lacking := [work for work in of if str(work.program) not in noise]:
            raise BadRequest(
                f"level {lacking[0]} needs its program's level from noise beside it: a miss is served by that"
            )
        self.noise = np.array([noise[str(work.program)] for work in of])  # (L,): where a miss ends up
        self.skipped = np.array([work.skipped for work in of])
        self.cached = np.flatnonzero(self.skipped)
        self._sum, self._count = np.zeros(len(of)), np.zeros(len(of))

    def observe(self, level: int, share: float) -> None:
        """A request that was put to this level began at this share of its K."""
        keep = 1 - 1 / MEMORY
        self._sum[level] = keep * self._sum[level] + min(max(share, 0.0), 1.0)
        self._count[level] = keep * self._count[level] + 1

    def rate(self, level: int) -> float:
        return float((GUESS * WEIGHT + self._sum[level]) / (WEIGHT + self._count[level]))

    def rates(self) -> tuple[float, ...]:
        """Of the cached levels, as plans take them; empty where there are none."""
        return tuple(round(PARTS * self.rate(int(i))) / PARTS for i in self.cached)

    def works(self, rates: Sequence[float]) -> tuple[Work, ...]:
        """The levels with what is expected of each."""
        found = list(self._first)
        for i, rate in zip(self.cached, rates, strict=True):
            found[i] = replace(found[i], rate=rate)
        return tuple(found)

    def bounded(self, quality: NDArray[np.float64]) -> NDArray[np.float64]:
        """Qualities (..., L), those of cached levels no better than from noise."""
        return np.minimum(quality, quality[..., self.noise]) if len(self.cached) else quality

    def expected(self, bounded: NDArray[np.float64], rates: Sequence[float]) -> NDArray[np.float64]:
        """Of (..., L) as `bounded` gives it."""
        if not len(self.cached):
            return bounded
        line = np.ones(bounded.shape[-1])
        line[self.cached] = rates
        cold = bounded[..., self.noise]
        return np.asarray(cold + line * (bounded - cold))
