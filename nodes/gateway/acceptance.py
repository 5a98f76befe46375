"""Accepting: a request's way from its words to the ledger; and what an earlier process had accepted, taken up again.

    plan -> what its key began already -> read by the router -> let in, or told when to come back -> ledger -> acknowledged

Work on it begins while the disk is at it: a job is acknowledged when it is on disk, so that the next process takes it up
whatever ends this one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec

from nodes.deployment import CacheConfig, GatewayConfig
from nodes.gateway.deciding import Decider
from nodes.gateway.jobs import Job
from nodes.gateway.ledger import Ledger, LedgerUnwritable
from nodes.gateway.load import LoadControl
from nodes.gateway.planner import Planner
from nodes.gateway.timeline import Timeline
from nodes.requests import ImageRequest, Refusal, new_id, new_seed, read_request
from relay.errors import BadRequest


class Acceptance:
    """`jobs`: those that have not ended, by id; what is accepted is entered there. `wake`: whoever places them is told.
    `retry_after`: seconds until there is room. `withdrawn`: told of a job that was entered and is none."""

    def __init__(
        self, config: GatewayConfig, cache: CacheConfig, ledger: Ledger, planner: Planner, decider: Decider,
        timeline: Timeline, jobs: dict[str, Job], counters: Counter[str], wake: asyncio.Event,
        retry_after: Callable[[], float], withdrawn: Callable[[Job], None],
    ):  # fmt: skip
        self.config, self.cache, self.ledger, self.planner, self.decider = config, cache, ledger, planner, decider
        self.timeline, self.jobs, self.counters, self.wake = timeline, jobs, counters, wake
        self.retry_after, self.withdrawn = retry_after, withdrawn
        self.load: LoadControl | None = None
        self._accepting: dict[tuple[str, str], asyncio.Future[Any]] = {}  # tenant, key -> its way to the disk

    async def restore(self, next_attempt: Callable[[], int]) -> int:
        """Take up what an earlier process had accepted and not ended; how many."""
        for kept in self.ledger.open_jobs():
            request = read_request(kept.body)
            left = (request.deadline_ms or self.config.deadline_s * 1000) / 1000 - kept.waited_s
            now = time.monotonic()
            try:
                planned = await self.planner.plan(request)
            except BadRequest as error:  # served before a change of the config, not any more
                await self.ledger.end(kept.id, "failed", error=str(error))
                continue
            job = Job(
                kept.id, kept.request, kept.number, kept.tenant, kept.seed, request, now - kept.waited_s, now + max(left, 0.0),
                list(planned.programs), next_attempt(), moved=now,
            )  # fmt: skip
            job.placed_on[kept.attempt] = set(kept.nodes)
            job.history.append("the gateway was restarted")
            self.jobs[job.id] = job
        self.wake.set()
        return len(self.jobs)

    async def submit(self, request: ImageRequest, tenant: str, key: str | None = None) -> tuple[str, list[str]]:
        """Request id and job ids, in the ledger when this returns. BadRequest or Refusal otherwise."""
        if request.cache and self.cache.scope == "off":
            raise BadRequest("cache: this deployment keeps no latents to start from; leave it out")
        planned = await self.planner.plan(request)
        request = msgspec.structs.replace(request, width=planned.width, height=planned.height)
        body = {k: v for k, v in msgspec.to_builtins(request).items() if v is not None}
        if key is not None and (earlier := await self._begun(tenant, key, body)) is not None:
            return earlier  # it is work already, so nothing is refused for want of room
        await self.planner.read(request, self._prepare)
        if len(self.jobs) + request.images > self.config.queue:
            raise Refusal("too many jobs are open", 429, self.retry_after())
        first = request.seed if request.seed is not None else new_seed()
        rid = new_id("req")
        jobs = [(new_id("job"), first + i) for i in range(request.images)]
        now = time.monotonic()
        deadline = now + (request.deadline_ms / 1000 if request.deadline_ms else self.config.deadline_s)
        work = self.load.admit(request, planned.programs, tenant) if self.load is not None else 0.0

        def enter() -> None:
            for number, (job_id, seed) in enumerate(jobs):
                self.jobs[job_id] = Job(
                    job_id, rid, number, tenant, seed, request, now, deadline, list(planned.programs), 0, moved=now
                )
                self.timeline.note(job_id, "gateway", "accepted")
                if self.load is not None:
                    self.load.taken(job_id, tenant, work)
            self.wake.set()

        # Not where a key may yet turn it into an earlier request.
        written = self.ledger.accept(rid, tenant, key, body, jobs)
        if key is None:
            enter()
        else:
            self._accepting[tenant, key] = written
        try:
            found, ids = await written
        except LedgerUnwritable as error:
            for job_id, _ in jobs:
                self._withdraw(job_id)
            raise Refusal(str(error), 507, 5.0) from None
        finally:
            if key is not None and self._accepting.get((tenant, key)) is written:
                del self._accepting[tenant, key]
        if found != rid:
            self._same_as(ids, body)
            return found, ids
        if key is not None:
            enter()
        self.counters["accepted"] += len(jobs)
        return rid, ids

    def _prepare(self, prompt: str) -> None:
        """Read a prompt, in the planner's thread."""
        self.decider.prepare(prompt)
        if self.load is not None:
            self.load.read(prompt, self.decider.reading(prompt))

    def _withdraw(self, job_id: str) -> None:
        """It was never accepted: nobody waits for it."""
        if (job := self.jobs.pop(job_id, None)) is not None:
            if self.load is not None:
                self.load.ended(job)
            self.withdrawn(job)

    async def _begun(self, tenant: str, key: str, body: dict[str, Any]) -> tuple[str, list[str]] | None:
        """What an idempotency key began, one that is being written right now waited for; None where it is a new one."""
        if (written := self._accepting.get((tenant, key))) is not None:
            await asyncio.wait([written])
        found = self.ledger.of_key(tenant, key)
        if found is not None:
            self._same_as(found[1], body)
        return found

    def _same_as(self, ids: list[str], body: dict[str, Any]) -> None:
        """A request that comes again, by its key; Refusal where the key was another's."""
        kept = self.ledger.job(ids[0])
        if kept and json.loads(kept["body"]) != body:
            raise Refusal("this idempotency key was used for another request", 409)
        self.counters["idempotent"] += 1
