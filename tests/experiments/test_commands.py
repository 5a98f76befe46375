"""The long commands of the docs in their short form, through the same code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(*words, timeout=240):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_demo_leaves_a_sheet_the_pictures_and_a_table(tmp_path):
    shown = run("experiments.demo", "--out", tmp_path, "--sample", "5", "--prompts", "1")
    for family in ("mini-sd3", "mini-sdxl"):
        assert str(tmp_path / f"{family}.png") in shown
        sheet = Image.open(tmp_path / f"{family}.png")
        assert sheet.width > 5 * 128
        assert len(list((tmp_path / family).glob("*.png"))) == 5
        data = json.loads((tmp_path / f"{family}.json").read_text())
        assert all(len(scores) == 5 for scores in data["attributes"].values())
    assert "gap closed" in shown


def test_the_evaluation_writes_its_table_with_its_command(tmp_path):
    run("experiments.evaluate", "--out", tmp_path, "--family", "mini-sd3", "--prompts", "10", "--repeats", "1")
    text = (tmp_path / "quality-mini-sd3.md").read_text()
    assert "large alone (full-cloud)" in text
    assert "ceiling" in text
    assert "python -m experiments.evaluate" in text
    rows = json.loads((tmp_path / "quality-mini-sd3.json").read_text())["rows"]
    assert rows["relay, s = T/2"]["steps"] == {"large": 14, "small": 14}
    ceiling = rows["VAE reconstructions of true scenes (ceiling)"]["classes"]["all"]["attributes"][0]
    floor = rows["true renders of other prompts (floor)"]["classes"]["all"]["attributes"][0]
    assert floor < 0.6
    assert ceiling > 0.9


def test_the_benchmark_writes_ratios(tmp_path):
    run("experiments.bench", "--out", tmp_path / "bench.md", "--family", "mini-sd3", "--repeats", "1")
    data = json.loads((tmp_path / "bench.json").read_text())["families"]["mini-sd3"]
    assert data["step_ratio"] > 1
    assert data["handoff"]["fp32"]["bytes"] > data["handoff"]["fp16"]["bytes"] > data["handoff"]["int8"]["bytes"]
    assert "ratio" in (tmp_path / "bench.md").read_text()


def test_the_deviation_table_has_its_controls(tmp_path):
    run("experiments.deviation", "--out", tmp_path / "d.md", "--family", "mini-sd3", "--prompts", "3")
    text = (tmp_path / "d.md").read_text()
    for row in ("relay", "sigma off by one", "another prompt", "untrained"):
        assert row in text


def test_the_plain_pipeline_is_compared_pair_by_pair(tmp_path):
    run("experiments.plain_pipeline", "--out", tmp_path / "p.md", "--family", "mini-sdxl", "--prompts", "5")
    assert "paired" in (tmp_path / "p.md").read_text()


def test_the_judge_is_checked_against_renders_and_a_persons_labels(tmp_path):
    run("experiments.judge_check", "report", "--out", tmp_path / "j.md", "--prompts", "50")
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
