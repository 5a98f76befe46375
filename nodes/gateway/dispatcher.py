"""The dispatcher: every accepted job ends in one image or one error, whatever dies in between.

    submit      plan -> ledger -> acknowledged
    place       actions that could serve it now -> policy decides -> logged -> every node of it is told at once
    hear        progress, handoffs, checkpoints: points from which it could go on
    recover     what it ran on is gone: back off, go on from the farthest point that is still there
    degrade     nothing can run its program: another program finishes, where the asker allowed it
    finish      image on disk -> ledger -> asker; nothing after the first end counts

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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from nodes.deployment import GatewayConfig
from nodes.gateway.checkpoints import Checkpoints
from nodes.gateway.decisions import DecisionLog
from nodes.gateway.jobs import Job, Point
from nodes.gateway.ledger import Ledger, LedgerUnwritable
from nodes.gateway.placement import actions_for, stretches, work_s
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Node, Registry
from nodes.images import write_bytes
from nodes.messages import Allow, Assign, Busy, Cancel, Failed, Message, Progress, Release, Result, Source
from nodes.requests import ImageRequest, new_id, new_seed, read_request
from nodes.stages import Stage
from nodes.tasks import Tasks
from relay.errors import BadRequest, RelayError
from relay.program import Program
from scheduler.policy import Action, Context, Policy

log = logging.getLogger("relay.gateway")
Send = Callable[[str, Message], Awaitable[bool]]
BACKOFF_S, BACKOFF_MOST_S = 0.1, 5.0
BOOT = 100_000  # attempts are numbered from boot x BOOT, so that no attempt of an earlier process is newer


class Refusal(RelayError):
    """A request that is not accepted, with HTTP's status and when to try again."""

    def __init__(self, reason: str, status: int, retry_after_s: float | None = None):
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class Dispatcher:
    def __init__(
        self, config: GatewayConfig, registry: Registry, ledger: Ledger, planner: Planner, policy: Policy, send: Send
    ):
        self.config, self.registry, self.ledger, self.planner, self.policy = config, registry, ledger, planner, policy
        self.send = send
        self.store = Path(config.store)
        self.checkpoints = Checkpoints(int(config.checkpoint_mb * 1e6))
        self.decisions = DecisionLog(self.store / "decisions.jsonl")
        self.jobs: dict[str, Job] = {}  # those that have not ended
        self.counters: Counter[str] = Counter()
        self.wake = asyncio.Event()
        self.events: list[tuple[str, float, str, str, dict[str, Any]]] = []
        self.observers: list[Callable[[str, str, dict[str, Any]], None]] = []  # told (node, what, data) of each event
        self.data_source = Source(kind="fetch", node="gateway", address=config.advertise_data or config.data)
        self._attempts = ledger.boot * BOOT
        self._tasks = Tasks()
        self._ending: set[str] = set()

    # --- in ---

    async def restore(self) -> int:
        """Take up what an earlier process had accepted and not ended."""
        for kept in self.ledger.open_jobs():
            request = read_request(kept.body)
            left = (request.deadline_ms or self.config.deadline_s * 1000) / 1000 - (time.time() - kept.accepted_at)
            now = time.monotonic()
            try:
                planned = await self.planner.plan(request)
            except BadRequest as error:  # served before a change of the config, not any more
                await self.ledger.end(kept.id, "failed", error=str(error))
                continue
            job = Job(
                kept.id, kept.request, kept.number, kept.tenant, kept.seed, request, now, now + max(left, 0.0),
                list(planned.programs), self._next_attempt(), moved=now,
            )  # fmt: skip
            job.placed_on[kept.attempt] = set(kept.nodes)
            job.history.append("the gateway was restarted")
            self.jobs[job.id] = job
        self.wake.set()
        return len(self.jobs)

    async def submit(self, request: ImageRequest, tenant: str, key: str | None = None) -> tuple[str, list[str]]:
        """Request id and job ids, in the ledger when this returns. BadRequest or Refusal otherwise."""
        import msgspec

        planned = await self.planner.plan(request)
        if len(self.jobs) + request.images > self.config.queue:
            raise Refusal("too many jobs are open", 429, self._retry_after())
        request = msgspec.structs.replace(
            request, seed=request.seed, width=planned.width, height=planned.height
        )  # fmt: skip
        first = request.seed if request.seed is not None else new_seed()
        rid = new_id("req")
        jobs = [(new_id("job"), first + i) for i in range(request.images)]
        body = {k: v for k, v in msgspec.to_builtins(request).items() if v is not None}
        now = time.monotonic()
        # In memory before the commit is awaited: a kill between the two loses an unacknowledged request, nothing else.
        try:
            found, ids = await self.ledger.accept(rid, tenant, key, body, jobs)
        except LedgerUnwritable as error:
            raise Refusal(str(error), 507, 5.0) from None
        if found != rid:
            self._same_as(ids, body)
            self.counters["idempotent"] += 1
            return found, ids
        deadline = now + (request.deadline_ms / 1000 if request.deadline_ms else self.config.deadline_s)
        for number, (job_id, seed) in enumerate(jobs):
            self.jobs[job_id] = Job(
                job_id, rid, number, tenant, seed, request, now, deadline, list(planned.programs), 0, moved=now
            )
            self._note(job_id, "gateway", "accepted")
        self.counters["accepted"] += len(jobs)
        self.wake.set()
        return rid, ids

    def _same_as(self, ids: list[str], body: dict[str, Any]) -> None:
        import json

        kept = self.ledger.job(ids[0])
        if kept and json.loads(kept["body"]) != body:
            raise Refusal("this idempotency key was used for another request", 409)

    def told(self, job_id: str, tenant: str) -> dict[str, Any] | None:
        """A job's state, open or ended, for the tenant that it belongs to; None for any other."""
        import json

        if (job := self.jobs.get(job_id)) is not None:
            return job.told() if job.tenant == tenant else None
        kept = self.ledger.job(job_id)
        if kept is None or kept["tenant"] != tenant:
            return None
        report = json.loads(kept["report"]) if kept["report"] else None
        names = ("id", "request", "number", "stage", "seed", "program", "error", "image")
        return {name: kept[name] for name in names} | {
            "report": report,
            "degraded": bool(report and report["degraded"]),
        }

    async def forgotten_by(self, name: str) -> None:
        """A node came back as a new process: what it had is gone, though no heartbeat was missed."""
        for job in list(self.jobs.values()):
            job.points.pop(name, None)
            if job.stage in (Stage.PLACED, Stage.DENOISING, Stage.DECODING) and any(
                stretch.node == name and not stretch.done for stretch in job.stretches
            ):
                await self.recover(job, f"node {name} was restarted")

    async def cancel(self, job: Job, reason: str = "cancelled by its asker") -> None:
        await self._end(job, Stage.CANCELLED, error=reason, status=499)

    # --- the loop ---

    async def run(self) -> None:
        """Place, recover and end, whenever something happened and at least every tenth of a second."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), 0.1)
            self.wake.clear()
            try:
                await self.tick()
            except Exception:  # one bad job must not stop all others
                log.exception("dispatcher")
                self.counters["errors"] += 1

    async def tick(self) -> None:
        now, alive = time.monotonic(), self.registry.alive_names
        for job in list(self.jobs.values()):
            if now > job.deadline:
                await self._end(job, Stage.FAILED, error=self._too_late(job), status=504)
            elif job.stage in (Stage.PLACED, Stage.DENOISING, Stage.DECODING):
                if gone := [s.node for s in job.stretches if not s.done and s.node not in alive]:
                    await self.recover(job, f"node {gone[0]} was lost")
                elif now - job.moved > self._patience(job):
                    await self.recover(job, f"nothing was heard of it for {now - job.moved:.0f} s")
        waiting = [j for j in self.jobs.values() if j.stage in (Stage.ACCEPTED, Stage.WAITING) and now >= j.not_before]
        for job in sorted(waiting, key=lambda j: (j.deadline, j.accepted)):
            await self._place(job)
        if self.events:
            self._tasks.start(self.flush())

    async def flush(self) -> None:
        """The timeline so far is on disk when this returns, as far as the disk takes it."""
        events, self.events = self.events, []
        await self._quietly(self.ledger.note(events))

    def _patience(self, job: Job) -> float:
        backlog = sum(sum(n.jobs.values()) for name in job.nodes() if (n := self.registry.nodes.get(name)))
        return 10.0 + 3 * backlog

    def _too_late(self, job: Job) -> str:
        said = f"; {job.history[-1]}" if job.history else ""
        return f"its deadline passed while it was {job.stage}{said}"

    # --- placing ---

    async def _place(self, job: Job) -> None:
        point = job.best_point(self.registry.alive_names) if job.program else None
        programs = [job.program] if job.program and (point or job.request.fixes) else job.programs
        first = point.leg if point else 0
        actions = actions_for(job, programs, self.registry.ready(), first)
        if not actions and job.request.may_degrade and time.monotonic() - job.moved > self.config.degrade_after_s:
            await self._degrade(job, point)
            return
        if actions:
            await self._act(job, actions, point)

    async def _degrade(self, job: Job, point: Point | None) -> None:
        """Another program finishes; what was done counts where the large member's first leg reached a step."""
        done = None
        before = job.program or job.programs[0]
        if point and before.legs[0].member == "large" and (point.leg, point.index) <= (1, 0):
            done = point.index if point.leg == 0 else before.legs[0].last
        ready = self.registry.ready()
        for kept, handoff in ((point, done), (None, None)) if done else ((None, None),):
            programs = await self.planner.others(job.request, before, handoff)
            found = []
            for program in programs:
                first = 1 if kept and len(program.legs) > 1 else 0
                found += [(action, first) for action in actions_for(job, [program], ready, first)]
            if found:
                first = found[0][1]
                job.degraded = True
                job.history.append(f"no node could go on with {before}")
                await self._act(job, [action for action, at in found if at == first], kept, first)
                return

    async def _act(self, job: Job, actions: list[Action], point: Point | None, first: int | None = None) -> None:
        """Decide among actions, log it, tell every node."""
        first = first if first is not None else point.leg if point else 0
        padded = [_whole(action, first) for action in actions]
        context = Context(
            job=job.id, prompt=job.request.prompt, nodes=self.registry.states(), preference=job.request.preference,
            deadline_s=job.left_s, attempt=job.tries + 1,
        )  # fmt: skip
        chosen = self.policy.decide(context, padded)
        action = actions[padded.index(chosen.action)]
        job.decision, job.program = chosen, action.program
        job.attempt = self._next_attempt()
        job.stretches = stretches(action, first)
        job.placed_on[job.attempt] = job.nodes()
        left, waited = str(job.stage), time.monotonic() - job.moved
        job.enter(Stage.PLACED)
        self.decisions.write(job, context, chosen, point)
        self._tasks.start(self._quietly(self.ledger.placed(job.id, job.attempt, str(job.program), sorted(job.nodes()))))
        self._note(
            job.id, "gateway", "placed", nodes=list(action.nodes), program=str(job.program), attempt=job.attempt,
            policy=chosen.policy, probability=chosen.probability, left=left, spent_s=waited,
        )  # fmt: skip
        job.tell("placed")
        if point and point.holder not in ("gateway", job.stretches[0].node):
            key = self.registry.nodes[job.stretches[0].node].key
            await self.send(point.holder, Allow(job=job.id, leg=point.leg, key=key))
        messages = [(stretch, self._assign(job, i, point)) for i, stretch in enumerate(job.stretches)]
        for stretch, message in messages:
            node = self.registry.nodes[stretch.node]
            node.jobs[job.id] = node.jobs.get(job.id, 0.0) + work_s(job.program, stretch, node)
            if not await self.send(stretch.node, message):
                await self.recover(job, f"node {stretch.node} could not be told")
                return

    def _assign(self, job: Job, i: int, point: Point | None) -> Assign:
        stretch, program, request = job.stretches[i], job.program, job.request
        assert program is not None
        node = self.registry.nodes[stretch.node]
        put_to, next_key = None, ""
        if i + 1 < len(job.stretches):
            after = self.registry.nodes[job.stretches[i + 1].node]
            put_to = self._at(after.name, "put") if node.role == "device" else None
            next_key = after.key
        if i:
            before = self.registry.nodes[job.stretches[i - 1].node]
            source = self._at(before.name, "put") if before.role == "device" else self._at(before.name, "fetch")
        elif point is None:
            source = Source(kind="noise")
        elif point.holder == "gateway":
            source = self.data_source
        else:
            source = Source(kind="held") if point.holder == stretch.node else self._at(point.holder, "fetch")
        wants = self.config.checkpoint_every if node.role == "edge" else 0
        own = self._config_of(node)
        return Assign(
            job=job.id, attempt=job.attempt, program=str(program), prompt=request.prompt, negative=request.negative_prompt,
            seed=job.seed, width=job.size[0], height=job.size[1], first_leg=stretch.first, last_leg=stretch.last,
            source=source, put_to=put_to, next_key=next_key, deadline_s=job.left_s,
            checkpoint_every=wants if own is None else own, preview_every=request.previews, degraded=job.degraded,
            keep_image=request.keep_on_device and request.device == stretch.node,
        )  # fmt: skip

    def _config_of(self, node: Node) -> int | None:
        """Checkpoints over a device's link only if its own config asks for them."""
        return self.config.checkpoint_every if node.register.checkpoints else None

    def _at(self, name: str, kind: str) -> Source:
        node = self.registry.nodes[name]
        return Source(kind=kind, node=name, address=node.register.data_address or "", key=node.key)

    # --- hearing ---

    async def hear(self, node: Node, message: Message) -> None:
        """What a node says of a job; what is stale is told to stop."""
        job = self.jobs.get(message.job)  # type: ignore[attr-defined]
        attempt = message.attempt  # type: ignore[attr-defined]
        if job is None or attempt != job.attempt or node.name not in job.nodes():
            if not isinstance(message, Failed):
                await self.send(node.name, Cancel(job=message.job, attempt=attempt, reason="stale"))  # type: ignore[attr-defined]
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
                    job.points = {h: p for h, p in job.points.items() if h == "gateway"}
                await self.recover(job, f"node {node.name}: {message.reason}")

    def _progress(self, job: Job, node: Node, message: Progress) -> None:
        if message.left:
            spent = job.spent.setdefault(node.name, {})
            spent[message.left] = spent.get(message.left, 0.0) + message.spent_s
        if message.batch:
            self._observe(node.name, "step", {"batch": message.batch})
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
                job.points[node.name] = Point(message.leg, 0, node.name)
        if message.stage != "denoising" or message.step == 0:
            self._note(
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
            job.points["gateway"] = Point(leg, index, "gateway")
            self.counters["checkpoints"] += 1

    async def result(self, node: Node, message: Result, png: bytes | None) -> bool:
        """A picture. True where the sender may forget it: it was taken, or it is of no use any more."""
        job = self.jobs.get(message.job)
        if job is None:
            self.counters["results_late"] += 1
            await self.send(node.name, Release(job=message.job))
            return True
        if node.name not in job.placed_on.get(message.attempt, ()):
            self.counters["results_foreign"] += 1
            log.warning("node %s sent a result of %s, which it was never given", node.name, job.id)
            return True
        program = Program.parse(message.report["program"])
        if program.family != (job.program or job.programs[0]).family or message.report.get("seed") != job.seed:
            await self.recover(job, f"node {node.name} answered another request")
            return True
        report = self._report(job, node, message, program)
        image = None
        if png is not None:
            image = f"images/{job.id}.png"
            try:
                write_bytes(self.store / image, png)
            except OSError as error:
                self.counters["unwritable"] += 1
                log.error("image of %s cannot be written: %s", job.id, error)
                return False  # it is kept by its node and comes again
        if job.program is None:
            job.program = program
        job.image, job.report = image, report
        self.registry.praise(node)
        return await self._end(job, Stage.DONE, report=report, image=image)

    def _report(self, job: Job, node: Node, message: Result, program: Program) -> dict[str, Any]:
        seconds = time.monotonic() - job.accepted
        return message.report | {
            "job": job.id, "node": node.name, "nodes": list(job.action.nodes) if job.action else [node.name],
            "degraded": job.degraded, "steps": program.steps, "seconds": seconds, "attempts": job.tries + 1,
            "history": job.history, "policy": job.decision.policy if job.decision else None,
            "probability": job.decision.probability if job.decision else None, "steps_paid": job.steps_paid,
            "timings": job.spent | {node.name: message.report.get("spent_s", {})},
        }  # fmt: skip

    def _report_of_failure(self, job: Job, status: int) -> dict[str, Any]:
        """What is known of a job that ends without a picture."""
        return {
            "job": job.id, "status": status, "program": str(job.program) if job.program else None, "seed": job.seed,
            "nodes": list(job.action.nodes) if job.action else [], "degraded": job.degraded,
            "seconds": time.monotonic() - job.accepted, "attempts": job.tries + 1, "history": job.history,
            "steps_paid": job.steps_paid, "timings": job.spent,
        }  # fmt: skip

    # --- recovering and ending ---

    async def recover(self, job: Job, reason: str, retry_after: float | None = None) -> None:
        """Stop what still works on it, and place it again after a pause; give up after too many tries."""
        if job.id in self._ending or job.stage.ended:
            return
        log.info("job %s: %s", job.id, reason)
        job.history.append(reason)
        self._note(job.id, "gateway", "recover", reason=reason)
        await self._dismiss(job)
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

    async def _dismiss(self, job: Job) -> None:
        for name in job.nodes():
            if node := self.registry.nodes.get(name):
                node.jobs.pop(job.id, None)
                if self.registry.alive(node):
                    await self.send(name, Cancel(job=job.id, attempt=job.attempt))

    async def _end(self, job: Job, stage: Stage, error: str | None = None, status: int = 200, **kept: Any) -> bool:
        """The one end of a job: on disk first. False where the disk did not take it: it is tried again."""
        if job.id in self._ending or job.stage.ended:
            return True
        self._ending.add(job.id)
        try:
            if stage is not Stage.DONE:
                kept["report"] = job.report = self._report_of_failure(job, status)
            await self.ledger.end(job.id, str(stage), error=error, **kept)
        except LedgerUnwritable as unwritable:
            self.counters["unwritable"] += 1
            log.error("job %s cannot be ended: %s", job.id, unwritable)
            return False
        finally:
            self._ending.discard(job.id)
        job.error, job.status = error, status
        job.enter(stage)
        self.counters[str(stage)] += 1
        self.counters["degraded"] += job.degraded and stage is Stage.DONE
        self._note(job.id, "gateway", str(stage), error=error, seconds=time.monotonic() - job.accepted)
        job.tell(str(stage))
        job.ended.set()
        self.jobs.pop(job.id, None)
        self.checkpoints.drop(job.id)
        involved = set().union(*job.placed_on.values()) if job.placed_on else set()
        for name in involved:
            if (node := self.registry.nodes.get(name)) and self.registry.alive(node):
                node.jobs.pop(job.id, None)
                if stage is not Stage.DONE:
                    await self.send(name, Cancel(job=job.id, attempt=job.attempt))
                await self.send(name, Release(job=job.id))
        if job.decision is not None:
            self.policy.learn(job.decision, {"stage": str(stage), "error": error, **(job.report or {})})
            self.decisions.outcome(job)
        return True

    # --- small things ---

    def _retry_after(self) -> float:
        """Seconds until about one job will have ended."""
        backlog = [sum(node.jobs.values()) for node in self.registry.ready()]
        return max(1.0, min(backlog, default=5.0))

    def _next_attempt(self) -> int:
        self._attempts += 1
        return self._attempts

    def _note(self, job: str, node: str, what: str, **data: Any) -> None:
        said = {k: v for k, v in data.items() if v is not None}
        self.events.append((job, time.time(), node, what, said))
        self._observe(node, what, said)

    def _observe(self, node: str, what: str, data: dict[str, Any]) -> None:
        for observer in self.observers:
            observer(node, what, data)

    async def _quietly(self, work: Awaitable[Any]) -> None:
        try:
            await work
        except LedgerUnwritable as error:
            self.counters["unwritable"] += 1
            log.warning("%s", error)


def _whole(action: Action, first: int) -> Action:
    """As policies see it: of a job that goes on, the legs that are left."""
    if not first:
        return action
    from dataclasses import replace

    program = action.program
    return Action(replace(program, legs=program.legs[first:], guidance=program.guidance[first:]), action.nodes)
