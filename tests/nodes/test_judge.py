"""Pictures are judged off every request's way, by a process that pulls them or by the device that drew them; what a device
keeps leaves it only if its own config says so."""

import asyncio
import json
import math
import os
import time
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from tiny import PROMPT, build_sd3, write_family

from nodes.asker import Asker, RefusedByGateway
from nodes.commands.ask import status_table
from nodes.deployment import Deployment, GatewayConfig, JudgeConfig, NodeConfig, Offer, read_deployment
from nodes.exchange import Exchange
from nodes.fleet import fleet
from nodes.gateway.deciding import Decider, open_log
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.jobs import Job
from nodes.gateway.judge_metrics import JudgeMetrics
from nodes.gateway.judging import Judging
from nodes.gateway.ledger import Ledger
from nodes.gateway.planner import Planner
from nodes.gateway.registry import Registry
from nodes.keys import Credentials, Peer, load_public, load_secret, write_keys
from nodes.messages import (
    Assign,
    JudgeHere,
    JudgeThis,
    KeptPicture,
    Refused,
    Register,
    Registered,
    Result,
    Scores,
    Source,
    seen_of,
)
from nodes.node import Node
from nodes.requests import ImageRequest
from nodes.score_process import NotScored, ScoreProcess
from nodes.scoring import OWN_CLIP, Scorer
from nodes.stages import Stage
from nodes.transport import CONTROL, DATA, Client, Server
from relay.errors import BadRequest

