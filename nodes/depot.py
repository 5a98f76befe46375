"""What waits on an edge for whoever walks on, within a bound of bytes: handoffs, embeddings, and checkpoints of other nodes."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from nodes.checkpoints import Checkpoints

EMBEDDINGS, CHECKPOINT = -1, -2  # "legs" under which a job's embeddings and its checkpoint wait


@dataclass
class Waiting:
    """Who asked: the identity of its connection, what that proves, and when."""

    identity: bytes
    key: str
    attempt: int
    asked: float = field(default_factory=time.monotonic)


class Depot:
    """Kept until their job is released; when the bound is met the oldest go, and whoever asks for one of those is told
    that it is not here, so that its job is placed again from a checkpoint.

    Only those get it whom the gateway named. A question may come before the latent, and before the gateway's word."""

    def __init__(self, limit_bytes: int = 512 << 20, checkpoint_bytes: int = 256 << 20):
        self.limit, self.bytes = limit_bytes, 0
        self.checkpoints = Checkpoints(checkpoint_bytes)
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._allowed: dict[tuple[str, int], set[str]] = {}
        self._waiting: dict[tuple[str, int], dict[bytes, Waiting]] = {}
        self._gone: set[tuple[str, int]] = set()

    def put(self, job: str, leg: int, data: bytes) -> None:
        self.drop(job, leg)
        self._kept[job, leg] = data
        self._gone.discard((job, leg))
        self.bytes += len(data)
        while self.bytes > self.limit and len(self._kept) > 1:
            oldest = next(iter(self._kept))
            self.drop(*oldest)
            self._gone.add(oldest)

    def keep(self, key: str, job: str, leg: int, index: int, data: bytes) -> bool:
        """A checkpoint of the node with this key. False where the job could not go on from it here: the gateway did not
        name that node (or the job has ended), there is a farther one, or no room."""
        if key not in self._allowed.get((job, CHECKPOINT), ()):
            return False
        here = self.checkpoints.get(job)
        return self.checkpoints.put(job, leg, index, data) or (here is not None and here[:2] == (leg, index))

    def get(self, job: str, leg: int) -> bytes | None:
        if leg == CHECKPOINT:
            kept = self.checkpoints.get(job)
            return None if kept is None else kept[2]
        return self._kept.get((job, leg))

    def wait(self, job: str, leg: int, waiting: Waiting) -> None:
        """Until `due` or `in_vain` says its name; whoever asks again still waits since the first time."""
        self._waiting.setdefault((job, leg), {}).setdefault(waiting.identity, waiting)

    def due(self, job: str, leg: int) -> list[Waiting]:
        """Those who may have what is here now; they wait no more."""
        if self.get(job, leg) is None:
            return []
        return self._take(job, leg, lambda waiting: waiting.key in self._allowed.get((job, leg), ()))

    def in_vain(self, seconds: float) -> list[tuple[str, int, Waiting]]:
        """Those who wait for what went, or have waited so long without the gateway's word; they wait no more."""
        now, found = time.monotonic(), []
        for job, leg in list(self._waiting):
            gone, allowed = self._is_gone(job, leg), self._allowed.get((job, leg), ())

            def vain(waiting: Waiting, gone: bool = gone, allowed: Collection[str] = allowed) -> bool:
                return gone or (waiting.key not in allowed and now - waiting.asked > seconds)

            found += [(job, leg, each) for each in self._take(job, leg, vain)]
        return found

    def _is_gone(self, job: str, leg: int) -> bool:
        """A checkpoint is only asked for after it was there."""
        return (job, leg) in self._gone or (leg == CHECKPOINT and self.get(job, leg) is None)

    def _take(self, job: str, leg: int, which: Callable[[Waiting], bool]) -> list[Waiting]:
        waiting = self._waiting.get((job, leg), {})
        found = [each for each in waiting.values() if which(each)]
        for each in found:
            del waiting[each.identity]
        if not waiting:
            self._waiting.pop((job, leg), None)
        return found

    def allow(self, job: str, leg: int, key: str) -> None:
        self._allowed.setdefault((job, leg), set()).add(key)

    def drop(self, job: str, leg: int) -> None:
        if (data := self._kept.pop((job, leg), None)) is not None:
            self.bytes -= len(data)

    def release(self, job: str) -> None:
        for each in [k for k in self._kept if k[0] == job]:
            self.drop(*each)
        for table in (self._allowed, self._waiting):
            for each in [k for k in table if k[0] == job]:
                table.pop(each)
        self._gone = {each for each in self._gone if each[0] != job}
        self.checkpoints.drop(job)

    def __len__(self) -> int:
        return len(self._kept)
