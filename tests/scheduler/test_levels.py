"""Levels: measured against full-cloud on the same prompts, pruned where another is as good, as cheap and needs as little."""

import json

import pytest

from nodes.cli import app, run
from relay.errors import BadRequest
from relay.program import Program
from scheduler.load.levels import SHIPPED, Level, Worth, front, lattice
from scheduler.load.similarity import Rule
from scheduler.outcomes import write_unit

TAIL = "match=exact/codec=fp16/guidance={}/conditioning=encode"
FULL = f"made-up/large:10:0-10/{TAIL.format(3)}"
RELAY = f"made-up/large:10:0-4/small:10:4-10/{TAIL.format('3,3')}"
SMALL = f"made-up/small:10:0-10/{TAIL.format(3)}"


@pytest.fixture
def store(tmp_path):
    """Twelve prompts of two classes: the relay is worse on the second, a cached start is good where prompts are alike."""
    rows = []
    for i in range(12):
        hard = i % 2
        prompt = {
            "config_hash": "h", "family": "made-up", "method": "program", "workload": "w", "split": "test",
            "prompt_index": i, "seed": i, "steps_total": 10, "complexity": "4" if hard else "1",
        }  # fmt: skip
        for text, score in ((FULL, 0.8), (RELAY, 0.4 if hard else 0.8), (SMALL, 0.2)):
            rows.append(prompt | {"program": text, "mode": Program.parse(text).mode, "score_attributes": score})
        rows.append(
            prompt | {"program": FULL, "mode": "full-cloud", "start_similarity": 0.5 + i / 25, "start_skipped": 5,
                      "score_attributes": 0.72 if i > 1 else 0.0}
        )  # fmt: skip
    write_unit(tmp_path, "outcomes", "one", rows)
    curve = {("large", 1): 0.010, ("large", 4): 0.020, ("small", 1): 0.002, ("small", 4): 0.004}
    times = [{"family": "made-up", "member": m, "batch": b, "step_s": s} for (m, b), s in curve.items()]
    write_unit(tmp_path, "curves", "one", times)
    return tmp_path


def test_quality_is_of_full_clouds_and_cost_at_the_best_batch(store):
    levels = {(str(each.program), each.skipped): each for each in lattice("made-up", [store], Rule(((0.58, 0.5),)))}
    assert len(levels) == 4
    full, relay, cached = levels[FULL, 0], levels[RELAY, 0], levels[FULL, 5]
    assert (full.classes["all"].quality, full.cost_s, full.latency_s) == (1.0, pytest.approx(0.05), pytest.approx(0.1))
    assert relay.classes["1"].quality == 1.0
    assert relay.classes["4"].quality == pytest.approx(0.5)
    assert relay.busy_s == {"large": pytest.approx(0.02), "small": pytest.approx(0.006)}
    assert cached.needs == 0.58
    assert cached.classes["all"].prompts == 10  # the two that are not alike enough do not count
    assert cached.classes["all"].quality == pytest.approx(0.9)
    assert cached.cost_s == pytest.approx(0.025)
    assert cached.label == "K = 5, 5 large + 0 small"


def test_a_rule_that_never_skips_so_much_leaves_no_such_level(store):
    assert all(not level.skipped for level in lattice("made-up", [store], Rule(((0.9, 0.1),))))


def level(quality, cost, needs=None, program=RELAY):
    return Level(
        Program.parse(program), 0 if needs is None else 1, needs, {"all": Worth(quality, 0, 1, 9)}, {"large": cost}, 1
    )


def test_the_front_keeps_what_is_best_in_quality_cost_or_what_it_needs():
    full = level(1.0, 10, program=FULL)
    good, dear, cheap, alike, like_but_no_better = (
        level(0.9, 5), level(0.9, 6), level(0.5, 1), level(0.9, 3, 0.8), level(0.9, 3, 0.9),
    )  # fmt: skip
    kept = front([full, good, dear, cheap, alike, like_but_no_better])
    assert kept[0] is full
    assert {id(each) for each in kept} == {id(each) for each in (full, good, cheap, alike)}
    better = level(1.1, 2)
    assert front([full, better])[0] is full  # all is measured against it


@pytest.mark.parametrize("family", ["mini-sd3", "mini-sdxl"])
def test_the_shipped_rows_show_levels_as_table_picture_and_json(family, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["relay", "levels", family, "--picture", str(tmp_path / "levels.png")])
    with pytest.raises(SystemExit, match="0"):
        run(app)
    assert "28 large + 0 small" in capsys.readouterr().out
    assert (tmp_path / "levels.png").stat().st_size > 10_000
    monkeypatch.setattr("sys.argv", ["relay", "levels", family, "--json", "--all", "--class", "4"])
    with pytest.raises(SystemExit, match="0"):
        run(app)
    told = json.loads(capsys.readouterr().out)
    assert len(told) >= 9
    assert all(0 < each["classes"]["4"]["quality"] < 2 for each in told)
    assert sum(each["classes"]["4"]["front"] for each in told) < len(told)


@pytest.mark.parametrize(
    ("folders", "family", "said"),
    [
        (None, "sd35", "no scene scores of sd35"),
        ("empty", "mini-sd3", "no outcome rows"),
        ("store", "mini-sd3", "made-up"),
    ],
)
def test_what_was_not_measured_is_said_in_one_line(store, tmp_path, folders, family, said):
    where = {None: SHIPPED, "empty": [tmp_path / "nowhere"], "store": [store]}[folders]
    with pytest.raises(BadRequest, match=said):
        lattice(family, where)


@pytest.mark.parametrize("family", ["mini-sd3", "mini-sdxl"])
def test_shipped_levels_are_measured_safest_first_and_predict_within_bounds(family):
    from scheduler.load.prediction import read_levels, shipped

    shipped_ones = read_levels(shipped(family), family)
    levels = shipped_ones.from_noise
    quality = [level.quality for level in levels.levels]
    assert quality == sorted(quality, reverse=True)
    own = {level.program: level.quality for level in levels.levels}
    cached = shipped_ones.levels[len(levels.levels) :]
    assert cached, "some begin from cached latents"
    assert all(level.skipped and 0.9 * own[level.program] < level.quality <= own[level.program] for level in cached)
    assert shipped_ones.predict(["a red heart"])[0, : len(own)] == pytest.approx(levels.predict(["a red heart"])[0])
    assert levels.levels[0].work.program.mode == "full-cloud"
    assert {level.work.program.mode for level in levels.levels} == {"full-cloud", "relay", "edge-only"}
    said = levels.predict(["a red heart, a blue ring, a green star and a small yellow square", 'the word "CAT" in red'])
    assert ((said >= 0) & (said <= 1)).all()
    assert said[0, 0] > said[0, -1]
