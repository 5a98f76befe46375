"""What routers learn from: qualities by mode out of a run that is not finished."""

from math import isnan, nan

import numpy as np
import pytest

from experiments.routing.data import EDGE, FULL, RELAY, load
from relay.errors import BadRequest
from scheduler.outcomes import write_unit
from scheduler.router.settings import METRIC_SETS, Reference, read_settings

PROGRAMS = {
    ("full-cloud", 28, 0): "m/large:28:0-28",
    ("relay", 10, 6): "m/large:28:0-10/small:8:2-8",
    ("relay", 10, 18): "m/large:28:0-10/small:28:10-28",
    ("relay", 14, 14): "m/large:28:0-14/small:28:14-28",
    ("edge-only", 0, 28): "m/small:28:0-28",
}
VALUE = {"full-cloud": 0.9, "relay": 0.8, "edge-only": 0.5}


def rows(split, first, last, modes=("full-cloud", "relay", "edge-only"), family="mini-sd3", seed=0):
    found = []
    for (mode, s, n), program in PROGRAMS.items():
        for i in range(first, last):
            if mode not in modes:
                continue
            scores = {f"score_{name}": VALUE[mode] + 0.01 * seed for name in METRIC_SETS["clip"]}
            scores |= {f"score_{name}": 1.0 if i % 2 else nan for name in METRIC_SETS["scene"]}
            if (s, n) == (14, 14):
                scores["score_q_color"] = 0.1
            found.append(
                {"family": family, "method": "program", "program": program, "mode": mode, "steps_total": 28, "handoff": s,
                 "small_steps": n, "split": split, "prompt_index": i, "prompt": f"{split} {i}", "scene": "", "seed": seed,
                 "complexity": str(i % 3)} | scores
            )  # fmt: skip
    return found


@pytest.fixture
def run(tmp_path):
    write_unit(tmp_path, "outcomes", "a", rows("train", 0, 6))
    write_unit(tmp_path, "outcomes", "b", rows("train", 6, 9, modes=("full-cloud", "relay")))  # still without edge-only
    write_unit(tmp_path, "outcomes", "c", rows("validation", 0, 3) + rows("train", 0, 6, family="mini-sdxl"))
    return tmp_path


def test_only_prompts_with_every_mode_count(run):
    data = load(run, "mini-sd3")
    assert data.train.prompts == tuple(f"train {i}" for i in range(6))
    assert (len(data.validation), len(data.test)) == (3, 0)
    assert data.metrics == METRIC_SETS["clip"]
    assert data.train.quality.shape == (6, 3, 10)
    assert np.allclose(data.mu, [[0.9] * 10, [0.8] * 10, [0.5] * 10])
    assert np.allclose(data.gap(), 0.4)
    assert np.allclose(data.gap(RELAY, EDGE), 0.3)


def test_the_relay_is_the_familys_reference(run):
    assert load(run, "mini-sd3").programs["relay"] == PROGRAMS["relay", 10, 6]
    longest = load(run, "mini-sd3", reference=Reference(handoff=10))
    assert longest.programs["relay"] == PROGRAMS["relay", 10, 18]
    other = load(run, "mini-sdxl")
    assert other.programs["relay"] == PROGRAMS["relay", 14, 14]
    assert np.allclose(other.train.quality[:, RELAY, other.metrics.index("q_color")], 0.1)
    assert load(run, "mini-sd3").programs["edge-only"] == PROGRAMS["edge-only", 0, 28]


def test_metrics_that_do_not_apply_stay_unknown(run):
    data = load(run, "mini-sd3", "scene")
    assert np.isnan(data.train.quality[0]).all()
    assert (data.train.quality[1] == 1).all()
    assert np.allclose(data.mu, 1)
    fewer = data.only(["letters", "counting"])
    assert fewer.train.quality.shape == (6, 3, 2)
    assert fewer.metrics == ("letters", "counting")


def test_seeds_are_averaged_and_rows_are_named_by_a_digest(run):
    before = load(run, "mini-sd3").digest
    assert load(run, "mini-sd3").digest == before
    write_unit(run, "outcomes", "d", rows("train", 0, 6, seed=2))
    again = load(run, "mini-sd3")
    assert len(again.train) == 6
    assert np.allclose(again.train.quality[:, FULL], 0.91)
    assert again.digest != before


def test_part_of_a_split(run):
    split = load(run, "mini-sd3", "scene").train
    part = split.take([3, 1])
    assert part.prompts == ("train 3", "train 1")
    assert part.complexity == ("0", "1")
    assert part.mean_quality().shape == (2, 3)
    assert isnan(split.quality[0, 0, 0])


def test_what_is_missing_is_said(run, tmp_path):
    with pytest.raises(BadRequest, match="choose one of clip, scene"):
        load(run, "mini-sd3", "taste")
    with pytest.raises(BadRequest, match="no reference relay for other"):
        load(run, "other")
    with pytest.raises(BadRequest, match="no relay rows of mini-sd3"):
        load(run, "mini-sd3", reference=Reference(handoff=3))
    with pytest.raises(BadRequest, match="holds no scores"):
        load(tmp_path / "none", "mini-sd3")
    bad = tmp_path / "router.yaml"
    bad.write_text("references: {}\nbudget: {full: 2}\n")
    with pytest.raises(BadRequest, match=r"router.yaml.*budget.full"):
        read_settings(bad)
