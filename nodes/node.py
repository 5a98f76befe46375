"""An edge or device node: registers, beats, takes work, and passes between the compute thread and the exchange.

Nothing here imports torch: the event loop answers while the compute thread still loads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nodes.cache.keeper import keeper_of
from nodes.compute import Compute, Event, Key
from nodes.deployment import Deployment, JudgeConfig, NodeConfig
from nodes.depot import EMBEDDINGS
from nodes.device_judge import DeviceJudge
from nodes.exchange import Exchange, Lost
from nodes.messages import (
    Allow,
    Assign,
    Busy,
    Cancel,
    Checkpoint,
    Drain,
    Failed,
    HeartbeatSeen,
    JudgeThis,
    Leaving,
    Message,
    Preview,
    Progress,
    Refused,
    Registered,
    Release,
    Result,
    Taken,
)
from nodes.own_process import memory_bytes
from nodes.presence import Presence
from nodes.tasks import Tasks, background
from relay.program import Program

if TYPE_CHECKING:
    from nodes.transport import Client

log = logging.getLogger("relay.node")
PROGRESS_S = 0.1  # steps of one job are told at most so often


@dataclass
class _Held:
    """A stretch that this node has taken."""

    assign: Assign
    steps: int
    told: float = 0.0
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)


class Node:
    def __init__(
        self, name: str, config: NodeConfig, deployment: Deployment, control: Client, exchange: Exchange,
        started: float | None = None,
    ):  # fmt: skip
        self.name, self.config, self.deployment = name, config, deployment
        self.control, self.exchange = control, exchange
        exchange.on_kept = self._kept
        self.started = started or time.monotonic()
        self.held: dict[Key, _Held] = {}
        self.draining: str | None = None
        self.stopped = asyncio.Event()
        self.images: dict[str, tuple[Result, bytes]] = {}  # of this node's own user
        self.on_answer: Callable[[Message, list[Any]], None] | None = None  # what is the local user's
        self.on_end: Callable[[Key, str, Result | None, bytes], None] | None = None
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()
        self.compute = Compute(
            {family: tuple(members) for family, members in config.families.items()},
            self._emit,
            threads=config.threads, dtype=config.dtype, device=config.device, batch=config.batch, pace=config.pace,
        )  # fmt: skip
        judging = deployment.judging or JudgeConfig()
        self.cache = keeper_of(name, config, deployment)
        self.presence = Presence(
            name, config, control, exchange, self.compute, self._running, lambda: len(self.held),
            lambda: self.cache.status if self.cache is not None else {},
        )  # fmt: skip
        self._tell = self.presence.tell
        self.judge = DeviceJudge(config.judge, judging, self.compute, self._tell, self.exchange.show)

    def _emit(self, event: Event) -> None:
        """From the compute thread."""
        self._loop.call_soon_threadsafe(self._happened, event)

    async def run(self) -> None:
        """Until drained or stopped."""
        self.compute.start()
        await self.control.connect()
        exchange = self.exchange
        loops = [self._hear(), self.presence.beat(), self._tidy(), exchange.post(), exchange.post_elsewhere()]
        if exchange.server is not None:
            loops.append(exchange.serve())
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        try:
            stop = asyncio.ensure_future(self.stopped.wait())
            while not self.compute.ready.is_set() and not self.stopped.is_set():
                await asyncio.sleep(0.02)
            if self.compute.failed is not None:
                raise self.compute.failed
            self.presence.startup_s = time.monotonic() - self.started
            log.info("ready after %.1f s, %.0f MB", self.presence.startup_s, memory_bytes() / 1e6)
            await self.presence.register()
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()  # a loop of ours that ended has failed: say so and end
        finally:
            for task in tasks:
                task.cancel()
            self.compute.stop()
            await self.judge.close()
            if self.cache is not None:
                await self.cache.close()
            await self.exchange.close()

    def _running(self) -> tuple[tuple[str, int], ...]:
        return tuple({key[:2] for key in self.held if not is_local(key[0])})

    @property
    def reachable(self) -> bool:
        """Whether the gateway is there."""
        return self.presence.reachable

    # --- the gateway's words ---

    async def _hear(self) -> None:
        while True:
            message, payloads = await self.control.receive()
            match message:
                case Registered() | HeartbeatSeen():
                    self.presence.hear(message)
                case Assign():
                    await self._assigned(message)
                case Cancel():
                    self._cancel(message.job, message.attempt)
                    self._cached(message.job, done=False)
                case Release():
                    self._cancel(message.job, 1 << 62)
                    self._cached(message.job, done=True)
                    self.exchange.release(message.job)
                case Allow():
                    self.exchange.allow(message)
                case JudgeThis():
                    self._tasks.start(self.judge.asked(message))
                case Drain():
                    await self.drain("asked to drain", message.limit_s)
                case Refused(ref=0):
                    log.error("the gateway refused a message of this node: %s", message.reason)
                    self.compute.last_error = f"refused by the gateway: {message.reason}"
                case _:
                    if self.on_answer is not None:
                        self.on_answer(message, payloads)

    async def _assigned(self, assign: Assign) -> None:
        key = assign.key
        if key in self.held:
            return
        if self.draining is not None or len(self.held) >= self.config.queue:
            retry = self._retry_after()
            await self._tell(Busy(job=assign.job, attempt=assign.attempt, retry_after_s=retry))
            return
        self._cancel(assign.job, assign.attempt - 1)
        self.take(assign)
        await self._tell(Taken(job=assign.job, attempt=assign.attempt))

    def take(self, assign: Assign) -> None:
        """Hand a stretch to the compute thread, and fetch what it needs meanwhile."""
        program = Program.parse(assign.program)
        steps = sum(leg.steps for leg in program.legs[assign.first_leg : assign.last_leg + 1])
        held = self.held[assign.key] = _Held(assign, steps)
        left = assign.deadline_s
        self.compute.take(assign, time.monotonic() + left if left is not None else float("inf"))
        self.exchange.expect(assign)
        if assign.source.kind != "noise":
            held.tasks.append(background(self._obtain(assign)))
            if assign.embeddings_come:
                held.tasks.append(background(self._obtain_embeddings(assign)))

    async def _obtain(self, assign: Assign) -> None:
        key = assign.key
        try:
            data = await self.exchange.obtain(assign, assign.first_leg)
        except Lost as error:
            await self._failed(key, "lost", str(error))
            return
        self.compute.bring(key, data)

    async def _obtain_embeddings(self, assign: Assign) -> None:
        key = assign.key
        try:
            self.compute.bring_embeddings(key, await self.exchange.obtain(assign, EMBEDDINGS))
        except Lost as error:
            await self._failed(key, "lost", str(error))

    def _cancel(self, job: str, attempt: int) -> None:
        for key in [k for k in self.held if k[0] == job and k[1] <= attempt]:
            for task in self.held.pop(key).tasks:
                task.cancel()
        self.compute.cancel(job, attempt)

    def _retry_after(self) -> float:
        """Seconds until about one of those that are here will be done, by the curve."""
        step = max((min(c.values()) for h in self.compute.holdings for c in h.curves.values()), default=0.1)
        return max(0.05, step * sum(h.steps for h in self.held.values()) / max(len(self.held), 1))

    # --- the compute thread's words ---

    def _happened(self, event: Event) -> None:
        """In the event loop; what must be awaited becomes a task of the stretch."""
        held = self.held.get(event.key)
        if held is None:
            return
        job, attempt, _ = event.key
        if is_local(job) and event.kind in ("stage", "progress", "checkpoint", "preview"):
            return  # none of the gateway's business: it would call a job that it does not know off
        match event.kind:
            case "stage" | "progress":
                now = time.monotonic()
                if event.kind == "progress" and now - held.told < PROGRESS_S and event.step < event.of:
                    return
                held.told = now
                self._tasks.start(
                    self._tell(
                        Progress(
                            job=job, attempt=attempt, stage=event.stage, leg=event.leg, step=event.step, of=event.of,
                            spent_s=event.spent_s, left=event.report.get("left", ""), batch=event.batch,
                        )
                    )
                )  # fmt: skip
            case "checkpoint":
                message = Checkpoint(job=job, attempt=attempt, leg=event.leg, index=event.step)
                self.exchange.checkpoint(message, event.data, held.assign.checkpoint_to)
            case "preview":
                self.exchange.checkpoint(Preview(job=job, attempt=attempt, leg=event.leg, step=event.step), event.data)
            case "embeddings":
                self._tasks.start(self.exchange.keep(job, EMBEDDINGS, event.data))
            case "look":
                held.tasks.append(background(self._look(event)))
            case "latent":
                if self.cache is not None:
                    self.cache.note(event.about)
            case "handoff":
                self._tasks.start(self._handed(held, event))
            case "image":
                self._image(held, event)
            case "failed":
                self._tasks.start(self._failed(event.key, event.stage, event.reason))

    async def _look(self, event: Event) -> None:
        hit = await self.cache.find(event.about) if self.cache is not None else None
        self.compute.begin_from(event.key, hit)

    def _cached(self, job: str, done: bool) -> None:
        if self.cache is not None:
            self.cache.ended(job, done)

    def _kept(self, message: Checkpoint) -> None:
        """The edge that keeps checkpoints has one of ours."""
        told = Progress(job=message.job, attempt=message.attempt, stage="kept", leg=message.leg, step=message.index)
        self._tasks.start(self._tell(told))

    async def _handed(self, held: _Held, event: Event) -> None:
        assign = held.assign
        key = assign.key
        if assign.put_to is None:
            await self.exchange.keep(assign.job, event.leg, event.data)
        else:
            try:
                await self.exchange.put(assign, event.leg, event.data)
            except Lost as error:
                await self._failed(key, "lost", str(error))
                return
        self.held.pop(key, None)
        await self._tell(
            Progress(job=key[0], attempt=key[1], stage="ready", leg=event.leg, bytes=len(event.data), left="sending")
        )
        await self._maybe_drained()

    def _image(self, held: _Held, event: Event) -> None:
        assign = held.assign
        self.held.pop(event.key, None)
        result = Result(
            job=assign.job, attempt=assign.attempt, width=assign.width, height=assign.height, report=event.report
        )  # fmt: skip
        if self.on_end is not None:
            self.on_end(event.key, "", result, event.data)
        if assign.keep_image:
            self.images[assign.job] = result, event.data
            while len(self.images) > 256:
                self.images.pop(next(iter(self.images)))
        if not is_local(assign.job):
            self.judge.keep(assign, event.data)
            self.exchange.deliver(result, [] if assign.keep_image else [event.data])
        self._tasks.start(self._maybe_drained())

    async def _failed(self, key: Key, kind: str, reason: str) -> None:
        held = self.held.pop(key, None)
        if held is None:
            return
        self.compute.cancel(key[0], key[1])
        log.warning("job %s: %s", key[0], reason)
        if self.on_end is not None:
            self.on_end(key, reason, None, b"")
        if not is_local(key[0]):
            await self._tell(Failed(job=key[0], attempt=key[1], kind=kind, reason=reason))
        await self._maybe_drained()

    # --- going ---

    async def drain(self, reason: str, limit_s: float | None = None) -> None:
        """Take nothing new; go when what runs is done, or when the limit is over: the gateway then places it elsewhere."""
        if self.draining is not None:
            return
        self.draining = reason
        log.info("%s: draining, %d jobs are left", reason, len(self.held))
        await self._tell(Leaving(reason=reason))
        if self.reachable:
            self._tasks.start(self._limit(limit_s if limit_s is not None else self.config.drain_s))
            await self._maybe_drained()
        else:
            self.stopped.set()

    async def _limit(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.held:
            log.warning("%d jobs were not done within %.0f s and are handed back", len(self.held), seconds)
        await self._leave()

    async def _maybe_drained(self) -> None:
        if self.draining is None or self.held:
            return
        for _ in range(100):  # results that are on their way, and latents that others come for
            if not (self.exchange.results or len(self.exchange.depot)) or not self.reachable:
                break
            await asyncio.sleep(0.1)
        await self._leave()

    async def _leave(self) -> None:
        if not self.stopped.is_set():
            await self._tell(Leaving(reason=self.draining or "stopped", done=True))
            self.stopped.set()

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            await self.exchange.forget_strays()


def is_local(job: str) -> bool:
    """Whether this node's own user asked it alone (`nodes.local_user`); the gateway has never heard of it."""
    return job.startswith("local-")
