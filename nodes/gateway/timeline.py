"""What happens to jobs, as it happens: told to observers at once, on disk as soon as the ledger's thread takes it.

A full disk loses rows of a timeline, which are counted, and stops no job.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from nodes.gateway.jobs import Job
from nodes.gateway.ledger import Ledger, LedgerUnwritable
from nodes.tasks import Tasks

log = logging.getLogger("relay.gateway")
Observer = Callable[[str, str, dict[str, Any]], None]  # node, what, data


class Timeline:
    """`counters`: the dispatcher's, of which it keeps `unwritable`."""

    def __init__(self, ledger: Ledger, counters: Counter[str]):
        self.ledger, self.counters = ledger, counters
        self.observers: list[Observer] = []
        self._unwritten: list[tuple[str, float, str, str, dict[str, Any]]] = []
        self._tasks = Tasks()

    def note(self, job: str, node: str, what: str, **data: Any) -> None:
        """An event of a job: a row of its timeline. What is None is left out."""
        said = {k: v for k, v in data.items() if v is not None}
        self._unwritten.append((job, time.time(), node, what, said))
        self.observe(node, what, said)

    def observe(self, node: str, what: str, data: dict[str, Any]) -> None:
        """Something for the observers alone."""
        for observer in self.observers:
            observer(node, what, data)

    def placed(self, job: Job, left: str, waited_s: float) -> None:
        """A job was placed; the ledger is told whose results count, should this process end before them."""
        assert job.decision is not None
        self._tasks.start(self._quietly(self.ledger.placed(job.id, job.attempt, str(job.program), sorted(job.nodes()))))
        self.note(
            job.id, "gateway", "placed", nodes=list(job.decision.action.nodes), program=str(job.program),
            attempt=job.attempt, policy=job.decision.policy, probability=job.decision.probability, left=left,
            spent_s=waited_s, goes_on_from=str(job.began_at) if job.began_at else None,
        )  # fmt: skip

    def spill(self) -> None:
        """Begin to write what was noted."""
        if self._unwritten:
            self._tasks.start(self.flush())

    async def flush(self) -> None:
        """What was noted so far is on disk when this returns, as far as the disk takes it."""
        rows, self._unwritten = self._unwritten, []
        await self._quietly(self.ledger.note(rows))

    async def _quietly(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except LedgerUnwritable as error:
            self.counters["unwritable"] += 1
            log.warning("%s", error)
