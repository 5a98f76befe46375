"""Handoffs that wait on an edge for whoever walks on, within a bound of bytes."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

EMBEDDINGS = -1  # "leg" under which a job's embeddings wait


@dataclass
class Waiting:
    """Who asked before it was there: the identity of its connection, and when."""

    identity: bytes
    attempt: int
    asked: float = field(default_factory=time.monotonic)


class Depot:
    """Kept until their job is released; when the bound is met the oldest go, and whoever asks for one of those is told
    that it is not here, so that its job is placed again from a checkpoint."""

    def __init__(self, limit_bytes: int = 512 << 20):
        self.limit, self.bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._allowed: dict[tuple[str, int], set[str]] = {}
        self._waiting: dict[tuple[str, int], dict[bytes, Waiting]] = {}

    def put(self, job: str, leg: int, data: bytes) -> list[Waiting]:
        """Keep it; those who waited for it."""
        self.drop(job, leg)
        self._kept[job, leg] = data
        self.bytes += len(data)
        while self.bytes > self.limit and len(self._kept) > 1:
            self.drop(*next(iter(self._kept)))
        return list(self._waiting.pop((job, leg), {}).values())

    def get(self, job: str, leg: int) -> bytes | None:
        return self._kept.get((job, leg))

    def wait(self, job: str, leg: int, identity: bytes, attempt: int) -> None:
        self._waiting.setdefault((job, leg), {})[identity] = Waiting(identity, attempt)

    def allow(self, job: str, leg: int, key: str) -> None:
        self._allowed.setdefault((job, leg), set()).add(key)

    def may_fetch(self, job: str, leg: int, key: str) -> bool | None:
        """None where nothing is known of such a job (yet)."""
        keys = self._allowed.get((job, leg))
        return None if keys is None else key in keys

    def drop(self, job: str, leg: int) -> None:
        if (data := self._kept.pop((job, leg), None)) is not None:
            self.bytes -= len(data)

    def release(self, job: str) -> None:
        for each in [k for k in self._kept if k[0] == job]:
            self.drop(*each)
        for table in (self._allowed, self._waiting):
            for each in [k for k in table if k[0] == job]:
                table.pop(each)

    def stale(self, seconds: float) -> list[tuple[str, int, Waiting]]:
        """Those who have waited that long for what nobody here works on; they are forgotten."""
        now, found = time.monotonic(), []
        for (job, leg), waiting in list(self._waiting.items()):
            if (job, leg) not in self._allowed:
                for each in [w for w in waiting.values() if now - w.asked > seconds]:
                    waiting.pop(each.identity)
                    found.append((job, leg, each))
        return found

    def __len__(self) -> int:
        return len(self._kept)
