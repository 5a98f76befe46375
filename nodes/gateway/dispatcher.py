"""The dispatcher: every accepted job ends in one image or one error, whatever dies in between.

    submit      acceptance.py: plan -> ledger -> acknowledged
    tick        whoever waits is placed (placer.py); whoever is too late or was lost is ended or recovered
    hear        progress, handoffs, checkpoints: points from which it could go on
    recover     what it ran on is gone: back off, to be placed again from the farthest point that is still there
    end         image on disk -> ledger -> asker; nothing after the first end counts

Knows no socket: `send` puts a message on its way to a node and says whether it could. Runs in one event loop, without
locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes.checkpoints import Checkpoints
from nodes.deployment import CacheConfig, GatewayConfig
from nodes.gateway.acceptance import Acceptance
from nodes.gateway.deciding import Decider
from nodes.gateway.jobs import Job, Point
from nodes.gateway.ledger import Ledger, LedgerUnwritable
from nodes.gateway.load import LoadControl
from nodes.gateway.placer import Placer, Send, Telling
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Node, Registry, state_of
from nodes.gateway.reports import report_of, report_of_failure
from nodes.gateway.settling import Settling, digest_of
from nodes.gateway.timeline import Timeline
from nodes.gateway.verdicts import Verdicts
from nodes.messages import Busy, Cancel, Failed, Message, Progress, Release, Result
from nodes.requests import ImageRequest
from nodes.stages import Stage
from nodes.tasks import Tasks
from relay.files import write_atomically
from relay.program import Program
from scheduler.load.expected import Station

log = logging.getLogger("relay.gateway")
BACKOFF_S, BACKOFF_MOST_S = 0.1, 5.0


class Dispatcher:
    def __init__(
        self, config: GatewayConfig, registry: Registry, ledger: Ledger, planner: Planner, decider: Decider, send: Send,
        cache: CacheConfig | None = None,
    ):  # fmt: skip
        self.cache = cache or CacheConfig(scope="off")
        self.config, self.registry, self.ledger, self.planner, self.decider = config, registry, ledger, planner, decider
        self.send = send
        self.store = Path(config.store)
        self.checkpoints = Checkpoints(int(config.checkpoint_mb * 1e6))
        self.jobs: dict[str, Job] = {}  # those that have not ended
        self.on_end: list[Callable[[Job], None]] = []  # told of each end; must return at once
        self.verdicts = Verdicts(ledger)
        self.counters: Counter[str] = Counter()
        self.wake = asyncio.Event()
        self.timeline = Timeline(ledger, self.counters)
        self.settling = Settling(ledger, self.store)
        self.placer = Placer(config, registry, planner, decider, self.timeline, send, ledger.boot, self.cache)
        self.acceptance = Acceptance(
            config, self.cache, ledger, planner, decider, self.timeline, self.jobs, self.counters, self.wake,
            self._retry_after, self._withdrawn,
        )  # fmt: skip
        self._ending: set[str] = set()
        self._tasks = Tasks()

    # --- in ---

    async def restore(self) -> int:
        """Take up what an earlier process had accepted and not ended."""
        await self.settling.look_back()
        return await self.acceptance.restore(self.placer.next_attempt)

    async def submit(self, request: ImageRequest, tenant: str, key: str | None = None) -> tuple[str, list[str]]:
        """Request id and job ids, in the ledger when this returns. BadRequest or Refusal otherwise."""
        return await self.acceptance.submit(request, tenant, key)

    @property
    def load(self) -> LoadControl | None:
        """Who says under pressure who is let in and what may serve them."""
        return self.acceptance.load

    def control(self, load: LoadControl | None) -> None:
        """From now on it says so; None: everybody is let in, and everything may."""
        self.placer.load = self.acceptance.load = load
        if load is not None:
            self.on_end.append(load.ended)

    def _withdrawn(self, job: Job) -> None:
        """It was never accepted: nobody waits for it."""
        self._dismiss(job)
        self.checkpoints.drop(job.id)

    async def forgotten_by(self, name: str) -> None:
        """A node came back as a new process: what it had is gone, though no heartbeat was missed."""
        for job in list(self.jobs.values()):
            job.forget(name)
            if job.stage.under_way and any(stretch.node == name and not stretch.done for stretch in job.stretches):
                await self.recover(job, f"node {name} was restarted")

    async def cancel(self, job: Job, reason: str = "cancelled by its asker") -> None:
        await self._end(job, Stage.CANCELLED, error=reason, status=499)

    # --- the loop ---

    async def run(self) -> None:
        """Place, recover and end, whenever something happened and at least every tenth of a second."""
        # asyncio.timeout, here as in every loop: wait_for (Python 3.11) forgets that it was called off in the same moment
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await self.wake.wait()
            self.wake.clear()
            try:
                await self.tick()
            except Exception:  # one bad job must not stop all others
                log.exception("dispatcher")
                self.counters["errors"] += 1

    async def tick(self) -> None:
        now, alive = time.monotonic(), self.registry.alive_names
        overdue = [job for job in self.jobs.values() if now > job.deadline]
        # at once, so that they share one commit and none waits for another's
        await asyncio.gather(*(self._end(job, Stage.FAILED, error=self._too_late(job), status=504) for job in overdue))
        for job in list(self.jobs.values()):
            if job.stage.under_way and now <= job.deadline:
                if gone := [s.node for s in job.stretches if not s.done and s.node not in alive]:
                    await self.recover(job, f"node {gone[0]} was lost")
                elif now - job.moved > self._patience(job):
                    await self.recover(job, f"nothing was heard of it for {now - job.moved:.0f} s")
        waiting = [j for j in self.jobs.values() if j.stage in (Stage.ACCEPTED, Stage.WAITING) and now >= j.not_before]
        for job in sorted(waiting, key=lambda j: (j.deadline, j.accepted)):
            if (telling := await self.placer.place(job)) is not None:
                self._tasks.start(self._told(job, job.attempt, telling))
        await asyncio.sleep(0)  # they are on their way
        self.timeline.spill()

    async def _told(self, job: Job, attempt: int, telling: Telling) -> None:
        failed = await telling
        if failed is not None and job.attempt == attempt and job.stage.under_way:
            await self.recover(job, failed)

    def _patience(self, job: Job) -> float:
        """Seconds without a word of it after which it counts as lost: on the busiest of its nodes it may be the last one,
        and that may be three times as slow as it measured. Nodes work at once, and on several requests at once."""
        there = [node for name in job.nodes() if (node := self.registry.nodes.get(name))]
        return 10.0 + 3 * max((Station.of(state_of(node)).drained_s for node in there), default=0.0)

    def _too_late(self, job: Job) -> str:
        said = f"; {job.history[-1]}" if job.history else ""
        return f"its deadline passed while it was {job.stage}{said}"

    # --- hearing ---

    async def hear(self, node: Node, message: Message) -> None:
        """What a node says of a job; what is stale is told to stop."""
        job = self.jobs.get(message.job)  # type: ignore[attr-defined]
        attempt = message.attempt  # type: ignore[attr-defined]
        if job is None or attempt != job.attempt or node.name not in job.nodes():
            if not isinstance(message, Failed):
                self._tell(node.name, Cancel(job=message.job, attempt=attempt, reason="stale"))  # type: ignore[attr-defined]
            return
        job.moved = time.monotonic()
        match message:
            case Progress():
                self._progress(job, node, message)
            case Busy():
                self.counters["busy"] += 1
                await self.recover(job, f"node {node.name} is busy", retry_after=message.retry_after_s)
            case Failed(kind="refused"):
                await self._end(job, Stage.FAILED, error=message.reason, status=400)
            case Failed():
                if message.kind == "broken":
                    self.registry.strike(node, message.reason)
                else:  # the latent that it was sent to was not there
                    job.forget_lost(node.name)
                await self.recover(job, f"node {node.name}: {message.reason}")

    def _progress(self, job: Job, node: Node, message: Progress) -> None:
        if message.left:
            spent = job.spent.setdefault(node.name, {})
            spent[message.left] = spent.get(message.left, 0.0) + message.spent_s
        if message.batch:
            self.timeline.observe(node.name, "step", {"batch": message.batch})
        if message.stage == "kept":
            if self.config.checkpoints_to is not None:
                job.reach(Point(message.leg, message.step, self.config.checkpoints_to, checkpoint=True))
                self.counters["checkpoints"] += 1
            return
        if message.stage == "denoising":
            if job.stage is Stage.PLACED:
                job.enter(Stage.DENOISING)
            if message.step:
                job.steps_paid += message.step - (job.step if message.leg == job.leg and message.step > job.step else 0)
            job.leg, job.step, job.of = message.leg, message.step, message.of
            job.tell("step")
        elif message.stage == "decoding":
            job.enter(Stage.DECODING)
        elif message.stage == "ready":  # the latent before leg `leg` waits on that node
            for stretch in job.stretches:
                if stretch.node == node.name and stretch.last + 1 == message.leg:
                    stretch.done = True
                    node.jobs.pop(job.id, None)
            if node.role == "edge":
                job.reach(Point(message.leg, 0, node.name))
        if message.stage != "denoising" or message.step == 0:
            self.timeline.note(
                job.id, node.name, message.stage, leg=message.leg, spent_s=message.spent_s, left=message.left,
                bytes=message.bytes, attempt=message.attempt,
            )  # fmt: skip
            job.tell("stage", node=node.name, what=message.stage)

    def checkpoint(self, node: Node, job_id: str, attempt: int, leg: int, index: int, data: bytes) -> None:
        job = self.jobs.get(job_id)
        if job is None or attempt != job.attempt or node.name not in job.nodes():
            return
        job.moved = time.monotonic()
        if self.checkpoints.put(job.id, leg, index, data):
            job.reach(Point(leg, index, "gateway", checkpoint=True))
            self.counters["checkpoints"] += 1

    async def result(self, node: Node, message: Result, png: bytes | None) -> bool:
        """A picture. True where the sender may forget it: it was taken, or it is of no use any more."""
        job = self.jobs.get(message.job)
        if job is None:
            self.counters["results_late"] += 1
            self._tell(node.name, Release(job=message.job))
            return True
        if node.name not in job.placed_on.get(message.attempt, ()):
            self.counters["results_foreign"] += 1
            log.warning("node %s sent a result of %s, which it was never given", node.name, job.id)
            return True
        program = Program.parse(message.report["program"])
        if program.family != (job.program or job.programs[0]).family or message.report.get("seed") != job.seed:
            await self.recover(job, f"node {node.name} answered another request")
            return True
        report = report_of(job, node.name, message, program)
        image = None
        if png is not None:
            image = f"images/{job.id}.png"
            try:
                (self.store / image).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.store / image, png)
            except OSError as error:
                self.counters["unwritable"] += 1
                log.error("image of %s cannot be written: %s", job.id, error)
                return False  # it is kept by its node and comes again
        if job.program is None:
            job.program = program
        job.image, job.report = image, report
        self.registry.praise(node)
        digest = digest_of(png) if png is not None else None
        return await self._end(job, Stage.DONE, report=report, image=image, digest=digest)

    # --- recovering and ending ---

    async def recover(self, job: Job, reason: str, retry_after: float | None = None) -> None:
        """Stop what still works on it, and place it again after a pause; give up after too many tries."""
        if job.id in self._ending or job.stage.ended:
            return
        log.info("job %s: %s", job.id, reason)
        job.history.append(reason)
        self.timeline.note(job.id, "gateway", "recover", reason=reason)
        self._dismiss(job)
        if retry_after is None:
            job.tries += 1
            self.counters["recovered"] += 1
            if job.tries >= self.config.tries:
                await self._end(job, Stage.FAILED, error=f"given up after {job.tries} tries: {reason}", status=502)
                return
            pause = min(BACKOFF_S * 2 ** (job.tries - 1), BACKOFF_MOST_S)
        else:
            pause = min(retry_after, BACKOFF_MOST_S)
        if job.stage is not Stage.ACCEPTED:
            job.enter(Stage.WAITING)
        job.not_before = time.monotonic() + pause * random.uniform(0.5, 1.5)
        job.tell("waiting", reason=reason)

    def _dismiss(self, job: Job) -> None:
        for name in job.nodes():
            if node := self.registry.nodes.get(name):
                node.jobs.pop(job.id, None)
                if self.registry.alive(node):
                    self._tell(name, Cancel(job=job.id, attempt=job.attempt))

    async def _end(self, job: Job, stage: Stage, error: str | None = None, status: int = 200, **kept: Any) -> bool:
        """The one end of a job: on disk first. False where the disk did not take it: it is tried again."""
        if job.id in self._ending or job.stage.ended:
            return True
        self._ending.add(job.id)
        try:
            if stage is not Stage.DONE:
                kept["report"] = job.report = report_of_failure(job, status)
            await self.ledger.end(job.id, str(stage), error=error, **kept)
        except LedgerUnwritable as unwritable:
            self.counters["unwritable"] += 1
            log.error("job %s cannot be ended: %s", job.id, unwritable)
            return False
        finally:
            self._ending.discard(job.id)
        if kept.get("image"):
            self.settling.ended(job.id, kept["image"])
        job.error, job.status = error, status
        job.enter(stage)
        self.counters[str(stage)] += 1
        self.counters["degraded"] += job.degraded and stage is Stage.DONE
        self.timeline.note(job.id, "gateway", str(stage), error=error, seconds=time.monotonic() - job.accepted)
        job.tell(str(stage))
        job.ended.set()
        self.jobs.pop(job.id, None)
        self.checkpoints.drop(job.id)
        involved = set().union(*job.placed_on.values())
        if involved and self.config.checkpoints_to is not None:
            involved.add(self.config.checkpoints_to)
        for name in involved:
            if (node := self.registry.nodes.get(name)) and self.registry.alive(node):
                node.jobs.pop(job.id, None)
                gone = () if stage is Stage.DONE else (Cancel(job=job.id, attempt=job.attempt),)
                self._tell(name, *gone, Release(job=job.id))
        self.decider.ended(job)
        for told in self.on_end:
            told(job)
        return True

    # --- small things ---

    def _tell(self, name: str, *messages: Message) -> None:
        """Begin to tell a node what nothing depends on: one that is stopped takes half a second to give up on, and no
        other job's end may wait for that."""

        async def tell() -> None:
            for message in messages:
                if not await self.send(name, message):
                    return

        self._tasks.start(tell())

    def _retry_after(self) -> float:
        """Seconds until about one job will have ended."""
        backlog = [sum(node.jobs.values()) for node in self.registry.ready()]
        return max(1.0, min(backlog, default=5.0))
