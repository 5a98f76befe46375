"""A gateway's dispatcher with real nodes' compute in this process, served over real HTTP; only the sockets between gateway
and node are left out: what the dispatcher sends goes to a compute thread, and what that emits comes back."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx

from nodes.compute import Compute, Event
from nodes.deployment import GatewayConfig, Offer
from nodes.gateway.deciding import Decider, open_log
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.http import make_app, serve
from nodes.gateway.ledger import Ledger
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Node, Registry
from nodes.messages import Assign, Cancel, Failed, Heartbeat, Holding, Message, Progress, Register, Result
from nodes.tasks import Tasks
from scheduler.baselines import load_policy

PROMPT = "a red heart"
HANGS = {"model": "mini-sdxl", "mode": "edge-only"}  # goes to a node that is there and never answers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """A thread with an event loop: dispatcher, one working edge, one device that takes work and does nothing. Without
    `compute` nobody is there, and what is accepted waits."""

    def __init__(self, store: Path, queue: int = 24, compute: bool = True):
        self.store = store
        self.compute: Compute | None = None
        offer = [Offer(family="mini-sd3", steps=4, handoff=2), Offer(family="mini-sdxl", mode="edge-only")]
        self.config = GatewayConfig(store=str(store), http=None, offer=offer, queue=queue, heartbeat_s=1.0)
        self.loop = asyncio.new_event_loop()
        self.servers: dict[str, asyncio.Task[None]] = {}
        self.cancelled: list[str] = []  # jobs that the silent device was told to drop
        self._tasks = Tasks()
        ready: Future[None] = Future()
        self.thread = threading.Thread(target=self._run, args=(ready, compute), daemon=True)
        self.thread.start()
        ready.result(timeout=60)

    def call(self, work: Any, timeout_s: float = 30.0) -> Any:
        """Run a coroutine in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def listen(self, **config: Any) -> str:
        """Serve an app of its own over the same dispatcher; its address."""
        import msgspec

        address = f"127.0.0.1:{free_port()}"
        made = msgspec.structs.replace(self.config, http=address, **config)

        async def start() -> None:
            app = make_app(self.dispatcher, made, lambda: {"nodes": self.registry.told()})
            self.servers[address] = asyncio.ensure_future(serve(app, address))

        self.call(start())
        for _ in range(200):
            try:
                httpx.get(f"http://{address}/healthz")
                return f"http://{address}"
            except httpx.HTTPError:
                time.sleep(0.02)
        raise AssertionError(f"nothing listens on {address}")

    def hang_up(self, url: str) -> None:
        """Stop serving there, as the gateway does when it ends."""

        async def stop() -> None:
            task = self.servers.pop(url.removeprefix("http://"))
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self.call(stop())

    def close(self) -> None:
        for address in list(self.servers):
            self.hang_up(address)
        if self.compute is not None:
            self.compute.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=10)
        self.dispatcher.ledger.close()

    def _run(self, ready: Future[None], compute: bool) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_until_complete(self._start(compute))
            ready.set_result(None)
        except BaseException as error:
            ready.set_exception(error)
            raise
        self.loop.run_forever()
        for task in (left := asyncio.all_tasks(self.loop)):
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    async def _start(self, compute: bool) -> None:
        self.registry = Registry(self.config.heartbeat_s)
        self.dispatcher = Dispatcher(
            self.config, self.registry, Ledger(self.store / "ledger.db"), Planner(self.config.offer),
            Decider(open_log(self.store / "decisions.db", "off"), load_policy("least-finish-time")), self._send,
        )  # fmt: skip
        await self.dispatcher.planner.start()
        self._kept = [asyncio.ensure_future(work) for work in (self.dispatcher.run(), self._beat())]
        if compute:
            await self._populate()

    async def _populate(self) -> None:
        self.compute = Compute(
            {"mini-sd3": ("large", "small")},
            lambda event: self.loop.call_soon_threadsafe(self._happened, event),
            batch=2, device="cpu",
        )  # fmt: skip
        self.compute.start()
        await self.loop.run_in_executor(None, self.compute.ready.wait)
        assert self.compute.failed is None
        asleep = Holding(
            family="mini-sdxl", members=("small",), decodes=True, fingerprint={}, curves={"small": {1: 2.0}}
        )
        for name, role, holdings in (("edge-1", "edge", self.compute.holdings), ("phone", "device", (asleep,))):
            said = Register(name=name, session="1", holdings=holdings, batch=2, queue=64)
            self.registry.register(said, role, f"{role}/{name}", name.encode())

    async def _beat(self) -> None:
        for i in range(1 << 30):
            for node in self.registry.nodes.values():
                beat = Heartbeat(sequence=i, doing="idle", running=0, queued=0, steps_done=i, idle_s=0.0)
                self.registry.heard(node, beat)
            await asyncio.sleep(0.3)

    async def _send(self, name: str, message: Message) -> bool:
        assert self.compute is not None
        match message:
            case Assign() if name == "edge-1":
                self.compute.take(message, time.monotonic() + (message.deadline_s or 60.0))
            case Cancel() if name == "edge-1":
                self.compute.cancel(message.job, message.attempt)
            case Cancel():
                self.cancelled.append(message.job)
        return True

    def _happened(self, event: Event) -> None:
        """As nodes/node.py tells the gateway."""
        self._tasks.start(self._tell(self.registry.nodes["edge-1"], event))

    async def _tell(self, node: Node, event: Event) -> None:
        job, attempt, *_ = event.key
        match event.kind:
            case "stage" | "progress":
                await self.dispatcher.hear(
                    node,
                    Progress(
                        job=job, attempt=attempt, stage=event.stage, leg=event.leg, step=event.step, of=event.of,
                        spent_s=event.spent_s, left=event.report.get("left", ""), batch=event.batch,
                    ),
                )  # fmt: skip
            case "preview":
                if (found := self.dispatcher.jobs.get(job)) is not None:
                    found.preview = event.data
                    found.tell("preview", step=event.step)
            case "image":
                made = Result(job=job, attempt=attempt, width=64, height=64, report=event.report)
                await self.dispatcher.result(node, made, event.data)
            case "failed":
                await self.dispatcher.hear(
                    node, Failed(job=job, attempt=attempt, kind=event.stage, reason=event.reason)
                )
