"""The long commands of the docs in their short form, through the same code."""

import contextlib
import io
import json
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(module, *words):
    """`python -m MODULE WORDS` without paying for a new interpreter's imports each time; what it prints."""
    said, before, threads = io.StringIO(), sys.argv, torch.get_num_threads()
    sys.argv = [module, *map(str, words)]
    try:
        with contextlib.chdir(ROOT), contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module may have been imported by another test
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"ended with code {end.code}: {said.getvalue()[-2000:]}")
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    return said.getvalue()


def test_the_demo_leaves_a_sheet_the_pictures_and_a_table(tmp_path):
    shown = run("experiments.demo", "--out", tmp_path, "--sample", "2", "--prompts", "1", "--steps", "8")
    for family in ("mini-sd3", "mini-sdxl"):
        assert str(tmp_path / f"{family}.png") in shown
        sheet = Image.open(tmp_path / f"{family}.png")
        assert sheet.width > 5 * 128
        assert len(list((tmp_path / family).glob("*.png"))) == 5
        data = json.loads((tmp_path / f"{family}.json").read_text())
        assert [len(scores) for scores in data["attributes"].values()] == [2] * 5
    assert "gap closed" in shown


def test_the_evaluation_writes_its_table_with_its_command(tmp_path):
    run(
        "experiments.evaluate",
        "--threads",
        "1",
        "--out",
        tmp_path,
        "--family",
        "mini-sd3",
        "--prompts",
        "10",
        "--repeats",
        "1",
        "--steps",
        "8",
    )
    text = (tmp_path / "quality-mini-sd3.md").read_text()
    assert "large alone (full-cloud)" in text
    assert "ceiling" in text
    assert "python -m experiments.evaluate" in text
    rows = json.loads((tmp_path / "quality-mini-sd3.json").read_text())["rows"]
    assert rows["relay, s = T/2"]["steps"] == {"large": 4, "small": 4}
    ceiling = rows["VAE reconstructions of true scenes (ceiling)"]["classes"]["all"]["attributes"][0]
    floor = rows["true renders of other prompts (floor)"]["classes"]["all"]["attributes"][0]
    assert floor < 0.6
    assert ceiling > 0.9


def test_the_benchmark_writes_ratios(tmp_path):
    run(
        "experiments.bench",
        "--threads",
        "1",
        "--out",
        tmp_path / "bench.md",
        "--family",
        "mini-sd3",
        "--repeats",
        "1",
        "--batches",
        "1,2",
    )
    data = json.loads((tmp_path / "bench.json").read_text())["families"]["mini-sd3"]
    assert data["step_ratio"] > 1
    assert set(data["step_s"]["large"]) == {"1", "2"}
    assert data["handoff"]["fp32"]["bytes"] > data["handoff"]["fp16"]["bytes"] > data["handoff"]["int8"]["bytes"]
    assert "ratio" in (tmp_path / "bench.md").read_text()


def test_the_deviation_table_has_its_controls(tmp_path):
    run("experiments.deviation", "--out", tmp_path / "d.md", "--family", "mini-sd3", "--prompts", "2")
    text = (tmp_path / "d.md").read_text()
    for row in ("relay", "sigma off by one", "another prompt", "untrained"):
        assert row in text


def test_the_plain_pipeline_is_compared_pair_by_pair(tmp_path):
    run("experiments.plain_pipeline", "--out", tmp_path / "p.md", "--family", "mini-sdxl", "--prompts", "1")
    assert "paired" in (tmp_path / "p.md").read_text()


def test_the_table_of_schedules_marks_the_one_that_is_shipped():
    from experiments.schedule_sweep import table

    found = json.loads((ROOT / "docs" / "results" / "schedules.json").read_text())["families"]
    text = table(found, 120)
    assert text in (ROOT / "docs" / "results" / "schedules.md").read_text()
    for family, key in (("mini-sd3", "shift"), ("mini-sdxl", "sigma_max")):
        config = ROOT / "relay" / "weights" / family / "scheduler" / "scheduler_config.json"
        assert f"| **{key} {json.loads(config.read_text())[key]}** |" in text


def test_the_judge_is_checked_against_renders_and_a_persons_labels(tmp_path):
    run("experiments.judge_check", "report", "--out", tmp_path / "j.md", "--prompts", "20")
    found = json.loads((tmp_path / "j.json").read_text())["families"]
    assert set(found) == {"clean renders", "VAE reconstructions", "a person's labels of generated images"}
    labelled = found["a person's labels of generated images"]
    assert labelled["background"][1] == 100
    assert sum(right for right, _ in labelled.values()) > 0.9 * sum(asked for _, asked in labelled.values())


@pytest.mark.parametrize("part", ["text", "mini-sd3/small"])
def test_training_goes_on_from_a_checkpoint_and_from_the_shipped_weights(tmp_path, part):
    where = ["--work", tmp_path / "work", "--out", tmp_path / "weights", "--threads", "1", "--quick"]
    first = run(
        "experiments.training", "part", part, "--total-minutes", "1", "--minutes", "0.01", "--start", "shipped", *where
    )
    again = run("experiments.training", "part", part, "--total-minutes", "1", "--minutes", "0.01", *where)
    assert "step 0" in first
    assert "step 0," not in again
    found = list((tmp_path / "weights").rglob("provenance.json"))
    latest = max(found, key=lambda p: p.stat().st_mtime)
    facts = json.loads(latest.read_text())
    assert facts["samples"] > 0
    assert facts["command"].startswith("relay-train part")
