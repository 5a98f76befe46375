"""Real processes under load, in their short form: the same requests simulated, several times what can be borne, a killed node."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from levels_file import write_levels

from experiments.load import against, overload
from experiments.load.case import Cell, read_case
from experiments.load.real import FAILED, asked_for, deployed, measured
from experiments.load.service import DONE, LATE, REFUSED
from relay.errors import BadRequest
from scheduler.outcomes import write_unit

WORTH = {"full-cloud": 0.9, "relay": 0.8, "edge-only": 0.4}
OFFER = [
    {"family": "mini-sd3", "steps": 4, **each}
    for each in ({"mode": "full-cloud"}, {"handoff": 2}, {"mode": "edge-only"})
]
PROMPTS = {
    "validation": ("a small red circle", "a green star", "two blue hearts"),
    "test": ("a large red heart at the top left", "two small blue circles and a green star", 'the word "CAT" in red'),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Four steps of mini-sd3 on two edges and a phone; what pictures are worth is made up, when they come is not."""
    folder = tmp_path_factory.mktemp("real")
    programs = write_levels(folder / "levels.json", OFFER, WORTH)
    rows = [
        {"method": "program", "family": "mini-sd3", "program": program, "split": split, "prompt_index": i, "seed": i,
         "prompt": text, "complexity": "1", "score_attributes": WORTH[mode]}
        for split, texts in PROMPTS.items() for i, text in enumerate(texts) for mode, program in programs.items()
    ]  # fmt: skip
    write_unit(folder, "outcomes", "all", rows)
    edge = {"role": "edge", "families": {"mini-sd3": ["large"]}, "pace": 4.0}
    phone = {"role": "device", "families": {"mini-sd3": ["small"]}, "pace": 10.0}
    costs = {"curves": {m: {1: 0.02, 2: 0.03, 4: 0.05, 8: 0.09} for m in ("large", "small")}}
    said = {
        "name": "real", "family": "mini-sd3", "store": [str(folder)], "levels": str(folder / "levels.json"), "router": False,
        "fleets": {"here": {"nodes": {"edge-1": edge, "edge-2": edge, "phone": phone},
                            "timing": {"mini-sd3": costs}}},
        "traces": {"poisson": {"arrivals": "poisson"}},
        "systems": {"ours": {"system": "ours"}, "shares": {"system": "proteus"}},
        "search": {"configurations": 1, "requests": 10, "traces": ["poisson"], "loads": [1.0], "deadlines": [2.0]},
    }  # fmt: skip
    path = folder / "load.yaml"
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.fixture(scope="module")
def running(config, tmp_path_factory):
    case = read_case(config)
    with deployed(case, "here", tmp_path_factory.mktemp("up") / "service", {"deadline_s": 4.0}) as up:
        yield up


@pytest.fixture(scope="module")
def case(config, running):
    return measured(read_case(config), "here", running)


def test_the_case_is_given_what_the_nodes_measured(case):
    spec = case.config.fleets["here"]
    (costs,) = spec.timing.values()
    assert set(costs.curves) == {"large", "small"}
    assert all(curve[1] > 0 for curve in costs.curves.values())
    assert spec.overhead_s >= 0
    per_s, alone = case.capacity("here")
    assert per_s > 0
    assert alone > 4 * costs.curves["large"][1]


@pytest.mark.parametrize("name", ["ours", "shares"])
def test_the_same_requests_are_served_and_simulated_and_the_report_says_how_far_they_are_apart(
    case, running, name, monkeypatch
):
    monkeypatch.setattr(against, "REST_S", 0.6)
    against.forgotten(running)
    demand = asked_for(case, Cell(fleet="here", trace="poisson", load=1.0, deadline=4.0), 0, 2.0)
    row = against.compared(case, running, "here", name, "poisson", demand)
    assert row["requests"] == len(demand.arrival_s) > 1
    assert row["failed"] == 0, row["errors"]
    for side in ("real", "simulated"):
        assert 0 <= row[side]["violations"] <= 1
    low, high = row["interval"]["violations"]
    assert low <= row["real"]["violations"] <= high
    assert set(against.agrees(row)) >= {"p50_s", "violations"}
    text = against.text(case, "here", [row], 2.0, 1.0, 4.0)
    assert f"| poisson | {name} | {row['requests']} |" in text
    assert "goals are kept" in text
    assert json.loads(json.dumps(row))["trace"] == "poisson"


def test_overload_ends_every_accepted_request_and_a_killed_node_costs_none(case, running, tmp_path):
    phases = overload.Phases(before_s=1.5, peak_s=2.0, after_s=1.5, times=3.0)
    found = overload.overloaded(case, running, "here", phases, 4.0, "edge-2")
    assert found["failed"] == 0, found["errors"]
    assert found["open"] == 0
    parts = found["parts"]
    assert parts["before"]["stages"].get("done")
    assert sum(each["requests"] for each in parts.values()) == len(found["series"]["asked_s"])
    assert found["sustainable_per_s"] >= found["capacity_per_s"] * 0.5
    assert 0 < found["memory"]["before"] <= found["memory"]["most"]
    assert found["counters"]["admitted"] > 0
    path = tmp_path / "overload.png"
    overload.draw(found, phases, path)
    assert path.stat().st_size > 1000
    text = overload.text(found, case, "here", phases, path.name)
    assert "edge-2 was killed in the middle of the peak" in text
    assert "Every accepted request ended: 0 were open at the end, none failed." in text
    with pytest.raises(BadRequest, match="there is no node 'nobody' to kill"):
        overload.overloaded(case, running, "here", phases, 4.0, "nobody")
    with pytest.raises(BadRequest, match=r"no level keeps a deadline of 0\.001 s"):
        overload.overloaded(case, running, "here", phases, 0.001, None)


def test_intervals_hold_what_was_seen_and_grow_with_what_comes_in_bursts():
    rng = np.random.default_rng(0)
    stage = np.where(rng.random(600) < 0.1, LATE, DONE)
    seconds = rng.exponential(1.0, 600)
    alone = against.intervals(stage, seconds)
    assert alone["violations"][0] <= (stage != DONE).mean() <= alone["violations"][1]
    assert alone["p99_s"][0] <= np.quantile(seconds[stage == DONE], 0.99) <= alone["p99_s"][1]
    together = against.intervals(np.sort(stage), seconds)
    assert np.diff(together["violations"]) > np.diff(alone["violations"])
    nothing = against.figures(np.full(5, REFUSED), seconds[:5], seconds[:5])
    assert nothing["violations"] == 1.0
    assert FAILED not in (DONE, LATE, REFUSED)


def test_one_fleet_is_started_and_a_trace_must_be_there(config, tmp_path, capsys):
    from experiments.load.__main__ import app

    said = yaml.safe_load(config.read_text())
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(said | {"fleets": said["fleets"] | {"there": said["fleets"]["here"]}}))
    with pytest.raises(BadRequest, match="one fleet is started as processes, and the config has here, there"):
        app(["overload", str(path)], standalone_mode=False)
    with pytest.raises(BadRequest, match="no trace 'tide'"):
        app(["service", str(config), "--trace", "tide"], standalone_mode=False)
