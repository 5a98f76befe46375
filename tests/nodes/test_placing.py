"""Where a job goes and what its nodes are told: a real dispatcher, registry, planner and ledger; nodes are what they say."""

import asyncio

import msgspec
import pytest

from nodes.deployment import GatewayConfig, Offer
from nodes.depot import CHECKPOINT
from nodes.gateway.deciding import Decider, open_log
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.ledger import Ledger
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Registry
from nodes.messages import (
    Allow,
    Assign,
    Failed,
    Heartbeat,
    Holding,
    PeerStats,
    Progress,
    Register,
    Release,
    Result,
    Source,
)
from nodes.requests import ImageRequest
from scheduler.baselines import load_policy

OFFER = [Offer(family="mini-sd3", steps=4, handoff=2)]


@pytest.fixture(scope="module")
def planner():
    made = Planner(OFFER)
    asyncio.run(made.start())
    return made


class Gateway:
    """`told`: (node, message) as they were sent."""

    def __init__(self, store, planner, **config):
        self.config = GatewayConfig(store=str(store), http=None, offer=OFFER, **config)
        self.registry = Registry(60.0)
        self.told = []
        self.ledger = Ledger(store / "ledger.db")
        decider = Decider(open_log(store / "decisions.db", "off"), load_policy("least-finish-time"))
        self.dispatcher = Dispatcher(self.config, self.registry, self.ledger, planner, decider, self._send)

    async def _send(self, name, message):
        self.told.append((name, message))
        return True

    def node(self, name, member, step_s=0.01, bytes_per_s=None, slower=1.0, **said):
        role = "edge" if member == "large" else "device"
        holding = Holding(
            family="mini-sd3", members=(member,), decodes=True, fingerprint={}, curves={member: {1: step_s}}
        )
        message = Register(name=name, session="1", holdings=(holding,), batch=1, queue=8, **said)
        node = self.registry.register(message, role, f"{role}/{name}", name.encode())
        peers = {"gateway": PeerStats(round_trip_s=0.001, bytes_per_s=bytes_per_s)}
        beat = Heartbeat(
            sequence=1, doing="idle", running=0, queued=0, steps_done=0, idle_s=0.0, peers=peers, slower=slower
        )
        self.registry.heard(node, beat)
        return node

    def assigned(self):
        return {name: message for name, message in self.told if isinstance(message, Assign)}


async def placed(gateway, **request):
    """The job of a request, placed."""
    _, (job,) = await gateway.dispatcher.submit(ImageRequest(prompt="a red heart", **request), "local")
    await gateway.dispatcher.tick()
    return gateway.dispatcher.jobs[job]


@pytest.mark.parametrize(
    ("bytes_per_s", "pad", "chosen"),
    [
        (1e9, {}, "far"),
        (1e6, {}, "far"),
        (1e4, {}, "near"),  # its latent would take longer than the steps that are saved
        (1e6, {"latent": 524_288}, "near"),  # a scaled link is charged the real family's latent
        (1e6, {"image": 524_288}, "far"),  # the phone's, whoever is before it
    ],
)
def test_a_slow_link_changes_the_choice(tmp_path, planner, bytes_per_s, pad, chosen):
    async def work():
        gateway = Gateway(tmp_path, planner)
        gateway.node("far", "large", step_s=0.01, bytes_per_s=bytes_per_s, pad=pad, data_address="tcp://far:1")
        gateway.node("near", "large", step_s=0.02, bytes_per_s=1e9, pad=pad, data_address="tcp://near:1")
        gateway.node("phone", "small", bytes_per_s=1e9, pad=pad)
        job = await placed(gateway)
        gateway.ledger.close()
        return job

    assert [stretch.node for stretch in asyncio.run(work()).stretches] == [chosen, "phone"]


@pytest.mark.parametrize(("slower", "chosen"), [(1.0, "fast"), (1.9, "fast"), (2.5, "steady")])
def test_a_node_that_became_slower_than_it_registered_is_placed_by_what_it_is_now(tmp_path, planner, slower, chosen):
    async def work():
        gateway = Gateway(tmp_path, planner)
        gateway.node("fast", "large", step_s=0.05, bytes_per_s=1e9, slower=slower, data_address="tcp://fast:1")
        gateway.node("steady", "large", step_s=0.1, bytes_per_s=1e9, data_address="tcp://steady:1")
        gateway.node("phone", "small", bytes_per_s=1e9)
        job = await placed(gateway)
        gateway.ledger.close()
        return job

    assert [stretch.node for stretch in asyncio.run(work()).stretches] == [chosen, "phone"]


def test_a_dispatcher_that_is_called_off_as_something_happens_ends(tmp_path, planner):
    async def work():
        gateway = Gateway(tmp_path, planner)
        running = asyncio.create_task(gateway.dispatcher.run())
        await asyncio.sleep(0.01)
        gateway.dispatcher.wake.set()
        running.cancel()
        await asyncio.wait({running}, timeout=2)
        gateway.ledger.close()
        return running.cancelled()

    assert asyncio.run(work())