SMALL = "tiny-sd3/small:4:0-4/match=exact/codec=fp16/guidance=3/conditioning=encode"
NICE = 1  # at the default, 19, what judges would wait for all else that this machine does
PATIENCE_S = 120
NAMES = {"gateway": "gateway", "watch": "device", "judge": "judge", "stranger": "device",
         "client": "client", "other": "client"}  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Random weights over an ordinary family that says it draws scenes."""
    root = tmp_path_factory.mktemp("drawn")
    return write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3", scenes=True)


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("judge: {share: 2}", "share"),
        ("judge: {sample: 1}", "sample"),
        ("{judge: {}, nodes: {judge: {role: device, families: {mini-sd3: [small]}}}}", "choose another name"),
        (
            "nodes: {e: {role: edge, data: 'tcp://127.0.0.1:1', families: {f: [large]}, judge: local}}",
            "an edge keeps no",
        ),
        ("nodes: {d: {role: device, families: {mini-sd3: [small]}, judge: yes-please}}", "judge"),
    ],
)
def test_config_that_cannot_be_is_refused(tmp_path, said, wrong):
    path = tmp_path / "deployment.yaml"
    path.write_text(said)
    with pytest.raises(BadRequest, match=wrong):
        read_deployment(path)


# --- a device whose gateway asks for everything ---


async def asked_of_a_device(family, mode, keep=True):
    """A real device draws one picture for a gateway that then asks to judge it, twice: all that the device says, and the
    nice level of the process that it scores in."""
    me = Credentials.plain_text("gateway", "gateway")
    gateway = Peer(name="gateway", role="gateway")
    config = NodeConfig(role="device", families={str(family): ["small"]}, judge=mode, batch=1)
    heard = []
    async with (
        Server("tcp://127.0.0.1:*", CONTROL, me) as control,
        Server("tcp://127.0.0.1:*", DATA, me) as data,
        Client(data.address, DATA, Credentials.plain_text("phone", "device"), gateway) as to_data,
    ):
        to_control = Client(control.address, CONTROL, Credentials.plain_text("phone", "device"), gateway)
        exchange = Exchange(to_data, data.address, lambda *_: None, None)
        node = Node("phone", config, Deployment(judge=JudgeConfig(nice=NICE)), to_control, exchange)
        ended = asyncio.Event()
        asked = []

        async def serve(server):
            while True:
                identity, _, message, payloads = await server.receive()
                heard.append((message, sum(len(payload) for payload in payloads)))
                match message:
                    case Register():
                        asked.append(identity)
                        await control.send(identity, Registered(gateway="curious", session="1", heartbeat_s=60.0))
                        await control.send(identity, Assign(
                            job="job-1", attempt=1, program=SMALL, prompt=PROMPT, negative=None, seed=1, width=32, height=32,
                            first_leg=0, last_leg=0, source=Source(kind="noise"), keep_image=keep,
                        ))  # fmt: skip
                    case Result():
                        await data.send(identity, seen_of(message))
                        for _ in range(2):
                            await control.send(asked[0], JudgeThis(job="job-1"))
                if sum(isinstance(each, (Scores, KeptPicture)) for each, _ in heard) == 2:
                    ended.set()

        tasks = [asyncio.ensure_future(work) for work in (serve(control), serve(data), node.run())]
        try:
            await asyncio.wait_for(ended.wait(), PATIENCE_S)
            nice = None if (pid := node.judge.process.pid) is None else os.getpriority(os.PRIO_PROCESS, pid)
        finally:
            node.stopped.set()
            await asyncio.wait({tasks[2]}, timeout=10)
            assert node.judge.process.pid is None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await to_control.close()
    return heard, nice


def answers(heard):
    return [message for message, _ in heard if isinstance(message, (Scores, KeptPicture))]


def test_a_device_with_judge_off_gives_nothing_away(family):
    heard, nice = asyncio.run(asked_of_a_device(family, "off"))
    assert [(each.scores, each.reason) for each in answers(heard)] == 2 * [
        ({}, "this device gives neither pictures nor scores (`judge: off`)")
    ]
    assert sum(size for _, size in heard) == 0
    assert any(isinstance(message, Result) for message, _ in heard)
    assert nice is None


def test_a_device_with_judge_local_sends_numbers_only(family):
    heard, nice = asyncio.run(asked_of_a_device(family, "local"))
    refused, scored = sorted(answers(heard), key=lambda each: len(each.scores))
    assert scored.missing == {}
    assert {"attributes", "single_object", OWN_CLIP, "q_detail"} < scored.scores.keys()
    assert "not here any more" in refused.reason
    assert sum(size for _, size in heard) == 0
    assert nice == NICE


def test_a_device_whose_scoring_breaks_says_so():
    async def work():
        await ScoreProcess(["beauty"]).score(b"", PROMPT, scenes=False)

    with pytest.raises(NotScored, match="judge broke"):
        asyncio.run(work())


def test_a_device_with_judge_share_sends_a_kept_picture_once(family):
    heard, _ = asyncio.run(asked_of_a_device(family, "share"))
    refused, sent = sorted(answers(heard), key=lambda each: isinstance(each, KeptPicture))  # each comes by its own lane
    assert isinstance(sent, KeptPicture)
    assert "not here any more" in refused.reason
    sizes = [size for message, size in heard if isinstance(message, KeptPicture)]
    assert sum(size for _, size in heard) == sizes[0] > 100


# --- the gateway's side ---


@pytest.fixture
def judging(tmp_path):
    """`made(share, queue)`: a dispatcher with nobody there, its judging, and what nodes would have been `told`."""

    def made(**config):
        gateway = GatewayConfig(store=str(tmp_path), http=None, offer=[Offer(family="mini-sd3")])
        ledger, registry = Ledger(tmp_path / "ledger.db"), Registry(1.0)

        told = []

        async def nobody(name, message):
            told.append((name, message))
            return True

        dispatcher = Dispatcher(
            gateway, registry, ledger, Planner(gateway.offer), Decider(open_log(tmp_path / "d.db", "off")), nobody
        )
        server = Server("tcp://127.0.0.1:*", DATA, Credentials.plain_text("gateway", "gateway"))
        return SimpleNamespace(
            judging=Judging(JudgeConfig(**config), dispatcher, server, nobody), server=server, dispatcher=dispatcher,
            ledger=ledger, told=told,
        )  # fmt: skip

    return made


def ended(name):
    now = time.monotonic()
    job = Job(name, "r", 0, "t", 1, ImageRequest(prompt=PROMPT), now, now, [], 1)
    job.stage, job.image, job.report = Stage.DONE, f"images/{name}.png", {"node": "phone", "program": SMALL}
    return job


def test_the_queue_keeps_the_newest_and_counts_what_it_drops(judging):
    async def work():
        made, never = judging(share=1.0, queue=3), []
        none = judging(share=0.0)
        for each in (made, none):
            each.dispatcher.verdicts.on_unjudged.append(never.append)
        for i in range(5):
            made.judging.ended(ended(f"job-{i}"))
        none.judging.ended(ended("job-9"))
        await asyncio.sleep(0)
        return made.judging, none.judging, never

    full, none, never = asyncio.run(work())
    assert [picture.job for picture in full.waiting] == ["job-2", "job-3", "job-4"]
    assert full.told()["counters"] == {"sampled": 5, "dropped": 2}
    assert not none.waiting
    assert never == ["job-0", "job-1", "job-9"]


def test_a_picture_that_cannot_be_sent_waits_for_the_judge_that_is_heard_next(judging):
    judge = Peer(name="judge", role="judge", key="judge/judge")

    async def work():
        made = judging(share=1.0)
        (made.dispatcher.store / "images").mkdir()
        (made.dispatcher.store / "images" / "job-1.png").write_bytes(b"png")
        async with made.server, Client(
            made.server.address, DATA, Credentials.plain_text("judge", "judge"), Peer(name="gateway", role="gateway")
        ) as client:  # fmt: skip
            await made.judging.hear(made.server, b"gone", judge, JudgeHere(session="0", ask=1, doing="waiting"), [])
            loop = asyncio.ensure_future(made.judging.run())
            made.judging.ended(ended("job-1"))
            async with asyncio.timeout(20):
                while made.judging.judges[judge.key].alive:
                    await asyncio.sleep(0.01)
            before = dict(made.judging.tally.counters)
            await client.send(JudgeHere(session="1", ask=1, doing="waiting"))
            said = await made.server.receive(5)
            await made.judging.hear(made.server, said.identity, judge, said.message, said.payloads)
            async with asyncio.timeout(20):
                message, _ = await client.receive()
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
        return before, message

    before, message = asyncio.run(work())
    assert before == {"sampled": 1}
    assert message.job == "job-1"


def test_scores_count_once_and_only_from_whom_the_picture_was_given_to(judging):
    judge = Peer(name="judge", role="judge", key="judge/judge")
    stranger = Peer(name="stranger", role="device", key="device/stranger")

    async def work():
        made, learned = judging(share=1.0), []
        made.dispatcher.verdicts.on_scores += [
            lambda *_: 1 / 0,
            lambda job, scores: learned.append((job, dict(scores))),
        ]
        await made.ledger.accept("r", "t", None, {}, [("job-1", 1)])
        await made.ledger.end("job-1", "done", report={"seed": 1}, image="images/job-1.png")
        (made.dispatcher.store / "images").mkdir()
        (made.dispatcher.store / "images" / "job-1.png").write_bytes(b"png")
        async with made.server, Client(
            made.server.address, DATA, Credentials.plain_text("judge", "judge"), Peer(name="gateway", role="gateway")
        ) as client:  # fmt: skip
            await client.send(JudgeHere(session="1", ask=1, doing="waiting"))
            said = await made.server.receive(5)

            async def hear(peer, message):
                await made.judging.hear(made.server, said.identity, peer, message, said.payloads)

            loop = asyncio.ensure_future(made.judging.run())
            made.judging.ended(ended("job-gone"))  # its file is not there: the judge still gets the next one
            made.judging.ended(ended("job-1"))
            await hear(judge, said.message)
            given, payloads = await client.receive(5)
            for peer, message in (
                (judge, Scores(job="job-2", scores={"a": 1.0})),
                (stranger, Scores(job="job-1", scores={"a": 1.0})),
                (stranger, KeptPicture(job="job-1")),
                (judge, Scores(job="job-1", scores={"attributes": 0.5}, missing={"clip": "none"})),
                (judge, Scores(job="job-1", scores={"attributes": 0.9})),
            ):
                await hear(peer, message)
            while not learned:
                await asyncio.sleep(0.01)
            refusals = [(await client.receive(5))[0] for _ in range(4)]
            loop.cancel()
        return made, given, bytes(payloads[0]), refusals, learned

    made, given, png, refusals, learned = asyncio.run(work())
    assert (given.job, given.prompt, given.program, png) == ("job-1", PROMPT, SMALL, b"png")
    assert {each.status for each in refusals} == {403}
    assert learned == [("job-1", {"attributes": 0.5})]
    report = json.loads(made.ledger.job("job-1")["report"])
    assert report["scores"] == {"attributes": 0.5}
    assert (report["judged"]["by"], report["judged"]["missing"], report["seed"]) == ("judge", {"clip": "none"}, 1)
    told = made.judging.told()
    assert told["counters"] == {"sampled": 2, "gone": 1, "judged": 1, "refused": 4}
    assert made.dispatcher.verdicts.counters["unlearned"] == 1
    shown = CollectorRegistry()
    shown.register(JudgeMetrics(made.judging, made.dispatcher.verdicts))
    text = generate_latest(shown).decode()
    for line in ("relay_judge_judged_total 1.0", "relay_judge_alive 1.0", "relay_judge_lag_seconds_count 1.0"):
        assert line in text
    assert 'relay_score_sum{column="attributes",mode="edge-only"} 0.5' in text
    nodes = {"gateway": "g", "version": "", "up_s": 1, "policy": "p", "stages": {}, "counters": {}, "nodes": []}
    assert "judge alive (waiting): 2 sampled, 1 judged, 0 dropped, lag" in status_table(nodes | {"judge": told}).title


@pytest.mark.parametrize("scores", [{"a": math.inf}, {"a": math.nan}, {"a b": 1.0}, {str(i): 1.0 for i in range(99)}])
def test_scores_that_are_none_are_refused(judging, scores):
    async def work():
        made = judging(share=1.0)
        picture = made.judging
        picture.ended(ended("job-1"))
        picture._give(picture.waiting.popleft(), "judge/judge")
        return picture._scored(Peer(name="judge", role="judge", key="judge/judge"), Scores(job="job-1", scores=scores))

    assert asyncio.run(work())


@pytest.mark.parametrize("expected", [True, False])
def test_a_device_that_judges_itself_is_asked_for_its_numbers(judging, expected):
    """Whether there is a judge process or not."""
    phone = Peer(name="phone", role="device", key="device/phone")
    said = Register(name="phone", session="1", holdings=(), batch=1, queue=1, judge="local")

    async def work():
        made, learned, never = judging(share=1.0), [], []
        made.judging.expected = expected
        made.dispatcher.verdicts.on_scores.append(lambda job, scores: learned.append((job, dict(scores))))
        made.dispatcher.verdicts.on_unjudged.append(never.append)
        made.dispatcher.registry.register(said, "device", phone.key, b"")
        for name in ("job-1", "job-2"):
            made.judging.ended(ended(name))
        while len(made.told) < 2:
            await asyncio.sleep(0.01)
        for message in (Scores(job="job-1", scores={"attributes": 0.5}), Scores(job="job-2", reason="no time")):
            await made.judging.hear(made.server, b"", phone, message, ())
        while not learned:
            await asyncio.sleep(0.01)
        return made, learned, never

    made, learned, never = asyncio.run(work())
    assert made.told == [("phone", JudgeThis(job="job-1")), ("phone", JudgeThis(job="job-2"))]
    assert learned == [("job-1", {"attributes": 0.5})]
    assert never == ["job-2"]
    assert made.judging.told()["counters"] == {"sampled": 2, "judged": 1, "declined": 1}


# --- real processes ---


@pytest.fixture(scope="module")
def running(tmp_path_factory, family):
    root = tmp_path_factory.mktemp("judged")
    for name, role in NAMES.items():
        write_keys(name, role, root / "keys")
    device = {"role": "device", "families": {str(family): ["small"]}}
    nodes = {"watch": device | {"judge": "share"}}
    offer = [{"family": str(family), "mode": "edge-only", "steps": 4}]
    with fleet(root / "deployment", nodes, {"offer": offer}, "../keys", judge={"share": 1.0, "nice": NICE}) as up:
        up.keys = root / "keys"
        yield up


def as_(running, name, work):
    async def main():
        me, server = load_secret(running.keys / f"{name}.key"), load_public(running.keys / "gateway.pub")
        async with Asker(running.gateway.control, me, server) as asker:
            return await asyncio.wait_for(work(asker), 60)

    return asyncio.run(main())


def judged(running, timeout_s=PATIENCE_S, **request):
    """A job whose scores stand in its report."""
    job, ends = done(running, **request)["id"], time.monotonic() + timeout_s
    while time.monotonic() < ends:
        told = running.ask(lambda asker: asker.job(job))
        if "scores" in told["report"]:
            return told
        time.sleep(0.1)
    raise AssertionError(f"not judged within {timeout_s} s: {running.status()['judge']}")


def done(running, **request):
    async def work(asker):
        job = (await asker.submit({"prompt": PROMPT, **request})).jobs[0]
        return await asker.wait(job, 40)

    told = running.ask(work)
    assert told["stage"] == "done"
    return told


def image_of(running, told):
    return running.store / "images" / f"{told['id']}.png"


def test_the_judge_process_scores_what_is_at_the_gateway(running):
    told = judged(running, device="watch", keep_on_device=False)
    report = told["report"]
    assert report["judged"]["by"] == "judge"
    assert report["judged"]["lag_s"] > 0
    assert report["judged"]["missing"] == {}
    again = Scorer().score(image_of(running, told).read_bytes(), PROMPT, scenes=True).scores
    assert report["scores"] == pytest.approx(again, abs=1e-4)
    status = running.status()["judge"]
    assert status["alive"] is True
    assert status["counters"]["judged"] >= 1
    assert os.getpriority(os.PRIO_PROCESS, running.pid("judge")) == NICE


def test_a_picture_on_a_device_that_shares_goes_to_the_judge_and_is_not_kept(running):
    told = judged(running, device="watch")
    assert told["report"]["judged"]["by"] == "judge"
    assert not image_of(running, told).exists()


@pytest.mark.parametrize(
    "message", [Scores(job="job-x", scores={"attributes": 1.0}), JudgeHere(session="s", ask=1, doing="")]
)
def test_a_strangers_scores_are_refused(running, message):
    async def talk():
        me, server = load_secret(running.keys / "stranger.key"), load_public(running.keys / "gateway.pub")
        async with Client(running.gateway.data, DATA, me, server) as client:
            await client.send(message, timeout_s=5.0)
            return (await client.receive(5.0))[0]

    answer = asyncio.run(talk())
    assert isinstance(answer, Refused)
    assert answer.status == 403


def test_who_asked_for_a_picture_rates_it_and_nobody_else(running):
    told = done(running)
    assert as_(running, "client", lambda asker: asker.rate(told["id"], 0.75))["rating"] == 0.75
    with pytest.raises(RefusedByGateway, match="no job") as refused:
        as_(running, "other", lambda asker: asker.rate(told["id"], 0.0))
    assert refused.value.status == 404
    with pytest.raises(RefusedByGateway, match="rating"):
        as_(running, "client", lambda asker: asker.rate(told["id"], 5))
    assert running.ask(lambda asker: asker.job(told["id"]))["report"]["feedback"]["rating"] == 0.75


def test_without_its_judge_the_service_goes_on_and_the_judge_comes_back(running):
    before = running.pid("judge")
    running.kill("judge")
    done(running, device="watch", keep_on_device=False)
    told = judged(running, device="watch", keep_on_device=False)
    assert told["report"]["judged"]["by"] == "judge"
    assert running.pid("judge") != before
