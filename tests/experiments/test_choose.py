"""Settings of baselines: chosen from a run's rows, kept by a config; and runs that are compared like with like."""

from __future__ import annotations

import json

import msgspec
import pytest
from typer.testing import CliRunner

from experiments.baselines import load_baseline
from experiments.baselines.base import Setting
from experiments.baselines.chosen import Chosen, kept, of_family, read_chosen
from experiments.baselines.points import Point, label_of, points
from experiments.choose import choose
from experiments.cli import app
from experiments.compare import compare
from experiments.run_folder import open_run
from experiments.timing import LATENCY
from relay.errors import BadRequest
from relay.family import Family
from scheduler.outcomes import write_unit

FULL = "mini-sd3/large:28:0-28/match=exact/codec=fp16/guidance=3/conditioning=encode"
# Each setting with its score, its denoising seconds at batch 1 (full-cloud's: 2.1), and whether it should be chosen.
SETTINGS = {
    "fewer-steps": [("21 of 28 steps", 0.9, 1.6, False), ("11 of 28 steps", 0.8, 0.9, True), ("6 of 28 steps", 0.5, 0.4, False)],
    "taylorseer": [("every 2 steps, order 1", 0.9, 1.1, False), ("every 3 steps, order 1", 0.7, 1.05, True)],
}  # fmt: skip


def write_run(folder, outcomes, times=()):
    folder.mkdir()
    facts = {"config": {"name": "made"}, "config_hash": "0" * 12, "dtypes": {"mini-sd3": "bf16"}}
    facts["provenance"] = {"commit": "abc", "date": "2026-01-01", "processor": "a machine"}
    (folder / "run.json").write_text(json.dumps(facts))
    write_unit(folder, "outcomes", "all", outcomes)
    if times:
        write_unit(folder, "times", "all", times)
    return open_run(folder)


def row(program, score, method="program", mode="baseline", prompt=0, **more):
    same = {
        "family": "mini-sd3",
        "workload": "scenes",
        "split": "validation",
        "seed": prompt,
        "prompt": f"prompt {prompt}",
    }
    return same | {
        "method": method, "program": program, "mode": mode, "steps_total": 28, "score_attributes": score, **more
    }  # fmt: skip


def time_row(program, seconds, method="program"):
    return {
        "family": "mini-sd3", "method": method, "program": program, "measure": LATENCY, "link": "none",
        "large_s": seconds / 2, "small_s": seconds / 2, "end_to_end_s": 100.0,
    }  # fmt: skip


def text_of(name, label):
    return f"{name}[{label}]" if "of 28" in label else f"{name}[{label}, T = 28]"


@pytest.fixture
def validated(tmp_path):
    listed = [(name, *setting) for name, settings in SETTINGS.items() for setting in settings]
    outcomes = [row(FULL, 0.95, mode="full-cloud", prompt=i) for i in range(2)]
    # of two prompts, whose mean is the score
    outcomes += [
        row(text_of(n, label), score + (i - 0.5) / 5, n, prompt=i) for n, label, score, *_ in listed for i in range(2)
    ]
    times = [time_row(FULL, 2.1)] + [time_row(text_of(n, label), s, n) for n, label, _, s, _ in listed]
    return write_run(tmp_path / "run", outcomes, times)


