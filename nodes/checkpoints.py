"""Latents to go on from, at the gateway or at an edge that keeps them for others: the newest of each job, within a bound of
bytes; the oldest job's goes first."""

from __future__ import annotations

from collections import OrderedDict


class Checkpoints:
    def __init__(self, limit_bytes: int):
        self.limit = limit_bytes
        self.bytes = 0
        self._kept: OrderedDict[str, tuple[int, int, bytes]] = OrderedDict()

    def put(self, job: str, leg: int, index: int, data: bytes) -> bool:
        """False where an equal or farther one is there, or it is larger than the whole store."""
        before = self._kept.get(job)
        if (before and before[:2] >= (leg, index)) or len(data) > self.limit:
            return False
        self.drop(job)
        self._kept[job] = (leg, index, data)
        self.bytes += len(data)
        while self.bytes > self.limit:
            self.drop(next(iter(self._kept)))
        return job in self._kept

    def get(self, job: str) -> tuple[int, int, bytes] | None:
        return self._kept.get(job)

    def drop(self, job: str) -> None:
        if found := self._kept.pop(job, None):
            self.bytes -= len(found[2])

    def __len__(self) -> int:
        return len(self._kept)
