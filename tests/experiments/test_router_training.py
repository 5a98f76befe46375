"""`relay-train router` on a small run: weights that load, say what validation said, and carry where they come from."""

import json

import numpy as np
import pytest

from experiments.routing import promise_check
from experiments.routing.data import load
from experiments.training import router_run
from experiments.workloads import load_workload
from relay.errors import BadRequest
from relay.family_spec import find_family
from scheduler.outcomes import write_unit
from scheduler.router import store
from scheduler.router.router import Router
from scheduler.router.settings import METRIC_SETS
from scheduler.router.tokens import encoder_digest

SMALL = {"width": 16, "layers": 1, "heads": 2, "rank": 4, "hidden": 16}
MODES = {"full-cloud": (28, 0, 0.9), "relay": (10, 6, 0.8), "edge-only": (0, 28, 0.6)}


def rows(split, count):
    rng = np.random.default_rng(count)
    prompts = load_workload("scenes").prompts(split, count, 3)
    return [
        {"family": "mini-sd3", "method": "program", "program": f"mini-sd3/{mode}", "mode": mode, "steps_total": 28,
         "handoff": s, "small_steps": n, "split": split, "prompt_index": i, "prompt": prompt.text, "scene": prompt.scene,
         "complexity": prompt.complexity, "seed": 0}
        | {f"score_{name}": float(value + rng.normal(0, 0.02)) for name in METRIC_SETS["clip"]}
        | {f"score_{name}": float(rng.random() < value) for name in METRIC_SETS["scene"]}
        for i, prompt in enumerate(prompts)
        for mode, (s, n, value) in MODES.items()
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for split, count in (("train", 60), ("validation", 30), ("test", 20)):
        write_unit(folder, "outcomes", split, rows(split, count))
    (folder / "run.json").write_text(json.dumps({"config_hash": "abc", "config": {}, "weights": {"mini-sd3": "m1"}}))
    return folder


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("weights"), []
    paths = router_run.train_routers(
        [run], None, ("clip", "scene"), out, 0, {"epochs": 2}, SMALL, "relay-train router", said.append
    )
    return paths, said


def test_weights_are_written_with_where_they_come_from(run, written):
    paths, said = written
    assert [path.parts[-2:] for path in paths] == [("mini-sd3", "clip.safetensors"), ("mini-sd3", "scene.safetensors")]
    assert any("60 train and 30 validation prompts" in line for line in said)
    card = store.load(paths[0], "mini-sd3").card
    assert card.encoder == encoder_digest(find_family("mini-sd3"))
    assert card.data == load(run, "mini-sd3").digest
    assert card.fingerprint["parameterisation"] == "flow"
    assert card.provenance["members"] == "m1"
    assert card.provenance["runs"] == {run.name: "abc"}
    assert set(card.provenance["validation"]) >= {"dP_at_half", "accuracy", "always", "never"}
    assert card.prompts == {"train": 60, "validation": 30}


def test_they_decide(written):
    router = Router.load(written[0][1])
    assert router.metrics == METRIC_SETS["scene"]
    decision = router.decide("a red heart on a white background")
    assert decision.mode in MODES
    assert decision.versions == {"mini-sd3": router.trained[0].card.version}
    assert len(router.calibration.outcome) == 30


def test_without_rows_of_every_mode_it_says_so(tmp_path):
    write_unit(tmp_path, "outcomes", "a", [row for row in rows("train", 5) if row["mode"] != "relay"])
    with pytest.raises(BadRequest, match="no rows of all modes"):
        router_run.train_routers([tmp_path], None, ("clip",), tmp_path, 0, {}, {}, "", print)


def test_the_promise_is_checked_on_held_out_prompts(run, written, monkeypatch):
    monkeypatch.setattr(store, "WEIGHTS", written[0][0].parents[1])
    data = load(run, "mini-sd3", "scene")
    pool, classes = promise_check.held_out(data)
    assert len(pool.outcome) == len(classes) == 50
    found = promise_check.violations(pool, "scene", rounds=5, count=40, explore=0.0)
    assert {row["epsilon"] for row in found} == set(promise_check.EPSILONS["scene"])
    assert all(0 <= row["violations"] <= 1 and row["refused"] <= 5 for row in found)
    shifted = promise_check.shift(pool, classes, 0.15, rounds=3, count=30)
    assert shifted[0]["mix"] == "the same mix"
    (only,) = promise_check.programs([run], data)
    assert only["covered"]
    text = promise_check.table({"x": {
        "prompts": 50, "rounds": 5, "calibration": 40, "explore": 0.0, "violations": found, "shift": shifted,
        "budget": promise_check.small_budget(pool, 0.15, 0.1), "programs": [only],
    }})  # fmt: skip
    assert "| the same mix |" in text
