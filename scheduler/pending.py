"""What a learner keeps of its decisions until their rewards come: late, out of turn, or never."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Pending(Generic[Kept]):
    """At most `most` decisions by id; the oldest go first, and `forgotten` counts them."""

    def __init__(self, most: int = 4096):
        self.most, self.forgotten = most, 0
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, name: str, what: Kept) -> None:
        self._kept[name] = what
        if len(self._kept) > self.most:
            self._kept.popitem(last=False)
            self.forgotten += 1

    def take(self, name: str) -> Kept | None:
        """What was kept, once; None where it is not here (any more): a reward that comes twice teaches once."""
        return self._kept.pop(name, None)
