"""A node's presence at the gateway: what it holds, said first and after every cut, then a heartbeat and what real traffic took.

Heartbeats come from a loop of their own, so they wait neither for the compute thread nor behind bulk data.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nodes.messages import Heartbeat, HeartbeatSeen, Message, PeerStats, Register, Registered
from nodes.own_process import cpu_s, memory_bytes
from nodes.results import version
from nodes.transport import CONNECTED, sent
from relay.batching import faded

if TYPE_CHECKING:
    from nodes.compute import Compute
    from nodes.deployment import NodeConfig
    from nodes.exchange import Exchange
    from nodes.transport import Client

log = logging.getLogger("relay.node")
UNANSWERED = 6  # heartbeats without an answer: register again


class Presence:
    """`running`: (job, attempt) that the node works on for the gateway. `cache`: what its latent cache says of itself."""

    def __init__(
        self, name: str, config: NodeConfig, control: Client, exchange: Exchange, compute: Compute,
        running: Callable[[], tuple[tuple[str, int], ...]], held: Callable[[], int], cache: Callable[[], dict[str, Any]],
    ):  # fmt: skip
        self.name, self.config = name, config
        self.control, self.exchange, self.compute = control, exchange, compute
        self.running, self.held, self.cache = running, held, cache
        self.session = secrets.token_hex(6)
        self.startup_s = 0.0
        self.heartbeat_s = 0.5
        self.round_trip_s: float | None = None
        self._registered = asyncio.Event()
        self._beaten: dict[int, float] = {}  # sequence -> when
        self._sequence = 0

    @property
    def reachable(self) -> bool:
        """Whether the gateway is there."""
        return self._registered.is_set() and self.control.state.kind == CONNECTED

    async def tell(self, message: Message) -> bool:
        """To the gateway; False while it cannot be reached: what matters is said again when it is back.

        Silently: the transport says, and not each time, why it is not connected."""
        return await sent(self.control.send(message, timeout_s=2 * self.heartbeat_s), logging.DEBUG)

    async def register(self) -> None:
        config, checkpoints = self.config, self.config.checkpoints
        await self.tell(
            Register(
                name=self.name, session=self.session, holdings=self.compute.holdings, batch=config.batch,
                queue=config.queue, data_address=config.data_address, pace=config.pace, version=version(),
                startup_s=self.startup_s, memory_bytes=memory_bytes(), running=self.running(),
                checkpoints=checkpoints if checkpoints is not None else config.role == "edge",
                judge=config.judge, pad=self.exchange.pad,
            )
        )  # fmt: skip

    def hear(self, message: Registered | HeartbeatSeen) -> None:
        match message:
            case Registered():
                self.heartbeat_s = message.heartbeat_s
                self._beaten.clear()
                self._registered.set()
                log.info("registered with %s", message.gateway)
            case HeartbeatSeen():
                if (beaten := self._beaten.pop(message.sequence, None)) is not None:
                    self._beaten = {k: v for k, v in self._beaten.items() if k > message.sequence}
                    self.round_trip_s = time.monotonic() - beaten

    async def beat(self) -> None:
        """Heartbeats; when none was answered for a while, register again."""
        while True:
            await asyncio.sleep(self.heartbeat_s)
            if not self.compute.ready.is_set():
                continue
            if self.compute.failed is not None:
                raise self.compute.failed
            if not self._registered.is_set():
                await self.register()
                continue
            self._sequence += 1
            self._beaten[self._sequence] = time.monotonic()
            if len(self._beaten) > UNANSWERED:
                log.warning("the gateway has not answered for %d heartbeats: registering again", len(self._beaten))
                self._registered.clear()
                self._beaten.clear()
                continue
            await self.tell(self._heartbeat())

    def _heartbeat(self) -> Heartbeat:
        compute = self.compute
        queued = sum(1 for work in list(compute.works.values()) if work.stage != "denoising")
        idle_s = time.monotonic() - compute.last_busy
        return Heartbeat(
            sequence=self._sequence, doing=compute.doing, running=self.held() - queued, queued=queued,
            steps_done=compute.steps_done, idle_s=idle_s, last_error=compute.last_error,
            battery=self._battery(), memory_bytes=memory_bytes(), cpu_s=cpu_s(), batch_bound=compute.batch_bound,
            slower=round(faded(compute.slower, idle_s), 3), peers=self._peers(), cache=self.cache(),
        )  # fmt: skip

    def _peers(self) -> dict[str, PeerStats]:
        """What real traffic to each peer took; to the gateway with the heartbeats' round trip."""
        import msgspec

        exchange = self.exchange
        found = {a: client.meter.stats() for a, client in exchange.clients.items() if a != exchange.gateway_address}
        own = exchange.gateway.meter.stats()
        return found | {"gateway": msgspec.structs.replace(own, round_trip_s=self.round_trip_s)}

    def _battery(self) -> float | None:
        if self.config.battery is not None:
            return self.config.battery
        try:
            import psutil

            found = psutil.sensors_battery()
        except (ImportError, AttributeError, OSError):
            return None
        return None if found is None else found.percent / 100
