"""The simulated clock: what is due next happens next, and among what is due at once, what was said first."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """`now` in simulated seconds. An event is a call; it cannot be taken back, so whoever changes plans numbers them."""

    __slots__ = ("_heap", "_said", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._said = 0

    def at(self, time: float, act: Callable[..., object], *what: Any) -> None:
        """Call `act(*what)` at `time`, which is not before now."""
        self._said += 1
        heappush(self._heap, (time if time > self.now else self.now, self._said, act, what))

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Until nothing is due any more, or `until()` holds after an event."""
        heap = self._heap
        while heap:
            self.now, _, act, what = heappop(heap)
            act(*what)
            if until is not None and until():
                return
