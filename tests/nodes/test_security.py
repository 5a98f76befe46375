"""A deployment with keys: who sent a message is what its key proves, and a valid key gets no more than its role and jobs."""

import asyncio

import pytest
from tiny import PROMPT, build_sd3, write_family

from nodes.asker import Asker, RefusedByGateway, Unanswered
from nodes.fleet import fleet
from nodes.keys import Peer, load_public, load_secret, write_keys
from nodes.messages import Fetch, Latent, NotHere, Refused, Register, Result
from nodes.transport import CONTROL, DATA, Client

NAMES = {
    "gateway": "gateway", "edge": "edge", "phone": "device", "stranger": "device", "client": "client", "other": "client",
}  # fmt: skip
RELAY = "tiny-sd3/large:{0}:0-{1}/small:{0}:{1}-{0}/match=exact/codec=fp16/guidance=3,3/conditioning=encode"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    root = tmp_path_factory.mktemp("secured")
    for name, role in NAMES.items():
        write_keys(name, role, root / "keys")
    write_keys("nobody", "device", root / "elsewhere")  # on nobody's list
    family = write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3")
    nodes = {
        "edge": {"role": "edge", "families": {str(family): ["large"]}},
        "phone": {"role": "device", "families": {str(family): ["small"]}},
    }
    gateway = {"offer": [{"family": str(family), "steps": 6}]}
    with fleet(root / "deployment", nodes, gateway, keys="../keys") as up:
        up.keys = root / "keys"
        yield up


def as_(running, name, work, folder="keys"):
    """`work(asker)` with this key."""

    async def main():
        me, server = (
            load_secret(running.keys.parent / folder / f"{name}.key"),
            load_public(running.keys / "gateway.pub"),
        )
        async with Asker(running.gateway.control, me, server) as asker:
            return await asyncio.wait_for(work(asker), 60)

    return asyncio.run(main())


def talk(running, name, address, lane, server, message, payloads=(), wait=3.0):
    """One message with this key, and what is answered within `wait` seconds (None: nothing)."""

    async def main():
        me = load_secret(running.keys / f"{name}.key")
        async with Client(address, lane, me, server) as client:
            await client.send(message, payloads, timeout_s=5.0)
            try:
                return (await client.receive(wait))[0]
            except TimeoutError:
                return None

    return asyncio.run(main())


def gateway_peer(running):
    return load_public(running.keys / "gateway.pub")


async def drawn(asker, **request):
    job = (await asker.submit({"prompt": PROMPT, **request})).jobs[0]
    return await asker.wait(job, 50)


def test_with_keys_everything_works(running):
    told = as_(running, "client", lambda asker: drawn(asker, seed=1, program=RELAY.format(6, 3)))
    assert told["stage"] == "done"
    assert told["report"]["nodes"] == ["edge", "phone"]


def test_a_key_that_is_on_no_list_is_refused_by_name(running):
    with pytest.raises(Unanswered, match="does not let the key"):
        as_(running, "nobody", lambda asker: asker.status(), folder="elsewhere")


def test_anothers_job_is_not_there(running):
    told = as_(running, "client", lambda asker: drawn(asker, seed=2))
    for ask in ("job", "trace", "cancel", "image"):
        with pytest.raises(RefusedByGateway, match=r"no (open )?job") as refused:
            as_(running, "other", lambda asker, ask=ask: getattr(asker, ask)(told["id"]))
        assert refused.value.status == 404


def test_a_device_cannot_register_as_an_edge_or_under_anothers_name(running):
    claim = Register(name="edge", session="x", holdings=(), batch=1, queue=1, data_address="tcp://127.0.0.1:9")
    answer = talk(running, "stranger", running.gateway.control, CONTROL, gateway_peer(running), claim)
    assert isinstance(answer, Refused)
    assert answer.status == 403
    status = as_(running, "client", lambda asker: asker.status())
    assert {n["name"]: n["state"] for n in status["nodes"]} == {"edge": "ready", "phone": "ready"}


def test_a_client_may_not_send_what_nodes_send(running):
    forged = Result(job="job-x", attempt=1, width=32, height=32, report={})
    answer = talk(running, "client", running.gateway.data, DATA, gateway_peer(running), forged)
    assert isinstance(answer, Refused)
    assert answer.status == 403


def test_a_result_from_a_node_that_was_never_given_the_job_does_not_count(running):
    program = RELAY.format(200, 190)

    async def start(asker):
        return (await asker.submit({"prompt": PROMPT, "program": program, "seed": 3})).jobs[0]

    job = as_(running, "client", start)
    attempt = as_(running, "client", lambda asker: asker.job(job))["attempt"]
    report = {"program": program, "seed": 3}
    forged = Result(job=job, attempt=attempt, width=32, height=32, report=report)
    talk(running, "stranger", running.gateway.data, DATA, gateway_peer(running), forged, [b"no picture"], wait=0.5)
    told = as_(running, "client", lambda asker: asker.wait(job, 50))
    assert told["stage"] == "done"
    assert told["report"]["node"] == "phone"


def test_a_latent_goes_only_to_the_node_that_walks_on(running):
    program = RELAY.format(150, 140)

    async def start(asker):
        return (await asker.submit({"prompt": PROMPT, "program": program, "seed": 4})).jobs[0]

    job = as_(running, "client", start)
    edge = load_public(running.keys / "edge.pub")
    address = running.deployment.nodes["edge"].data
    answer = talk(running, "stranger", address, DATA, edge, Fetch(job=job, attempt=1, leg=1), wait=3.0)
    assert not isinstance(answer, Latent)
    assert isinstance(answer, (NotHere, type(None)))
    assert as_(running, "client", lambda asker: asker.wait(job, 50))["stage"] == "done"


def test_a_revoked_key_is_refused_on_its_live_connection(running):
    async def work(asker):
        await asker.status()
        (running.keys / "other.pub").unlink()
        await asyncio.sleep(0.8)
        with pytest.raises((RefusedByGateway, Unanswered)):
            await asker.status()

    as_(running, "other", work)


def test_plain_text_beyond_loopback_is_refused(tmp_path):
    from nodes.keys import Credentials
    from relay.errors import BadRequest

    with pytest.raises(BadRequest, match="plain text"):
        Client("tcp://192.0.2.1:5600", CONTROL, Credentials.plain_text("a", "client"), Peer(name="g", role="gateway"))
