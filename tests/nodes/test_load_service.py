"""The service under load, with real processes: levels under pressure, refusals in time, nothing lost; and without pressure
the same choices and pictures as without `load:`."""

import asyncio
import io
import signal
import time

import pytest
import yaml
from levels_file import write_levels
from PIL import Image

from nodes.fleet import fleet
from relay.errors import RelayError
from scheduler.decision_log import read_log

PROMPTS = ("a large red heart at the top left", 'the word "CAT" in red', "two small blue circles and a green star")
OFFER = [
    {"family": "mini-sd3", "steps": 4, "mode": "full-cloud"},
    {"family": "mini-sd3", "steps": 4, "handoff": 2},
    {"family": "mini-sd3", "steps": 4, "mode": "edge-only"},
]
FULL = "full-cloud"
SLO_S = 3.0


def pixels(png):
    return Image.open(io.BytesIO(png)).tobytes()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Two edges and a phone under `load:`; the policy takes the first program that is allowed, full-cloud."""
    folder = tmp_path_factory.mktemp("load")
    programs = write_levels(folder / "levels.json", OFFER)
    nodes = {
        "edge-1": {"role": "edge", "families": {"mini-sd3": ["large"]}},
        "edge-2": {"role": "edge", "families": {"mini-sd3": ["large"]}},
        "phone-1": {"role": "device", "families": {"mini-sd3": ["small"]}},
    }
    load = {"deadline_s": SLO_S, "levels": str(folder / "levels.json"), "arrivals_quantile": 0.5, "rise": 0.3}
    gateway = {"offer": OFFER, "policy": "fixed", "load": load, "deadline_s": 60, "heartbeat_s": 2.0}
    with fleet(folder / "deployment", nodes, gateway) as running:
        running.programs = programs
        yield running


def test_without_pressure_choices_and_pictures_are_those_without_load(running):
    """Every request is placed as the policy says; the log tells of nothing held back."""
    before = running.status()["load"]
    assert before["counters"] == {}
    pictures = []
    for i, prompt in enumerate(PROMPTS):
        time.sleep(1.5)  # one after the other without a pause is a load, too, where a machine is slow
        told, png = running.draw(prompt=prompt, seed=i)
        pictures.append(png)
        assert told["report"]["program"] == running.programs[FULL]
        assert told["report"]["decision"]["among"] == 2 + 2 + 1  # all programs on all nodes
        assert told["report"]["decision"]["load"] is None
    told = running.status()["load"]
    assert not told["pressed"]
    assert told["counters"] == {"admitted": 3}
    for i, png in enumerate(pictures):  # pinned: nothing of load in it
        _, same = running.draw(prompt=PROMPTS[i], seed=i, program=running.programs[FULL])
        assert pixels(png) == pixels(same)
    entries = list(read_log(running.store / "decisions.db"))
    assert all("load" not in entry.notes and not entry.context.notes for entry in entries)


def flooded(running, per_s, seconds, killed=None):
    """Requests at a steady rate: ends of the accepted, refusals, and seconds from asking to refusal. `killed`: a node that
    dies half way."""

    async def work(asker):
        ends, refused, waits, began = [], [], [], time.monotonic()

        async def one(i):
            asked = time.monotonic()
            try:
                job = (await asker.submit({"prompt": PROMPTS[i % 3]})).jobs[0]
            except RelayError as error:
                refused.append(error)
                waits.append(time.monotonic() - asked)
                return
            ends.append(await asker.wait(job, 90))

        tasks = []
        for i in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + i / per_s - time.monotonic()))
            if killed and i == int(per_s * seconds / 2):
                running.kill(killed, signal.SIGKILL)
            tasks.append(asyncio.ensure_future(one(i)))
        await asyncio.gather(*tasks)
        return ends, refused, waits

    return running.ask(work, 150)


def test_three_times_what_can_be_borne_ends_every_accepted_request_and_a_killed_node_costs_none(running):
    alone = running.draw(prompt=PROMPTS[0])[0]["report"]["seconds"]
    sustainable = 2 / alone  # two edges, full quality, a picture at a time
    ends, refused, _ = flooded(running, min(3 * sustainable, 60.0), 5.0, killed="edge-2")
    assert ends
    assert [told["error"] for told in ends if told["stage"] != "done"] == []
    for error in refused:
        assert error.status in (429, 503)
        assert error.retry_after_s > 0
        assert "try again in" in str(error)
    programs = {told["report"]["program"] for told in ends}
    assert programs - {running.programs[FULL]}, "nothing was served with less work"
    assert programs <= set(running.programs.values())
    pressed = [told["report"]["decision"]["load"] for told in ends if told["report"]["decision"]["load"]]
    assert pressed
    assert all(each["allowed"] for each in pressed)
    told = running.status()["load"]
    assert told["counters"]["pressed"] >= len(pressed)
    assert told["outstanding_s"] == 0
    assert running.status()["open"] == 0
    logged = [entry for entry in read_log(running.store / "decisions.db") if "load" in entry.notes]
    assert logged
    assert all(entry.context.notes["pressed"] == 1.0 for entry in logged)
    assert all({str(a.program) for a in entry.actions} <= set(entry.notes["load"]["allowed"]) for entry in logged)


def test_afterwards_everything_is_as_it_was(running):
    """The estimate falls slowly; full quality comes back, and the killed node too."""
    running.wait_for_nodes()
    ends = time.monotonic() + 60
    while running.status()["load"]["pressed"]:
        assert time.monotonic() < ends
        time.sleep(0.3)
    told, _ = running.draw(prompt=PROMPTS[0], seed=0)
    assert told["report"]["program"] == running.programs[FULL]
    assert told["report"]["decision"]["load"] is None


def test_a_request_that_cannot_be_in_time_is_refused_at_once_with_when_to_come_back(running):
    async def work(asker):
        try:
            await asker.submit({"prompt": PROMPTS[0], "deadline_ms": 1})
        except RelayError as error:
            return error
        return None

    refusal = running.ask(work)
    assert refusal is not None
    assert refusal.status == 503
    assert refusal.retry_after_s > 0
    assert "cannot be done within 0.001 s" in str(refusal)
    assert running.status()["load"]["counters"]["late"] >= 1


def test_what_cannot_be_planned_is_said_in_one_line(running, tmp_path):
    from nodes.deployment import read_deployment
    from nodes.gateway.load import LoadControl
    from nodes.gateway.registry import Registry
    from relay.errors import BadRequest
    from relay.program import Program
    from scheduler.load.settings import LoadSettings

    path = tmp_path / "deployment.yaml"
    path.write_text(yaml.safe_dump({"gateway": {"load": {"deadline_s": 0}}}))
    with pytest.raises(BadRequest, match=r"gateway\.load\.deadline_s"):
        read_deployment(path)
    other = Program.parse(running.programs[FULL].replace(":4:", ":9:").replace("0-4", "0-9"))
    levels = running.deployment.gateway.load.levels
    control = LoadControl(LoadSettings(deadline_s=1.0, levels=levels), Registry(1.0))
    with pytest.raises(BadRequest, match="is on offer and has no measured quality"):
        control.start([other], ({"mini-sd3": 1}, {"mini-sd3": 1}))
