"""Refusals: counted by kind, and logged so that whoever causes them cannot fill the log."""

from __future__ import annotations

import logging
import time
from collections import Counter

log = logging.getLogger("relay.transport")


class Complaints:
    """`counts`: kind -> how often. Of each kind one line in `every_s` seconds, which says how many went before it."""

    def __init__(self, whose: str, every_s: float = 10.0):
        self.counts: Counter[str] = Counter()
        self._whose, self._every_s = whose, every_s
        self._next: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def add(self, kind: str, text: str) -> None:
        """`kind` is one of a few words of ours, never a peer's."""
        self.counts[kind] += 1
        now = time.monotonic()
        if now < self._next.get(kind, now):
            self._unsaid[kind] += 1
            return
        more = f" (and {self._unsaid[kind]} before it)" if self._unsaid[kind] else ""
        self._next[kind], self._unsaid[kind] = now + self._every_s, 0
        log.warning("%s: %s%s", self._whose, " ".join(text.split())[:500], more)
