"""A node's bulk traffic, all of it on data sockets: latents in and out, checkpoints, results.

    fetch      dial whoever has the latent, ask, ask again after a time-out, until it comes or its job is cancelled
    serve      answer those who fetch from this edge, at once or as soon as it is there
    put        a device dials the edge that walks on
    deliver    results, again and again until the gateway says that it has them
    checkpoint the newest of each job, one at a time, and only while no result waits: to the gateway, or to the edge that
               keeps them; what that one does not take goes to the gateway
    keep       an edge that the config names keeps other nodes' checkpoints

Each send that is acknowledged (`Seen`) gives the peer's throughput, and the next time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from nodes.depot import CHECKPOINT, EMBEDDINGS, Depot, Waiting
from nodes.messages import (
    Allow,
    Assign,
    Checkpoint,
    Embeddings,
    Fetch,
    KeptPicture,
    Latent,
    Message,
    NotHere,
    Preview,
    Refused,
    Result,
    Seen,
    Source,
    name_of,
    seen_of,
)
from nodes.tasks import Tasks, background
from nodes.transport import CONNECTED, Client, Server, sent

log = logging.getLogger("relay.node")
Key = tuple[str, int]  # job, attempt
GIVE_UP_S = 8.0  # a peer that cannot be reached for so long is lost, as far as a job is concerned
ASK_AGAIN_S = 2.0  # a question may be lost with the connection that it went by
UNKNOWN_S = 5.0  # a fetch may come before the gateway's word that it is right


class Lost(Exception):
    """A latent cannot be had from, or given to, the node that a job named."""


class Exchange:
    """`dial(address, key)` makes a client to a data socket; `gateway` is the one to the gateway's."""

    def __init__(
        self, gateway: Client, gateway_address: str, dial: Callable[[str, str], Client], server: Server | None,
        pad: Mapping[str, int] | None = None, checkpoint_bytes: int = 256 << 20,
    ):  # fmt: skip
        self.gateway, self.gateway_address, self.dial, self.server = gateway, gateway_address, dial, server
        self.pad = dict(pad or {})  # kind of data message -> bytes that it is brought to
        self.depot = Depot(checkpoint_bytes=checkpoint_bytes)
        self.on_kept: Callable[[Checkpoint], None] | None = None  # told of each that an edge has taken
        self.clients: dict[str, Client] = {gateway_address: gateway}
        self.results: OrderedDict[Key, tuple[Result, list[bytes]]] = OrderedDict()
        self.checkpoints: OrderedDict[str, tuple[Message, bytes]] = OrderedDict()
        self.elsewhere: OrderedDict[str, tuple[Checkpoint, bytes, Source]] = OrderedDict()
        self.work, self.work_elsewhere = asyncio.Event(), asyncio.Event()
        self._latents: dict[tuple[str, int], asyncio.Future[bytes | memoryview]] = {}
        self._seen: dict[tuple[str, int, str, int, int], asyncio.Future[bool]] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._puts: dict[tuple[str, int], tuple[str, asyncio.Future[bytes | memoryview]]] = {}
        self._early: OrderedDict[tuple[str, int], tuple[str, bytes]] = OrderedDict()
        self._on_their_way: dict[tuple[str, int, bytes], float] = {}
        self._tasks = Tasks()

    # --- in ---

    async def obtain(self, assign: Assign, leg: int) -> bytes | memoryview:
        """The latent before leg `leg` (or the job's embeddings), from where the assignment says. Lost otherwise."""
        source = assign.source
        if source.checkpoint:
            leg = CHECKPOINT
        if source.kind == "held":
            if (data := self.depot.get(assign.job, leg)) is None:
                raise Lost("the latent that was kept here is gone")
            return data
        if source.kind == "put":
            return await self._wait_for_put(assign, leg)
        return await self._fetch(assign, source, leg)

    async def _fetch(self, assign: Assign, source: Source, leg: int) -> bytes | memoryview:
        client = await self._client(source)
        key = (assign.job, leg)
        future = self._latents.setdefault(key, asyncio.get_running_loop().create_future())
        question = Fetch(job=assign.job, attempt=assign.attempt, leg=leg)
        out_of_reach = time.monotonic()
        try:
            while True:
                await sent(client.send(question))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ASK_AGAIN_S):
                        data = await asyncio.shield(future)
                    await sent(client.send(seen_of(_carrier(assign.job, assign.attempt, leg))))
                    return data
                if client.state.kind == CONNECTED:
                    out_of_reach = time.monotonic()
                elif time.monotonic() - out_of_reach > GIVE_UP_S:
                    why = client.state.reason or client.state.kind
                    raise Lost(f"node {source.node} cannot be reached: {why}")
        finally:
            self._latents.pop(key, None)

    async def _wait_for_put(self, assign: Assign, leg: int) -> bytes | memoryview:
        key = (assign.job, leg)
        early = self._early.pop(key, None)
        if early is not None and early[0] == assign.source.key:
            return early[1]
        future: asyncio.Future[bytes | memoryview] = asyncio.get_running_loop().create_future()
        self._puts[key] = assign.source.key, future
        try:
            return await future
        finally:
            self._puts.pop(key, None)

    async def _client(self, source: Source) -> Client:
        if source.address not in self.clients:
            client = self.dial(source.address, source.key)
            await client.connect()
            self.clients[source.address] = client
        client = self.clients[source.address]
        if source.address not in self._readers or self._readers[source.address].done():
            self._readers[source.address] = background(self._read(client))
        return client

    async def _read(self, client: Client) -> None:
        """What comes back on a data socket that this node dialled."""
        while True:
            message, payloads = await client.receive()
            match message:
                case Latent() | Embeddings():
                    leg = message.leg if isinstance(message, Latent) else EMBEDDINGS
                    if (future := self._latents.get((message.job, leg))) and not future.done():
                        future.set_result(bytes(payloads[0]))
                case NotHere():
                    if (future := self._latents.get((message.job, message.leg))) and not future.done():
                        future.set_exception(Lost("the node that had its latent has it no more"))
                case Seen():
                    key = (message.job, message.attempt, message.what, message.leg, message.index)
                    if (seen := self._seen.get(key)) and not seen.done():
                        seen.set_result(True)
                case Refused(what="result"):  # a full disk, say: it is sent again
                    for key, seen in self._seen.items():
                        if key[0] == message.job and key[2] == "result" and not seen.done():
                            seen.set_result(False)

    # --- out: an edge's own data socket ---

    async def serve(self) -> None:
        """Answer those who dial this edge."""
        assert self.server is not None
        while True:
            identity, peer, message, payloads = await self.server.receive()
            match message:
                case Fetch():
                    self.depot.wait(message.job, message.leg, Waiting(identity, peer.key, message.attempt))
                    self._tasks.start(self._serve(message.job, message.leg))
                case Latent():
                    self._tasks.start(self._put_here(identity, peer.key, message, bytes(payloads[0])))
                case Checkpoint():
                    if self.depot.keep(peer.key, message.job, message.leg, message.index, bytes(payloads[0])):
                        self._tasks.start(sent(self.server.send(identity, seen_of(message))))

    async def _serve(self, job: str, leg: int) -> None:
        """Send a kept handoff (or embeddings) to those who wait for it and may have it."""
        data = self.depot.get(job, leg)
        for waiting in self.depot.due(job, leg):
            assert data is not None
            await self._hand_out(waiting.identity, job, leg, waiting.attempt, data)

    async def _hand_out(self, identity: bytes, job: str, leg: int, attempt: int, data: bytes) -> None:
        """Send it, unless it is on its way: whoever asks again while a slow link still carries it gets it once."""
        assert self.server is not None
        key, now = (job, leg, identity), time.monotonic()
        if now < self._on_their_way.get(key, 0.0):
            return
        self._on_their_way[key] = now + self.server.meter(identity).timeout_for(len(data))
        message = _carrier(job, attempt, leg)
        await sent(self.server.send(identity, message, self._padded(name_of(message), data)))

    async def _put_here(self, identity: bytes, key: str, message: Latent, data: bytes) -> None:
        assert self.server is not None
        wanted = self._puts.get((message.job, message.leg))
        if wanted is None:
            self._early[message.job, message.leg] = key, data
            while len(self._early) > 64:
                self._early.popitem(last=False)
        elif wanted[0] == key and not wanted[1].done():
            wanted[1].set_result(data)
        await sent(self.server.send(identity, seen_of(message)))

    def expect(self, assign: Assign) -> None:
        """An assignment has come: what it ends with may be fetched by the node that walks on."""
        if self.server is not None and assign.next_key:
            self.allow(Allow(job=assign.job, leg=assign.last_leg + 1, key=assign.next_key))

    def allow(self, message: Allow) -> None:
        """Who walks on from a handoff fetches the embeddings that belong to it, too."""
        for leg in (message.leg,) if message.leg == CHECKPOINT else (message.leg, EMBEDDINGS):
            self.depot.allow(message.job, leg, message.key)
            self._tasks.start(self._serve(message.job, leg))

    async def keep(self, job: str, leg: int, data: bytes) -> None:
        """Keep a handoff (or embeddings) and send it to those who wait."""
        self.depot.put(job, leg, data)
        await self._serve(job, leg)

    async def forget_strays(self) -> None:
        """Tell those who wait in vain."""
        for job, leg, waiting in self.depot.in_vain(UNKNOWN_S):
            if self.server is not None:
                log.warning("job %s: a latent was asked for that is not here, or not for who asked", job)
                await sent(self.server.send(waiting.identity, NotHere(job=job, attempt=waiting.attempt, leg=leg)))

    # --- out: dialled ---

    async def put(self, assign: Assign, leg: int, data: bytes) -> None:
        """Give the latent to the edge that walks on; Lost where it does not take it."""
        assert assign.put_to is not None
        client = await self._client(assign.put_to)
        message = Latent(job=assign.job, attempt=assign.attempt, leg=leg)
        if not await self._send_seen(client, message, data, "latent", leg, 0, tries=3):
            raise Lost(f"node {assign.put_to.node} did not take the latent")

    def deliver(self, result: Result, png: list[bytes]) -> None:
        self.results[result.job, result.attempt] = result, png
        self.work.set()

    def checkpoint(self, message: Checkpoint | Preview, data: bytes, keeper: Source | None = None) -> None:
        """The newest of a job replaces one that was not sent yet. `keeper`: the edge that it is for; None: the gateway."""
        if keeper is not None and isinstance(message, Checkpoint):
            self.elsewhere[message.job] = message, data, keeper
            self.work_elsewhere.set()
        else:
            self.checkpoints[f"{type(message).__name__} {message.job}"] = message, data
            self.work.set()

    async def show(self, message: KeptPicture, png: bytes) -> None:
        """A kept picture, for judging."""
        await sent(self.gateway.send(message, self._padded("image", png)))

    async def post(self) -> None:
        """Results first, then checkpoints; what is not seen is sent again."""
        await self._client(Source(kind="fetch", address=self.gateway_address))
        while True:
            if self.results:
                key, (result, png) = next(iter(self.results.items()))
                if await self._send_seen(self.gateway, result, b"".join(png), "result", 0, 0):
                    self.results.pop(key, None)
                else:
                    if key in self.results:  # its job may have ended meanwhile
                        self.results.move_to_end(key)
                    await asyncio.sleep(0.5)
            elif self.checkpoints:
                _, (message, data) = self.checkpoints.popitem(last=False)
                if isinstance(message, Checkpoint):
                    await self._send_seen(self.gateway, message, data, "checkpoint", message.leg, message.index)
                else:
                    await sent(self.gateway.send(message, [data]))
            else:
                self.work.clear()
                await self.work.wait()

    async def post_elsewhere(self) -> None:
        """Checkpoints for an edge that keeps them. Apart from the rest: no result waits for an edge that is gone."""
        while True:
            if not self.elsewhere:
                self.work_elsewhere.clear()
                await self.work_elsewhere.wait()
            elif self.results:
                await asyncio.sleep(0.05)
            else:
                _, (message, data, keeper) = self.elsewhere.popitem(last=False)
                client = await self._client(keeper)
                if not await self._send_seen(client, message, data, "checkpoint", message.leg, message.index):
                    self.checkpoint(message, data)
                elif self.on_kept is not None:
                    self.on_kept(message)

    async def _send_seen(
        self,
        client: Client,
        message: Any,
        data: bytes,
        what: str,
        leg: int,
        index: int,
        tries: int = 1,
    ) -> bool:
        """Send and wait for its acknowledgement, for as long as its bytes should take and its connection stands. False
        where it did not come, or the other side said that it does not take it now."""
        key = (message.job, message.attempt, what, leg, index)
        kind = "image" if what == "result" else "latent"
        future = self._seen[key] = asyncio.get_running_loop().create_future()
        try:
            for _ in range(tries):
                if not await sent(client.send(message, self._padded(kind, data) if data else [])):
                    continue
                lost = asyncio.ensure_future(client.connected(after=client.state.number))
                limit = client.meter.timeout_for(len(data))
                await asyncio.wait({future, lost}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                renewed = lost.done()
                lost.cancel()
                if future.done():
                    return future.result()
                if not renewed:  # a connection that was renewed took it along, which says nothing of the line
                    client.meter.gave_up(message)
            return False
        finally:
            self._seen.pop(key, None)

    def _padded(self, kind: str, data: bytes) -> list[bytes | memoryview]:
        """With zeros behind it where the config charges a real family's size, as a scaled link needs."""
        rest = self.pad.get(kind, 0) - len(data)
        return [data, bytes(rest)] if rest > 0 else [data]

    def release(self, job: str) -> None:
        """The job has ended: nothing of it is needed any more."""
        self.depot.release(job)
        for name in ("Checkpoint", "Preview"):
            self.checkpoints.pop(f"{name} {job}", None)
        self.elsewhere.pop(job, None)
        for key in [k for k in self.results if k[0] == job]:
            self.results.pop(key)
        for under_way in [k for k in self._on_their_way if k[0] == job]:
            self._on_their_way.pop(under_way)
        for early in [k for k in self._early if k[0] == job]:
            self._early.pop(early)

    async def close(self) -> None:
        self._tasks.cancel()
        for reader in self._readers.values():
            reader.cancel()
        for address, client in self.clients.items():
            if address != self.gateway_address:
                await client.close()


def _carrier(job: str, attempt: int, leg: int) -> Latent | Embeddings:
    """What a kept handoff, or embeddings, travel as."""
    if leg == EMBEDDINGS:
        return Embeddings(job=job, attempt=attempt)
    return Latent(job=job, attempt=attempt, leg=leg)
