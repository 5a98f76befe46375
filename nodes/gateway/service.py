"""The gateway as a process: its sockets, what each message does, and the loops around the dispatcher."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from nodes.deployment import Deployment
from nodes.gateway.deciding import Decider, open_log
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.jobs import Job
from nodes.gateway.judging import Judging
from nodes.gateway.learning import load_decider
from nodes.gateway.ledger import Ledger
from nodes.gateway.load import LoadControl
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Node, Registry
from nodes.gateway.retention import tidy
from nodes.gateway.views import find, of_job, picture_of
from nodes.keys import Peer
from nodes.messages import (
    Accepted,
    Ask,
    Busy,
    Cancel,
    CancelJob,
    Checkpoint,
    Drain,
    Failed,
    Feedback,
    Fetch,
    Heartbeat,
    HeartbeatSeen,
    JudgeHere,
    KeptPicture,
    Latent,
    Leaving,
    Message,
    NotHere,
    Preview,
    Progress,
    Refused,
    Register,
    Registered,
    Result,
    Scores,
    Seen,
    Submit,
    Taken,
    Told,
)
from nodes.own_process import cpu_s, memory_bytes
from nodes.requests import Refusal, read_request
from nodes.results import version
from nodes.stages import Stage
from nodes.tasks import Tasks
from nodes.transport import Server, sent
from relay.errors import BadRequest, RelayError

log = logging.getLogger("relay.gateway")
Act = Callable[[bytes, Peer, Any, list[Any]], Awaitable[None]]  # on one message
SEND_S = 0.5  # a node that takes no control message for so long is as good as gone


class Gateway:
    """`control` and `data` are bound already. One process a store: a second one is refused. `started`: when the process
    began, by the monotonic clock."""

    def __init__(self, deployment: Deployment, control: Server, data: Server, started: float | None = None):
        config = deployment.gateway
        self.deployment, self.config = deployment, config
        self.control, self.data = control, data
        self.store = Path(config.store)
        self.store.mkdir(parents=True, exist_ok=True)
        self._lock = _only_one(self.store)
        self.session = secrets.token_hex(6)
        self.started, self.startup_s = started or time.monotonic(), 0.0
        self.registry = Registry(config.heartbeat_s)
        self.decider = Decider(open_log(self.store / "decisions.db", config.prompts_in_logs))
        self.dispatcher = Dispatcher(
            config, self.registry, Ledger(self.store / "ledger.db"), Planner(config.offer), self.decider, self.send,
            deployment.caching,
        )  # fmt: skip
        self.judging = Judging(deployment.judging, self.dispatcher, data, self.send)
        self.dispatcher.verdicts.on_scores.append(self.decider.scored)
        self.dispatcher.verdicts.on_unjudged.append(self.decider.unjudged)
        self.stopped = asyncio.Event()
        self._tasks = Tasks()

    async def run(self) -> None:
        """Until stopped. What is open then stays in the ledger and is taken up by the next process."""
        dispatcher = self.dispatcher
        offered = await dispatcher.planner.start()
        await asyncio.to_thread(load_decider, self.decider, self.config, dispatcher.planner.families)
        log.info("on offer: %s", "; ".join(map(str, offered)))
        if self.config.load is not None:
            load = LoadControl(self.config.load, self.registry, cached=self.deployment.caching.scope != "off")
            sizes = dispatcher.planner.default_sizes()
            await asyncio.to_thread(load.start, offered, sizes, self.decider.router_versions)
            dispatcher.control(load)
        if restored := await dispatcher.restore():
            log.info("%d jobs of an earlier process are taken up again", restored)
        loops = [
            self._hear(self.control, self._control),
            self._hear(self.data, self._bulk),
            dispatcher.run(),
            self.judging.run(),
            dispatcher.settling.run(),
            self._tidy(),
        ]
        if dispatcher.load is not None:
            loops.append(dispatcher.load.run())
        if self.config.http is not None:
            from nodes.gateway.http import make_app, serve
            from nodes.gateway.judge_metrics import JudgeMetrics

            app = make_app(dispatcher, self.config, self.status)
            app.state.api.metrics.registry.register(JudgeMetrics(self.judging, dispatcher.verdicts))
            if dispatcher.load is not None:
                from nodes.gateway.load_metrics import LoadMetrics

                app.state.api.metrics.registry.register(LoadMetrics(dispatcher.load))
            loops.append(serve(app, self.config.http))
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        self.startup_s = time.monotonic() - self.started
        log.info("ready after %.1f s, %.0f MB", self.startup_s, memory_bytes() / 1e6)
        stop = asyncio.ensure_future(self.stopped.wait())
        try:
            done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stop}:
                task.result()
        finally:
            self._tasks.cancel()
            self.judging.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await dispatcher.timeline.flush()
            await dispatcher.settling.settle()
            dispatcher.ledger.close()
            self.decider.close()

    async def send(self, name: str, message: Message) -> bool:
        """To a node's control socket; False where it is gone."""
        node = self.registry.nodes.get(name)
        if node is None:
            return False
        told = await sent(self.control.send(node.identity, message, timeout_s=SEND_S))
        node.out_of_reach = not told  # until it is heard again: the same job would be sent to it again and again
        return told

    async def _hear(self, server: Server, act: Act) -> None:
        while True:
            identity, peer, message, payloads = await server.receive()
            try:
                await act(identity, peer, message, payloads)
            except Exception:  # what one sender says must not end the loop for all
                log.exception("%s from %s", type(message).__name__, peer.name)

    # --- control ---

    async def _control(self, identity: bytes, peer: Peer, message: Message, _: list[Any]) -> None:
        match message:
            case Register():
                await self._register(identity, peer, message)
                return
            case Submit() | Ask() | CancelJob() | Feedback():
                self._tasks.start(self._asked(self.control, identity, peer, message))  # may wait; the loop must not
                return
            case Drain() if peer.role == "client":
                told = await self.send(message.node, message)
                answer: Message = Told(ref=message.ref, what="drain", value=message.node)
                if not told:
                    answer = Refused(ref=message.ref, reason=f"there is no node {message.node}", status=404)
                await sent(self.control.send(identity, answer))
                return
            case Scores():
                await self.judging.hear(self.control, identity, peer, message, ())
                return
        node = self.registry.by_key(peer.key)
        if node is None:
            return  # it registers again when its heartbeats find no answer
        node.identity = identity
        self.registry.heard(node)
        match message:
            case Heartbeat():
                self.registry.heard(node, message)
                if (own := message.peers.get("gateway")) is not None:
                    node.round_trip_s = own.round_trip_s
                await sent(self.control.send(identity, HeartbeatSeen(sequence=message.sequence)))
            case Leaving():
                node.leaving = True
                log.info("node %s is leaving: %s", node.name, message.reason)
                if message.done:
                    node.heard = 0.0
                self.dispatcher.wake.set()
            case Taken() | Busy() | Progress() | Failed():
                await self.dispatcher.hear(node, message)
                if not isinstance(message, (Taken, Progress)):
                    self.dispatcher.wake.set()

    async def _register(self, identity: bytes, peer: Peer, message: Register) -> None:
        if peer.name != message.name:
            await sent(
                self.control.send(
                    identity, Refused(reason=f"this key is {peer.name}'s, not {message.name}'s", status=403)
                )
            )
            return
        if self.registry.taken(message.name, peer.key):
            await sent(
                self.control.send(identity, Refused(reason=f"a node {message.name} is here already", status=409))
            )
            return
        before = self.registry.nodes.get(message.name)
        node = self.registry.register(message, peer.role, peer.key, identity)
        if before is not None and before.register.session != message.session:
            await self.dispatcher.forgotten_by(node.name)
        await sent(
            self.control.send(
                identity,
                Registered(gateway=self.deployment.name, session=self.session, heartbeat_s=self.config.heartbeat_s),
            )
        )
        for job_id, attempt in message.running:
            job = self.dispatcher.jobs.get(job_id)
            if job is None or job.attempt != attempt:
                await sent(
                    self.control.send(identity, Cancel(job=job_id, attempt=attempt, reason="not wanted any more"))
                )
        if before is None or before.register.session != message.session:
            log.info(
                "node %s is here: %s",
                node.name,
                ", ".join(f"{h.family} {'+'.join(h.members)}" for h in message.holdings),
            )
        self.dispatcher.wake.set()

    # --- askers ---

    async def _asked(self, server: Server, identity: bytes, peer: Peer, message: Any) -> None:
        tenant = tenant_of(peer)
        payload: list[bytes | memoryview] = []
        try:
            if isinstance(message, Submit):
                request, jobs = await self.dispatcher.submit(
                    read_request(message.request), tenant, message.idempotency_key
                )
                answer: Message = Accepted(ref=message.ref, request=request, jobs=tuple(jobs))
            elif isinstance(message, Feedback):
                kept = await self.dispatcher.verdicts.rated(tenant, message.job, message.rating, message.comment)
                answer = Told(ref=message.ref, what="feedback", value=kept)
            elif isinstance(message, CancelJob):
                await self._cancel(tenant, message.job)
                answer = Told(ref=message.ref, what="cancel", value=message.job)
            else:
                value, payload = await self._answer(peer, tenant, message)
                answer = Told(ref=message.ref, what=message.what, value=value)
        except Refusal as refusal:
            answer = Refused(
                ref=message.ref, reason=str(refusal), status=refusal.status, retry_after_s=refusal.retry_after_s
            )
        except RelayError as error:
            answer = Refused(ref=message.ref, reason=str(error), status=400)
        await sent(server.send(identity, answer, payload))

    async def _cancel(self, tenant: str, job_id: str) -> None:
        job = self.dispatcher.jobs.get(job_id)
        if job is None or job.tenant != tenant:
            raise Refusal(f"there is no open job {job_id}", 404)
        await self.dispatcher.cancel(job)

    async def _answer(self, peer: Peer, tenant: str, ask: Ask) -> tuple[Any, list[bytes | memoryview]]:
        dispatcher = self.dispatcher
        if ask.what == "status":
            return self.status(), []
        if ask.what == "jobs":
            return [of_job(job).told() for job in dispatcher.jobs.values() if job.tenant == tenant], []
        job = dispatcher.jobs.get(ask.job)
        if job is not None and job.tenant == tenant and ask.wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(ask.wait_s, 60.0)):
                    await job.ended.wait()
            record = of_job(job) if job.stage.ended else await find(dispatcher, tenant, ask.job)
        else:
            record = await find(dispatcher, tenant, ask.job)
        if ask.what == "trace":
            return await asyncio.to_thread(dispatcher.ledger.events_of, ask.job), []
        if ask.what == "image":
            if record.stage is not Stage.DONE:
                raise Refusal(f"job {record.id} has no image: it is {record.stage}", 404)
            return record.told(), [await picture_of(dispatcher, record)]
        if ask.what == "job":
            return record.told(), []
        raise BadRequest(f"unknown question {ask.what!r}")

    # --- data ---

    async def _bulk(self, identity: bytes, peer: Peer, message: Any, payloads: list[Any]) -> None:
        if isinstance(message, Ask):  # an image is bulk
            self._tasks.start(self._asked(self.data, identity, peer, message))
            return
        if isinstance(message, (JudgeHere, Scores, KeptPicture)):
            await self.judging.hear(self.data, identity, peer, message, payloads)
            return
        node = self.registry.by_key(peer.key)
        if node is None:
            return
        self.registry.heard(node)
        match message:
            case Checkpoint():
                data = bytes(payloads[0])
                self.dispatcher.checkpoint(node, message.job, message.attempt, message.leg, message.index, data)
                await self._seen(identity, message, "checkpoint", message.leg, message.index)
            case Preview():
                job = self._current(node, message.job, message.attempt)
                if job is not None:
                    job.preview = bytes(payloads[0])
                    job.tell("preview", step=message.step)
            case Result():
                png = bytes(payloads[0]) if payloads and len(payloads[0]) else None
                if await self.dispatcher.result(node, message, png):
                    await self._seen(identity, message, "result")
                else:
                    full = Refused(what="result", job=message.job, reason="it cannot be written now", status=507)
                    await sent(self.data.send(identity, full))
                self.dispatcher.wake.set()
            case Fetch():
                job = self._current(node, message.job, message.attempt)
                kept = self.dispatcher.checkpoints.get(message.job) if job else None
                if kept is None:
                    await sent(
                        self.data.send(identity, NotHere(job=message.job, attempt=message.attempt, leg=message.leg))
                    )
                else:
                    latent = Latent(job=message.job, attempt=message.attempt, leg=message.leg)
                    await sent(self.data.send(identity, latent, [kept[2]]))

    def _current(self, node: Node, job_id: str, attempt: int) -> Job | None:
        job = self.dispatcher.jobs.get(job_id)
        return job if job is not None and job.attempt == attempt and node.name in job.nodes() else None

    async def _seen(self, identity: bytes, message: Any, what: str, leg: int = 0, index: int = 0) -> None:
        await sent(
            self.data.send(identity, Seen(job=message.job, attempt=message.attempt, what=what, leg=leg, index=index))
        )

    # --- around ---

    async def _tidy(self) -> None:
        """Forget what is older than the config keeps."""
        while True:
            await asyncio.sleep(60)
            await tidy(self.dispatcher.ledger, self.store, self.config.keep_hours, self.config.keep_mb)

    def status(self) -> dict[str, Any]:
        dispatcher = self.dispatcher
        return {
            "gateway": self.deployment.name, "data": self.config.data_address,
            "version": version(), "up_s": round(time.monotonic() - self.started, 1), "startup_s": self.startup_s,
            "memory_bytes": memory_bytes(), "cpu_s": cpu_s(),
            "policy": self.decider.name, "decisions": self.decider.status(),
            "open": len(dispatcher.jobs), "queue": self.config.queue,
            "stages": _counted(str(job.stage) for job in dispatcher.jobs.values()), "counters": dict(dispatcher.counters),
            "checkpoints": {"jobs": len(dispatcher.checkpoints), "bytes": dispatcher.checkpoints.bytes,
                            "to": self.config.checkpoints_to},
            "load": dispatcher.load.told() if dispatcher.load is not None else None,
            "judge": self.judging.told(), "nodes": self.registry.told(),
        }  # fmt: skip


def tenant_of(peer: Peer) -> str:
    """Whose jobs a connection sees: its key's tenant, else its own; all of plain text is one tenant."""
    if peer.key == f"{peer.role}/{peer.name}":  # plain text
        return "local"
    return peer.tenant or f"key:{peer.key}"


def _counted(values: Any) -> dict[str, int]:
    from collections import Counter

    return dict(Counter(values))


def _only_one(store: Path) -> Any:
    lock = (store / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise BadRequest(f"another gateway works on {store}: stop it, or give this one another `store`") from None
    return lock
