"""Checkpoints at an edge that keeps them for others, over real sockets with real keys."""

import asyncio
import contextlib

import pytest
from wires import LIMIT_S, eventually, in_loop

from nodes.depot import CHECKPOINT
from nodes.exchange import Exchange, Lost
from nodes.keys import Peer
from nodes.messages import Allow, Assign, Checkpoint, Source, seen_of
from nodes.transport import DATA, Client

REACHED = Checkpoint(job="j", attempt=1, leg=0, index=4)


@contextlib.asynccontextmanager
async def exchange_of(keys, name, role, gateway, bound=None):
    """A node's exchange with its loops; `bound`: its own data socket."""
    async with keys.client(gateway, name, role) as client:

        def dial(address, key):
            return Client(address, DATA, client.me, Peer(name=key, role="edge", key=key))

        made = Exchange(client, gateway.address, dial, bound)
        loops = [made.post(), made.post_elsewhere(), *([made.serve()] if bound else [])]
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await made.close()


@contextlib.asynccontextmanager
async def nodes(keys):
    """A gateway that says that it has what it gets, the edge that keeps, two that walk; and what the gateway got."""
    got = []

    async def answer(server):
        while True:
            received = await server.receive()
            got.append((received.peer.name, received.message))
            await server.send(received.identity, seen_of(received.message))

    async with keys.server(DATA) as gateway, keys.server(DATA, "keeper", "edge") as bound:
        answering = asyncio.create_task(answer(gateway))
        async with (
            exchange_of(keys, "keeper", "edge", gateway, bound) as keeper,
            exchange_of(keys, "edge-1", "edge", gateway) as first,
            exchange_of(keys, "phone", "device", gateway) as second,
        ):
            yield keeper, first, second, got
        answering.cancel()


def at(keys, keeper, kind="put", **more):
    return Source(kind=kind, node="keeper", address=keeper.server.address, key=keys.public("keeper").key, **more)


def going_on(source):
    return Assign(
        job="j", attempt=2, program="p", prompt="", negative=None, seed=0, width=8, height=8, first_leg=0, last_leg=0,
        source=source,
    )  # fmt: skip


@in_loop
async def test_another_node_goes_on_from_what_an_edge_keeps_until_the_job_ends(keys):
    async with nodes(keys) as (keeper, first, second, got):
        kept = asyncio.Queue()
        first.on_kept = kept.put_nowait
        keeper.allow(Allow(job="j", leg=CHECKPOINT, key=keys.public("edge-1").key))
        first.checkpoint(REACHED, b"latent", at(keys, keeper))
        assert await asyncio.wait_for(kept.get(), LIMIT_S) == REACHED
        fetching = asyncio.create_task(second.obtain(going_on(at(keys, keeper, "fetch", checkpoint=True)), 0))
        await asyncio.sleep(0.05)
        assert not fetching.done()  # the gateway has not named it yet
        keeper.allow(Allow(job="j", leg=CHECKPOINT, key=keys.public("phone").key))
        assert await asyncio.wait_for(fetching, LIMIT_S) == b"latent"
        own = going_on(Source(kind="held", checkpoint=True))
        assert await keeper.obtain(own, 0) == b"latent"
        keeper.release("j")
        with pytest.raises(Lost):
            await keeper.obtain(own, 0)
        assert got == []


@in_loop
async def test_what_the_edge_does_not_take_goes_to_the_gateway(keys, monkeypatch):
    monkeypatch.setattr("nodes.transport.meter.SHORTEST_S", 0.1)
    monkeypatch.setattr("nodes.transport.meter.DEFAULT_ROUND_TRIP_S", 0.02)
    async with nodes(keys) as (keeper, first, _, got):
        first.checkpoint(REACHED, b"latent", at(keys, keeper))  # of a job for which the gateway named nobody
        await asyncio.wait_for(eventually(lambda: got), LIMIT_S)
        assert got == [("edge-1", REACHED)]
        assert keeper.depot.get("j", CHECKPOINT) is None
