"""One objective: under pressure the learned policy chooses among what the plan leaves it, at the plan's prices; levels that begin
from cached latents are assigned and told. One deployment, whose edge is slowed down so that little is too much for it."""

import asyncio
import time

import pytest
from levels_file import write_levels

from nodes.fleet import fleet
from relay.errors import RelayError
from relay.program import Program
from scheduler.decision_log import read_log

PROMPTS = ("a large red heart at the top left", "two small blue circles and a green star")
OFFER = [
    {"family": "mini-sd3", "steps": 6, "mode": "full-cloud"},
    {"family": "mini-sd3", "steps": 6, "handoff": 3},
    {"family": "mini-sd3", "steps": 6, "mode": "edge-only"},
]
SLO_S, PER_S, SECONDS, SKIPPED = 8.0, 8, 5.0, 1


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load-learned")
    worth = {"full-cloud": 0.9, "relay": 0.6, "edge-only": 0.3}
    programs = write_levels(folder / "levels.json", OFFER, worth, {SKIPPED: 0.99})
    nodes = {
        "edge": {"role": "edge", "families": {"mini-sd3": ["large"]}, "pace": 4},
        "phone": {"role": "device", "families": {"mini-sd3": ["small"]}},
    }
    load = {"deadline_s": SLO_S, "levels": str(folder / "levels.json")}
    policy = {"name": "learned", "seed": 1, "explore": 0.1, "warm": False}
    gateway = {"offer": OFFER, "policy": policy, "load": load, "deadline_s": 90, "heartbeat_s": 2.0}
    with fleet(folder / "deployment", nodes, gateway, judge=False) as running:
        running.programs = programs
        yield running


@pytest.fixture(scope="module")
def ended(running):
    """What became of everything that was let in, of far more than the edge can do."""

    async def work(asker):
        ends, began = [], time.monotonic()

        async def one(i):
            try:
                job = (await asker.submit({"prompt": PROMPTS[i % 2]})).jobs[0]
            except RelayError:
                return
            ends.append(await asker.wait(job, 90))

        tasks = []
        for i in range(int(PER_S * SECONDS)):
            await asyncio.sleep(max(0.0, began + i / PER_S - time.monotonic()))
            tasks.append(asyncio.ensure_future(one(i)))
        await asyncio.gather(*tasks)
        return ends

    return running.ask(work, 150)


@pytest.fixture(scope="module")
def logged(running, ended):
    return [entry for entry in read_log(running.store / "decisions.db") if "load" in entry.notes]


def test_what_is_let_in_ends_and_the_learned_policy_decides(running, ended, logged):
    assert ended
    assert [told["error"] for told in ended if told["stage"] != "done"] == []
    assert running.status()["decisions"]["policy"] == "learned"
    assert len(logged) > 10
    chosen = [entry for entry in logged if not entry.marks]
    assert chosen
    assert {entry.policy for entry in chosen} == {"learned"}


def test_a_choice_is_always_among_what_is_allowed(logged):
    for entry in logged:
        allowed = set(entry.notes["load"]["allowed"])
        assert {str(action.program) for action in entry.actions} <= allowed
        assert str(entry.actions[entry.chosen].program) in allowed
        if (router := entry.notes.get("router")) is not None:
            assert router["mode"] in {Program.parse(text).mode for text in allowed}
        assert 0 < entry.probability <= 1


def test_shares_are_the_routers_budget_and_prices_reach_the_bandit(logged):
    assert all(entry.context.notes["pressed"] == 1.0 for entry in logged)
    priced = [entry for entry in logged if entry.notes["load"]["prices"]]
    assert priced
    for entry in priced:
        for node, price in entry.notes["load"]["prices"].items():
            assert entry.context.notes[f"price:{node}"] == price > 0
    planned = [entry for entry in logged if "share_full_cloud" in entry.context.notes and entry.notes.get("router")]
    assert planned
    for entry in planned:
        notes = entry.context.notes
        assert 0 <= notes["share_full_cloud"] <= 1
        assert 0 <= notes["share_relay"] <= 1
        assert any(name.startswith("quality_") for name in notes)  # the router's word is in the bandit's context, too


def test_a_level_that_skips_steps_is_assigned_and_its_start_told(running, ended, logged):
    full = running.programs["full-cloud"]
    assert any(entry.notes["load"].get("skips") == {full: SKIPPED} for entry in logged)
    begun = [told["report"] for told in ended if told["report"].get("start")]
    assert begun
    for report in begun:
        assert report["program"] == full
        assert report["start"]["skipped"] <= SKIPPED == report["decision"]["load"]["skips"][full]
        assert report["steps"]["large"] == 6 - report["start"]["skipped"]
    told = running.status()["load"]
    assert 0 < told["starts"][f"{full} from step {SKIPPED}"] <= 1