@pytest.mark.parametrize("wanted", [True, False])
def test_checkpoints_come_from_those_who_say_that_they_may_send_them(tmp_path, planner, wanted):
    async def work():
        gateway = Gateway(tmp_path, planner, checkpoint_every=2)
        gateway.node("edge", "large", checkpoints=wanted, data_address="tcp://edge:1")
        gateway.node("phone", "small", checkpoints=not wanted)
        await placed(gateway)
        gateway.ledger.close()
        return gateway.assigned()

    every = {name: assign.checkpoint_every for name, assign in asyncio.run(work()).items()}
    assert every == {"edge": 2 * wanted, "phone": 2 * (not wanted)}


def test_a_restarted_gateway_takes_the_result_of_where_the_job_was_last(tmp_path, planner):
    def there(gateway):
        gateway.node("edge", "large", data_address="tcp://edge:1")
        gateway.node("other", "large", data_address="tcp://other:1")
        return gateway.node("phone", "small")

    async def work():
        gateway = Gateway(tmp_path, planner)
        there(gateway)
        before = await placed(gateway, seed=3)
        await gateway.dispatcher.timeline.flush()
        gateway.ledger.close()
        gateway = Gateway(tmp_path, planner)
        phone = there(gateway)
        assert await gateway.dispatcher.restore() == 1
        result = Result(
            job=before.id, attempt=before.attempt, width=64, height=64,
            report={"program": str(before.program), "seed": 3, "spent_s": {}},
        )  # fmt: skip
        assert before.nodes() < set(gateway.registry.nodes)
        stranger = next(node for node in gateway.registry.nodes.values() if node.name not in before.nodes())
        await gateway.dispatcher.result(stranger, result, b"another")
        assert before.id in gateway.dispatcher.jobs
        await gateway.dispatcher.result(phone, result, b"png")
        ended = gateway.ledger.job(before.id)
        gateway.ledger.close()
        return ended

    ended = asyncio.run(work())
    assert ended["stage"] == "done"
    assert (tmp_path / ended["image"]).read_bytes() == b"png"


def test_checkpoints_at_an_edge_are_where_a_job_goes_on(tmp_path, planner):
    async def work():
        gateway = Gateway(tmp_path, planner, checkpoints_to="keeper")
        dispatcher = gateway.dispatcher
        for name, step_s in (("near", 0.01), ("far", 0.02), ("keeper", 0.03)):
            gateway.node(name, "large", step_s, data_address=f"tcp://{name}:1")
        gateway.node("phone", "small")
        job = await placed(gateway)
        first = gateway.assigned()
        near = gateway.registry.nodes["near"]
        await dispatcher.hear(near, Progress(job=job.id, attempt=job.attempt, stage="kept", leg=0, step=1))
        near.heard = 0.0  # it is gone
        gateway.told.clear()
        await dispatcher.tick()
        job.not_before = 0.0
        await dispatcher.tick()
        again = gateway.assigned()
        allowed = [message for name, message in gateway.told if name == "keeper" and isinstance(message, Allow)]
        after = []
        for loser in ("phone", "far"):  # the phone missed far's handoff; far, what the keeper had: it is there no more
            lost = Failed(job=job.id, attempt=job.attempt, kind="lost", reason="it has it no more")
            await dispatcher.hear(gateway.registry.nodes[loser], lost)
            job.not_before = 0.0
            gateway.told.clear()
            await dispatcher.tick()
            after.append(gateway.assigned()["far"].source)
        await dispatcher.cancel(job)
        await asyncio.sleep(0.01)  # nodes are told of an end beside it
        gateway.ledger.close()
        return first, again, allowed, after, [name for name, message in gateway.told if isinstance(message, Release)]

    first, again, allowed, after, released = asyncio.run(work())
    keeper = Source(kind="put", node="keeper", address="tcp://keeper:1", key="edge/keeper")
    assert first["near"].checkpoint_to == keeper
    there = msgspec.structs.replace(keeper, kind="fetch", checkpoint=True)
    assert again["far"].source == there
    assert {(each.leg, each.key) for each in allowed} == {(CHECKPOINT, "edge/far"), (CHECKPOINT, "device/phone")}
    assert after == [there, Source(kind="noise")]
    assert "keeper" in released


def test_the_edge_that_keeps_checkpoints_leaves_its_own_to_the_gateway(tmp_path, planner):
    async def work():
        gateway = Gateway(tmp_path, planner, checkpoints_to="keeper")
        gateway.node("keeper", "large", data_address="tcp://keeper:1")
        gateway.node("phone", "small")
        await placed(gateway)
        gateway.ledger.close()
        return gateway.assigned()["keeper"]

    assigned = asyncio.run(work())
    assert (assigned.checkpoint_every, assigned.checkpoint_to) == (5, None)
