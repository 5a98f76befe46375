"""One deployment, real processes: what is asked is what is done, and transport changes nothing (invariants 2 and 3)."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny import PROMPT, build_sd3, build_sdxl, write_family

from nodes.asker import RefusedByGateway
from nodes.cli import main
from nodes.fleet import fleet
from nodes.images import KEY
from relay.pipeline import RelayPipeline
from scheduler.decision_log import read_log

SD3 = "tiny-sd3/{}/match=direct/codec=fp16/guidance={}/conditioning={}"
PROGRAMS = {
    "relay": SD3.format("large:6:0-3/small:6:3-6", "3,3", "encode"),
    "full-cloud": SD3.format("large:6:0-6", "3", "encode"),
    "edge-only": SD3.format("small:6:0-6", "3", "encode"),
    "three legs": SD3.format("large:6:0-2/small:6:2-4/large:6:4-6", "3,3,3", "encode"),
    "small first": SD3.format("small:6:0-2/large:6:2-6", "3,3", "encode"),
    "shipped embeddings": SD3.format("large:6:0-3/small:6:3-6", "3,3", "ship"),
    "small first, shipped": SD3.format("small:6:0-2/large:6:2-6", "3,3", "ship"),
    "three legs, shipped": SD3.format("large:6:0-2/small:6:2-4/large:6:4-6", "3,3,3", "ship"),
    "int8": SD3.format("large:6:0-3/small:6:3-6", "3,3", "encode").replace("fp16", "int8"),
    "sdxl relay": "tiny-sdxl/large:6:0-3/small:6:3-6/match=direct/codec=fp16/guidance=2,2/conditioning=encode",
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """tiny-sd3 and tiny-sdxl as YAML files."""
    root = tmp_path_factory.mktemp("served")
    return {
        f"tiny-{kind}": write_family(root / f"tiny-{kind}.yaml", build(root / kind), kind)
        for kind, build in (("sd3", build_sd3), ("sdxl", build_sdxl))
    }


@pytest.fixture(scope="module")
def running(tmp_path_factory, families):
    large = {str(path): ["large"] for path in families.values()}
    small = {str(path): ["small"] for path in families.values()}
    nodes = {
        "edge-1": {"role": "edge", "families": large, "batch": 4},
        "edge-2": {"role": "edge", "families": large, "batch": 4},
        "phone": {"role": "device", "families": small, "batch": 4},
        "keeper": {"role": "edge", "families": {str(families["tiny-sd3"]): ["small"]}},  # the phone goes before it
    }
    offer = [
        {"family": str(families["tiny-sd3"]), "steps": 6, "handoff": 3},
        {"family": str(families["tiny-sdxl"]), "steps": 6},
    ]
    gateway = {"offer": offer, "checkpoint_every": 2, "checkpoints_to": "keeper"}
    with fleet(tmp_path_factory.mktemp("service"), nodes, gateway) as up:
        yield up


async def at_work(asker, **request):
    """A job under way of which a checkpoint is kept, and the edge that has it. One that ends before its first checkpoint
    is anywhere, since nodes have yet to meet, is asked again."""
    while True:
        before = (await asker.status())["counters"].get("checkpoints", 0)
        job = (await asker.submit(request)).jobs[0]
        while (told := await asker.job(job))["stage"] not in ("done", "failed"):
            if (await asker.status())["counters"].get("checkpoints", 0) > before:
                return job, next(node for node in told["nodes"] if node.startswith("edge"))
            await asyncio.sleep(0.005)
        assert told["stage"] == "done", told


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_networked_run_gives_the_image_of_the_run_in_one_process(running, families, name):
    program = PROGRAMS[name]
    told, png = running.draw(prompt=PROMPT, program=program, seed=7)
    assert told["stage"] == "done"
    assert told["report"]["program"] == program
    pipe = RelayPipeline.from_pretrained(families[program.split("/")[0]])
    alone = pipe(PROMPT, program=program, seed=7).images[0]
    assert np.abs(pixels(png) - np.asarray(alone).astype(int)).max() <= 1  # 1e-4 is far below a level
    assert json.loads(Image.open(io.BytesIO(png)).text[KEY])["seed"] == 7


def test_what_is_left_open_is_chosen_from_the_offer_and_reported(running):
    told, png = running.draw(prompt=PROMPT)
    report = told["report"]
    assert report["program"].startswith(("tiny-sd3/", "tiny-sdxl/"))
    assert report["steps"]["large"] + report["steps"]["small"] > 0
    assert report["policy"] == "least-finish-time"
    assert report["probability"] == 1.0
    assert told["degraded"] is False
    _, png_again = running.draw(prompt=PROMPT, program=report["program"], seed=told["seed"])
    assert np.abs(pixels(png) - pixels(png_again)).max() <= 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 6, "handoff": 7}, "handoff"),
        ({"family": "sdxl"}, "not served here: choose tiny-sd3, tiny-sdxl"),
        ({"prompt": "  "}, "empty"),
        ({"prompt": "a" * 5000}, "length"),
        ({"seed": -1}, "seed"),
        ({"width": 33}, "33"),
        ({"colour": "red"}, "colour"),
        ({"program": "nonsense"}, "not a program"),
        ({"images": 0}, "images"),
        ({"negative_prompt": "blurry", "guidance": 1.0}, "guidance"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_reason(running, wrong, said):
    with pytest.raises(RefusedByGateway, match=said):
        running.draw(**{"prompt": PROMPT} | wrong)


def test_images_of_one_request_use_seed_plus_i(running):
    async def work(asker):
        accepted = await asker.submit({"prompt": PROMPT, "seed": 3, "images": 2, "program": PROGRAMS["relay"]})
        return [(await asker.wait(job, 60))["seed"] for job in accepted.jobs]

    assert running.ask(work) == [3, 4]


def test_an_idempotency_key_gives_the_first_request_again(running):
    async def work(asker):
        request = {"prompt": PROMPT, "seed": 11, "program": PROGRAMS["edge-only"]}
        first = await asker.submit(request, key="k-1")
        second = await asker.submit(request, key="k-1")
        with pytest.raises(RefusedByGateway, match="another request"):
            await asker.submit(request | {"seed": 12}, key="k-1")
        return first, second

    first, second = running.ask(work)
    assert (first.request, first.jobs) == (second.request, second.jobs)


def test_a_deadline_ends_in_an_error_that_says_so(running):
    told, _ = running.draw(prompt=PROMPT, program=SD3.format("large:180:0-180", "3", "encode"), deadline_ms=60)
    assert told["stage"] == "failed"
    assert "deadline" in told["error"]


def test_a_cancelled_job_ends_and_frees_its_nodes(running):
    async def work(asker):
        accepted = await asker.submit({"prompt": PROMPT, "program": SD3.format("large:200:0-200", "3", "encode")})
        await asker.cancel(accepted.jobs[0])
        return await asker.wait(accepted.jobs[0], 20)

    assert running.ask(work)["stage"] == "cancelled"


def test_many_at_once_share_batches_and_all_end(running):
    async def work(asker):
        accepted = [await asker.submit({"prompt": PROMPT, "seed": i, "program": PROGRAMS["relay"]}) for i in range(24)]
        return [await asker.wait(each.jobs[0], 60) for each in accepted]

    ended = running.ask(work, 90)
    assert [told["stage"] for told in ended] == ["done"] * 24
    assert sorted(told["seed"] for told in ended) == list(range(24))


def test_status_and_trace_say_what_happened(running):
    told, _ = running.draw(prompt=PROMPT, program=PROGRAMS["relay"], seed=1)
    ends = time.monotonic() + 10
    status = running.status()
    while time.monotonic() < ends and any(node["round_trip_s"] is None for node in status["nodes"]):
        time.sleep(0.2)  # until the first heartbeats
        status = running.status()
    assert {node["name"]: node["role"] for node in status["nodes"]} == {
        "edge-1": "edge",
        "edge-2": "edge",
        "phone": "device",
        "keeper": "edge",
    }
    assert all(node["round_trip_s"] is not None for node in status["nodes"])
    for process in (status, *status["nodes"]):
        assert all(process[cost] > 0 for cost in ("startup_s", "memory_bytes", "cpu_s"))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        events = running.ask(lambda asker: asker.trace(told["id"]))
        if events and events[-1]["what"] == "done":
            break
        time.sleep(0.1)
    stages = [event["what"] for event in events]
    assert [s for s in stages if s in ("accepted", "placed", "done")][:2] == ["accepted", "placed"]
    assert {"encoding", "denoising", "ready", "decoding"} <= set(stages)
    assert {event["node"] for event in events} >= {"gateway", "phone"}


def test_a_job_survives_the_death_of_the_edge_that_has_it(running):
    """SIGKILL in the middle of its first leg: it goes on elsewhere from what a third edge kept, and the picture is that of
    an unbroken run."""
    program = SD3.format("large:200:0-190/small:200:190-200", "3,3", "encode")
    job, victim = running.ask(lambda asker: at_work(asker, prompt=PROMPT, seed=5, program=program))
    running.kill(victim)
    told = running.ask(lambda asker: asker.wait(job, 60), 90)
    assert told["stage"] == "done", told
    assert any("lost" in said or "restarted" in said for said in told["report"]["history"])
    assert told["degraded"] is False
    placed = [event for event in running.ask(lambda asker: asker.trace(job)) if event["what"] == "placed"]
    assert placed[-1]["goes_on_from"].endswith("checkpoint at keeper")
    png = running.ask(lambda asker: asker.image(job))[1]
    _, png_unbroken = running.draw(prompt=PROMPT, program=program, seed=5, timeout_s=60)
    assert np.abs(pixels(png) - pixels(png_unbroken)).max() <= 1
    running.wait_for_nodes()


def test_a_killed_gateway_completes_what_it_had_accepted_once(running):
    program = SD3.format("large:60:0-50/small:60:50-60", "3,3", "encode")

    async def start(asker):
        return [(await asker.submit({"prompt": PROMPT, "seed": i, "program": program})).jobs[0] for i in range(4)]

    jobs = running.ask(start)
    running.kill("gateway")
    running.wait_for_nodes()

    async def wait(asker):
        return [await asker.wait(job, 60) for job in jobs]

    assert [told["stage"] for told in running.ask(wait, 120)] == ["done"] * 4
    ends = [entry.context.job for entry in read_log(running.store / "decisions.db") if entry.stage is not None]
    assert all(ends.count(job) == 1 for job in jobs)


def test_a_stopped_edge_is_given_up_and_its_job_goes_on(running):
    """SIGSTOP: nothing is closed, it only says nothing any more."""
    program = SD3.format("large:200:0-190/small:200:190-200", "3,3", "encode")
    job, victim = running.ask(lambda asker: at_work(asker, prompt=PROMPT, seed=6, program=program))
    pid = running.pid(victim)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert running.ask(lambda asker: asker.wait(job, 60), 90)["stage"] == "done"
    finally:
        os.kill(pid, signal.SIGCONT)
    running.wait_for_nodes()


def test_a_drained_node_finishes_what_it_has(running):
    async def work(asker):
        jobs = [
            (await asker.submit({"prompt": PROMPT, "seed": i, "program": PROGRAMS["full-cloud"]})).jobs[0]
            for i in range(8)
        ]
        await asker.drain("edge-2", 20.0)
        return [(await asker.wait(job, 60)) for job in jobs]

    assert [told["stage"] for told in running.ask(work, 90)] == ["done"] * 8


def test_the_command_line_asks_fetches_and_shows(running, tmp_path, capsys, monkeypatch):
    def relay(*words):
        monkeypatch.setattr(sys, "argv", ["relay", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    here = ("--gateway", running.gateway.control)
    code, out, _ = relay("submit", PROMPT, "--program", PROGRAMS["relay"], "--seed", "9", "--out", str(tmp_path), *here)
    assert code == 0
    assert "3 large + 3 small steps" in out
    assert "seed 9" in out
    job = next(tmp_path.glob("job-*.png")).name.rsplit("-", 1)[0]
    remote = ("--program", PROGRAMS["edge-only"], "--seed", "9", "--out", str(tmp_path / "remote"))
    code, out, _ = relay("generate", PROMPT, *remote, *here)
    assert code == 0
    assert "6 small steps on phone" in out
    code, _, err = relay("generate", PROMPT, "--codec", "int8", *here)
    assert code == 2
    assert "--codec" in err
    code, out, _ = relay("status", *here)
    assert code == 0
    assert all(name in out for name in ("edge-1", "phone", "ready"))
    assert re.search(r"\n *gateway .* \d+\.\d s +\d+ MB +\d+ s", out)
    code, out, _ = relay("trace", job, *here)
    assert code == 0
    assert "placed" in out
    code, _, _ = relay("trace", job, "--chrome", str(tmp_path / "trace.json"), *here)
    assert code == 0
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    code, _, err = relay("trace", "job-nobody", *here)
    assert code == 1
    assert "no job" in err
    code, _, err = relay("submit", "", *here)
    assert code == 1
    assert len(err.strip().splitlines()) == 1


def test_nobody_there_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "nodes.cli", "status", "--gateway", "tcp://127.0.0.1:9"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr.strip().splitlines()[-1]
