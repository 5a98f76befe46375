"""A device whose gateway is gone, its own user, and degraded answers: one edge that holds everything large, one device."""

import asyncio
import contextlib
import io
import os
import signal
import threading

import numpy as np
import pytest
from PIL import Image
from tiny import PROMPT, build_sd3, write_family

from nodes.asker import Asker, RefusedByGateway
from nodes.commands.ask import status_table
from nodes.commands.service import free_port
from nodes.fleet import fleet
from nodes.keys import Credentials, Peer
from relay.pipeline import RelayPipeline

RELAY = "tiny-sd3/large:{0}:0-{1}/small:{0}:{1}-{0}/match=exact/codec=fp16/guidance=3,3/conditioning=encode"


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    return write_family(root / "tiny-sd3.yaml", build_sd3(root / "sd3"), "sd3")


@pytest.fixture(scope="module")
def running(tmp_path_factory, family):
    nodes = {
        "edge": {"role": "edge", "families": {str(family): ["large"]}},
        "phone": {"role": "device", "families": {str(family): ["small"]}, "local": f"tcp://127.0.0.1:{free_port()}"},
    }
    offer = [{"family": str(family), "steps": 60, "handoff": 50, "matching": "exact"}]
    gateway = {"offer": offer, "checkpoint_every": 2, "degrade_after_s": 0.3}
    with fleet(tmp_path_factory.mktemp("cut"), nodes, gateway) as up:
        yield up


def from_the_phone(running, work, timeout_s=60):
    """As the phone's own user."""

    async def main():
        address = running.deployment.nodes["phone"].local
        server = Peer(name="phone", role="device", key="device/phone")
        async with Asker(address, Credentials.plain_text("me", "client"), server) as asker:
            return await asyncio.wait_for(work(asker), timeout_s)

    return asyncio.run(main())


async def drawn(asker, **request):
    job = (await asker.submit({"prompt": PROMPT, **request})).jobs[0]
    told = await asker.wait(job, 50)
    return told, (await asker.image(job))[1] if told["stage"] == "done" else None


@contextlib.contextmanager
def kept_down(running, victim):
    """Killed, and killed again as often as it comes back."""
    up = threading.Event()

    def killing():
        while not up.is_set():
            if (pid := running.up.status()[victim].pid) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            up.wait(0.02)

    thread = threading.Thread(target=killing)
    thread.start()
    try:
        yield
    finally:
        up.set()
        thread.join()


def broken(running, victim, timeout_s, **request):
    """The end of a job whose `victim` is killed as soon as it was accepted."""

    async def start(asker):
        return (await asker.submit({"prompt": PROMPT, **request})).jobs[0]

    job = running.ask(start)
    running.kill(victim)
    return running.ask(lambda asker: asker.wait(job, timeout_s), timeout_s + 20)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def test_a_devices_own_user_gets_the_picture_from_the_device(running, family):
    program = RELAY.format(6, 3)
    told, png = from_the_phone(running, lambda asker: drawn(asker, seed=4, program=program))
    assert told["report"]["nodes"] == ["edge", "phone"]
    alone = RelayPipeline.from_pretrained(family)(PROMPT, program=program, seed=4).images[0]
    assert np.abs(pixels(png) - np.asarray(alone).astype(int)).max() <= 1
    assert not list((running.store / "images").glob(f"{told['id']}*"))  # it never went to the gateway


def test_when_no_edge_is_left_the_device_finishes_alone_and_says_so(running):
    """Nothing was fixed, so another program may finish."""

    async def start(asker):
        return (await asker.submit({"prompt": PROMPT, "deadline_ms": 40_000})).jobs[0]

    job = running.ask(start)
    with kept_down(running, "edge"):
        told = running.ask(lambda asker: asker.wait(job, 45), 65)
    assert told["stage"] == "done"
    assert told["degraded"] is True
    assert told["report"]["nodes"] == ["phone"]
    assert told["report"]["steps"]["small"] > 0
    running.wait_for_nodes()


def test_what_was_fixed_is_not_degraded(running):
    program = RELAY.format(200, 190)
    told = broken(running, "edge", 80, program=program, seed=1)
    assert told["stage"] == "done"  # by the edge that came back
    assert told["degraded"] is False
    assert told["report"]["program"] == program
    running.wait_for_nodes()


def test_cut_off_from_the_gateway_the_device_serves_its_user_edge_only(running, family):
    with kept_down(running, "gateway"):
        told, png = from_the_phone(running, lambda asker: drawn(asker, seed=2, steps=6), 90)
    assert told["stage"] == "done"
    assert told["alone"]
    status_table(
        from_the_phone(running, lambda asker: asker.status())
    )  # the phone's own or the gateway's: it can be shown
    assert told["report"]["steps"] == {"large": 0, "small": 6}
    alone = RelayPipeline.from_pretrained(family)(PROMPT, program=told["report"]["program"], seed=2).images[0]
    assert np.abs(pixels(png) - np.asarray(alone).astype(int)).max() <= 1
    running.wait_for_nodes()
    with kept_down(running, "gateway"), pytest.raises(RefusedByGateway, match="cut off"):
        from_the_phone(running, lambda asker: drawn(asker, mode="full-cloud"))


def test_when_the_device_dies_the_edge_side_finishes(running):
    """Last, for the phone stays away: the large member goes on from the handoff, and the answer says so."""
    running.wait_for_nodes()
    told = broken(running, "phone", 65, deadline_ms=60_000)
    assert told["stage"] == "done"
    if told["degraded"]:  # else the phone was back in time and finished its own program
        assert told["report"]["nodes"] == ["edge"]
        assert told["report"]["steps"]["small"] == 0