def test_the_best_that_is_fast_enough_is_chosen_and_a_config_can_read_it(validated, tmp_path):
    out = tmp_path / "chosen" / "it.yaml"
    done = CliRunner().invoke(app, ["choose", str(validated.folder), "--speedup", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    expected = {name: label for name, settings in SETTINGS.items() for label, *_, wanted in settings if wanted}
    assert read_chosen(out) == {"mini-sd3": Chosen(28, expected)}
    text = out.read_text()
    assert text == done.stdout
    assert "# 0.800, 2.33x\n" in text
    assert "2 validation prompts, bf16" in text


def test_where_nothing_is_fast_enough_the_fastest_is_chosen_and_it_says_so(validated, tmp_path):
    found = {c.baseline: c for c in choose(validated, [3.0])["mini-sd3"]}
    assert (found["fewer-steps"].label, found["fewer-steps"].fast_enough) == ("6 of 28 steps", True)
    assert (found["taylorseer"].label, found["taylorseer"].fast_enough) == ("every 3 steps, order 1", False)
    done = CliRunner().invoke(
        app, ["choose", str(validated.folder), "--speedup", "3", "--out", str(tmp_path / "it.yaml")]
    )
    assert done.stdout.count(": its fastest") == 1


def test_several_speedups_choose_several_settings_each_named_once(validated, tmp_path, family):
    out = tmp_path / "it.yaml"
    asked = ["choose", str(validated.folder), "--speedup", "3", "--speedup", "2", "--out", str(out)]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    chosen = read_chosen(out)
    assert chosen == {
        "mini-sd3": Chosen(
            28, {"fewer-steps": ["11 of 28 steps", "6 of 28 steps"], "taylorseer": "every 3 steps, order 1"}
        )
    }
    assert "at 2x and at 3x" in done.stdout
    found = points([load_baseline("fewer-steps")], family, [28, 50], chosen)
    assert [p.text for p in found] == [
        f"fewer-steps[{n} steps]" for n in ("11 of 28", "6 of 28", "20 of 50", "10 of 50")
    ]


def test_settings_are_not_chosen_from_test_prompts_or_without_times(validated, tmp_path):
    rows = [row(FULL, 0.9, mode="full-cloud", split="test")]
    with pytest.raises(BadRequest, match="test split"):
        choose(write_run(tmp_path / "test", rows), [2.1])
    with pytest.raises(BadRequest, match="no times"):
        choose(write_run(tmp_path / "untimed", [row(FULL, 0.9, mode="full-cloud")]), [2.1])
    with pytest.raises(BadRequest, match="no score taste"):
        choose(validated, [2.1], "taste")


class Listed:
    """A baseline whose labels name T, or do not."""

    name, paper, note = "listed", "none", ""

    def __init__(self, *forms):
        self.forms = forms

    def applies(self, family):
        return None

    def settings(self, family, steps=None):
        return [Setting(form.format(steps), {}) for form in self.forms]


@pytest.fixture(scope="module")
def family():
    return Family.load("mini-sd3")


def test_a_setting_is_found_again_at_another_t(family):
    named, plain = Listed("1 of {}", "2 of {}"), Listed("every 2", "every 3")
    assert [s.label for s in kept(named, family, 50, Chosen(28, {"listed": "2 of 28"}))] == ["2 of 50"]
    assert [s.label for s in kept(plain, family, 50, Chosen(28, {"listed": "every 3"}))] == ["every 3"]
    assert [s.label for s in kept(named, family, 50, None)] == ["1 of 50", "2 of 50"]
    found = points([named], family, [28, 50], {"mini-sd3": Chosen(28, {"listed": "1 of 28"})})
    assert [point.text for point in found] == ["listed[1 of 28]", "listed[1 of 50]"]
    for label in ("2 of 28", "every 2"):
        point = Point(plain, Setting(label, {}), 28)
        assert label_of("listed", point.text, 28) == label


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"mini-sdxl": Chosen(28, {})}, "nothing is chosen for mini-sd3, only for mini-sdxl"),
        ({"mini-sd3": Chosen(28, {"listed": "1 of 28", "magic": "x"})}, "unknown baseline 'magic'"),
        ({"mini-sd3": Chosen(28, {"fewer-steps": "11 of 28 steps"})}, "nothing is chosen for the baseline listed"),
        ({"mini-sd3": Chosen(28, {"listed": "3 of 28"})}, "no setting '3 of 28' at T = 28, but 1 of 28"),
    ],
)
def test_names_that_are_not_known_are_refused(family, chosen, said):
    with pytest.raises(BadRequest, match=said):
        points([Listed("1 of {}")], family, [28], chosen)
    assert of_family(None, family, []) is None


def test_a_file_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "bad.yaml").write_text("mini-sd3: {steps: 28, setings: {}}")
    (tmp_path / "empty.yaml").write_text("mini-sd3: {steps: 28, settings: {mag-cache: []}}")
    for name, said in (("bad.yaml", "setings"), ("none.yaml", "cannot be read"), ("empty.yaml", "length >= 1")):
        with pytest.raises(BadRequest, match=said) as refused:
            read_chosen(tmp_path / name)
        assert name in str(refused.value)


def relay(codec, steps="large:28:0-8/small:8:2-8"):
    return f"mini-sd3/{steps}/match=exact/codec={codec}/guidance=3,3/conditioning=encode"


def test_across_runs_like_is_paired_with_like(tmp_path):
    """Each baseline's setting with itself, each relay with those of its steps, each picture with that of its start."""
    shared = [
        row("fewer-steps[11 of 28 steps]", 0.8, "fewer-steps"),
        row("fewer-steps[6 of 28 steps]", 0.5, "fewer-steps"),
    ]
    other = "large:28:0-14/small:28:14-28"
    warm = {"start_prompt": "another", "start_seed": 3, "start_skipped": 2}
    ours = [row(relay("fp16"), 0.9), row(relay("fp16"), 0.7, **warm), row(relay("fp16", other), 0.95)]
    theirs = [
        row(relay("int8"), 0.85),
        row(relay("int8"), 0.6, **warm),
        row(relay("bf16"), 0.9),
        row(relay("fp16", other), 0.9),
    ]
    a, b = write_run(tmp_path / "a", shared + ours), write_run(tmp_path / "b", shared + theirs)
    found = {(r["program"], r["program_b"]): r for r in compare(a, b, across=True)}
    same = {r["program"] for r in shared} | {relay("fp16", other)}
    assert set(found) == {(p, p) for p in same} | {(relay("fp16"), relay(codec)) for codec in ("int8", "bf16")}
    assert found[relay("fp16"), relay("int8")]["pairs"] == 2
    assert found[relay("fp16"), relay("int8")]["difference"] == pytest.approx((-0.05 - 0.1) / 2)
    assert all(found[p, p]["difference"] == 0 for p in same if p.startswith("fewer"))
    assert {r["program"] for r in compare(a, b)} == same
    shown = CliRunner().invoke(app, ["compare", str(a.folder), str(b.folder), "--across"]).stdout
    assert f"{relay('fp16')} -> codec=int8" in shown


def test_what_is_chosen_is_part_of_the_configs_hash():
    from experiments.grid import Experiment, config_hash

    said = {"name": "x", "workload": {}, "families": ["mini-sd3"], "programs": [{"mode": "full-cloud"}]}
    plain = msgspec.convert(said, Experiment)
    one, two = (msgspec.structs.replace(plain, chosen={"f": Chosen(28, {"a": label})}) for label in ("1", "2"))
    assert len({config_hash(config, {}) for config in (plain, one, two)}) == 3
