"""The table under load is what was run, once; what cannot be compared is refused; a trace of one's own comes at its load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
import yaml
from tiny_load import PLACE, write_load

from experiments.load.__main__ import app
from experiments.load.case import Cell, read_case
from experiments.load.cells import run_cell, worth
from experiments.load.tables import fitting
from relay.errors import BadRequest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_load(tmp_path_factory.mktemp("load"))


def test_a_cell_is_of_the_step_times_themselves_not_of_the_folder_they_lie_in(tmp_path):
    said = (ROOT / "configs" / "experiments" / "load.yaml").read_text()
    shipped = "docs/results/step-times"
    shutil.copytree(ROOT / shipped, tmp_path / "copy")
    cell, digests = Cell(fleet="equal", trace="poisson", load=1.0, deadline=2.0), []
    for folder in (ROOT / shipped, tmp_path / "copy", ROOT / "docs" / "results" / "rise"):
        path = tmp_path / "load.yaml"
        path.write_text(said.replace(shipped, str(folder)))
        digests.append(read_case(path).digest("ours", cell, {}, 100, "test"))
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]  # other step times: run again


def test_tuning_and_the_table_run_once_and_say_what_was_run(config, tmp_path):
    folder, out = tmp_path / "runs", tmp_path / "load.md"
    few = [word for name in ("ours", "agnostic", "alike", "proteus", "nirvana") for word in ("--only", name)]
    app(["tune", str(config), *few, "--folder", str(folder)], standalone_mode=False)
    tuned = yaml.safe_load((config.parent / "tuned.yaml").read_text())["systems"]
    assert {name: len(each["tried"]) for name, each in tuned.items()} == {"ours": 2, "agnostic": 2, "proteus": 2}
    assert tuned["ours"]["worth"] == max(each["worth"] for each in tuned["ours"]["tried"])
    asked = ["table", str(config), *few, "--folder", str(folder), "--out", str(out), "--requests", "80"]
    app(asked, standalone_mode=False)
    text, data = out.read_text(), json.loads(out.with_suffix(".json").read_text())["families"]["tiny"]
    assert "Left out: nirvana: NIRVANA-like needs levels that start from cached latents" in text
    assert "## three fleet, flash" in text
    assert "80 requests x 2 seed(s) a cell at load 1.3 and deadline 2 x, 1 of agnostic; " in text
    assert {len(e["seeds"]) for e in data["cells"] if e["system"] == "agnostic"} == {1}
    assert "Load 1.3, deadline 2 x" in text
    assert "| ours | yes |  |" in text
    assert "| agnostic |  |  |" in text
    assert len(data["cells"]) == 4 * 2 * 2  # systems, traces, loads
    assert data["tuned"]["alike"] == {k: v for k, v in tuned["ours"]["settings"].items() if k != "classes"}
    assert (tmp_path / "load-three.png").stat().st_size > 1000
    case = read_case(config)
    cell = Cell(fleet="three", trace="poisson", load=1.3, deadline=2.0)
    said = {"system": "ours"} | msgspec.to_builtins(cell)
    stored, other = next(each for each in data["cells"] if {key: each[key] for key in said} == said)["seeds"]
    assert stored != other
    elsewhere = [each for each in data["cells"] if each["load"] == 0.7]
    assert {(len(each["seeds"]), each["seeds"][0]["requests"]) for each in elsewhere} == {(1, 50)}
    assert {(each["system"], each["trace"], each["requests"]) for each in data["long"]} == {
        ("ours", "poisson", 80), ("ours", "flash", 80)
    }  # fmt: skip
    mine, theirs = (
        next(e for e in data["cells"] if {k: e[k] for k in ("system", "trace", "load")} == {
            "system": name, "trace": "poisson", "load": 1.3})["seeds"]
        for name in ("ours", "proteus")
    )  # fmt: skip
    goal = next(each for each in data["goals"] if each["trace"] == "poisson")
    assert goal["violations"] == pytest.approx(np.mean([each["violations"] for each in mine]))
    kept = np.mean([each["quality"] for each in theirs]) >= 0.95
    assert goal["best"] == ("proteus" if kept else None)
    seeds = {(e["system"], e["trace"]): e["seeds"] for e in data["cells"] if e["load"] == 1.3}
    for each in (each for each in data["goals"] if each["best"]):
        mine, theirs = seeds["ours", each["trace"]], seeds[each["best"], each["trace"]]
        both = min(len(mine), len(theirs))
        assert each["violations_beside_it"] == pytest.approx(np.mean([one["violations"] for one in mine[:both]]))
        assert each["their_violations"] == pytest.approx(np.mean([one["violations"] for one in theirs[:both]]))
    assert any(each["best"] for each in data["goals"])
    for name, loads in data["sustained"].items():
        means = {
            e["load"]: (np.mean([x["violations"] for x in e["seeds"]]), np.mean([x["quality"] for x in e["seeds"]]))
            for e in data["cells"]
            if (e["system"], e["trace"]) == (name, "poisson")
        }
        good = [load for load, (violations, quality) in sorted(means.items()) if violations < 0.01 and quality >= 0.95]
        assert loads["three, poisson"] == (0 if 0.7 not in good else max(good))
    fresh = run_cell(case, tmp_path / "fresh", "ours", cell, 0, 80)
    assert fresh == run_cell(case, folder, "ours", cell, 0, 80)  # as the table's run left it on disk
    assert stored == {key: round(value, 6) for key, value in fresh.items() if key != "levels"}
    assert fresh["violations"] == pytest.approx(fresh["late"] + fresh["refused"])
    assert sum(fresh["levels"]) == pytest.approx(1.0, abs=1e-3)
    assert worth(fresh) == pytest.approx((1 - fresh["violations"]) * fresh["quality"] - fresh["violations"])
    count = len(list(folder.rglob("*.json")))
    app(asked, standalone_mode=False)
    assert len(list(folder.rglob("*.json"))) == count


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"systems": {"x": {"system": "best"}}}, "unknown system 'best'"),
        ({"systems": {"x": {"system": "ours", "settings": {"marge": 1}}}}, "marge"),
        ({"systems": {"x": {"system": "proteus", "settings": {"head": 1}}}}, "head"),
        ({"traces": {"poisson": {"arrivals": "poison"}}}, "unknown arrivals 'poison'"),
        ({"store": ["nowhere"]}, "nowhere"),
        ({"fleets": {}}, "fleets"),
        ({"systems": {"x": {"system": "agnostic", "tuned_as": "y"}}}, "systems.x: tuned_as: no system 'y'"),
        ({"long": {"best": 10}}, "long: no system best"),
        ({"deadlines": [0.001, 2.0]}, "deadlines: 0.001 x .* no level of fleet three ends within"),
        ("no edge", "fleet three has no full-cloud capacity: none of its nodes holds tiny's large"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(config, tmp_path, change, said):
    path, config_said = tmp_path / "load.yaml", yaml.safe_load(config.read_text()) | {"long": {}}
    if change == "no edge":
        change, nodes = {}, config_said["fleets"]["three"]["nodes"]
        del nodes["edge-1"], nodes["edge-2"]
    path.write_text(yaml.safe_dump(config_said | change))

    def read():
        bad = read_case(path)
        fitting(bad, list(bad.config.systems))
        bad.demand(PLACE, 0, "test", 10)

    with pytest.raises(BadRequest, match=said) as refusal:
        read()
    assert "\n" not in str(refusal.value)


def test_a_trace_of_ones_own_comes_at_the_load_asked_for(config, tmp_path):
    gaps = tmp_path / "own.csv"
    gaps.write_text("gap_s\n" + "\n".join(str(1 + i % 3) for i in range(100)) + "\n")
    path = tmp_path / "load.yaml"
    own = {"poisson": {"arrivals": "trace", "path": str(gaps), "gaps": True}}
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"traces": own}))
    case = read_case(path)
    found = case.demand(PLACE, 0, "test", 80)
    per_s, _ = case.capacity("three")
    assert len(found.arrival_s) == 80
    assert 79 / found.arrival_s[-1] == pytest.approx(1.3 * per_s, rel=0.05)
