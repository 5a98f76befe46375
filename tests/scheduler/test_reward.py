"""The reward: the paper's sum in a tanh, weights that follow the task, and nothing missing counted as zero."""

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import program

from relay.errors import BadRequest
from scheduler.reward import Reward, calibrate, load_reward, reward_in, saturated

REWARD = msgspec.convert(
    {
        "scales": {"scene": 1.0, "words": 1.0, "clip_own": 80.0, "seconds": 2.0, "memory_mb": 40.0, "device_steps": 28.0},
        "tasks": {"general": {"scene": 0.6, "clip_own": 0.4}, "text": {"words": 0.8, "scene": 0.2}},
        "time": {"quality": 0.2, "speed": 1.0}, "memory": 0.1, "device": {"normal": 0.1, "low_battery": 0.5},
        "memory_mb": {"mini-sd3": {"large": 36.0, "small": 4.0}},
    },
    Reward,
)  # fmt: skip
RELAY = program(s=10)
KNOWN = {"scores": {"attributes": 0.9, "clip_score": 60.0}, "seconds": 0.5, "program": RELAY, "prompt": "a red circle"}


def test_it_is_the_papers_sum_inside_a_tanh():
    found = REWARD.of(KNOWN | {"preference": 0.5})
    expected = 0.6 * 0.9 + 0.4 * 60 / 80 - 0.6 * 0.5 / 2 - 0.1 * 40 / 40 - 0.1 * 18 / 28
    assert found.value == pytest.approx(math.tanh(expected))
    assert sum(found.terms.values()) == pytest.approx(expected)
    assert set(found.terms) == {"scene", "clip_own", "seconds", "memory_mb", "device_steps"}
    assert (found.missing, found.task) == ((), "general")
    assert REWARD(KNOWN | {"program": str(RELAY)}) == REWARD(KNOWN)


def test_weights_follow_the_task():
    quality, speed = (REWARD.of(KNOWN | {"preference": p}) for p in (0.0, 1.0))
    assert (quality.terms["seconds"], speed.terms["seconds"]) == (pytest.approx(-0.05), pytest.approx(-0.25))
    text = REWARD.of(
        KNOWN | {"prompt": 'the word "CAT"', "scores": {"letters": 1.0, "attributes": 0.5, "clip_score": 10.0}}
    )
    assert text.task == "text"
    assert (text.terms["words"], text.terms["scene"]) == (pytest.approx(0.8), pytest.approx(0.1))
    assert "clip_own" not in text.terms
    full, low = (REWARD.of(KNOWN | {"battery": b}).terms["device_steps"] for b in (0.9, 0.1))
    assert low == pytest.approx(5 * full)


def test_the_static_ablation_asks_nothing_of_the_task():
    static = REWARD.static()
    asked = KNOWN | {"prompt": 'the word "CAT"', "battery": 0.1}
    values = {static(asked | {"preference": p}) for p in (0.0, 0.5, 1.0)}
    assert values == {static(KNOWN)}
    assert static(KNOWN) == REWARD(KNOWN | {"preference": 0.5})


def test_a_missing_score_is_said_and_the_others_take_its_weight():
    found = REWARD.of(KNOWN | {"scores": {"attributes": 0.9}})
    assert found.missing == ("clip_own",)
    assert found.terms["scene"] == pytest.approx(1.0 * 0.9)  # the sum of the weights, 1, on the one that is there
    assert REWARD.of(KNOWN | {"scores": {"scene": 0.9, "clip_own": None}}) == found
    both = REWARD.of(KNOWN | {"scores": {"scene": 0.9, "clip_own": 0.0}})
    assert both.value < found.value  # a zero is a zero


def test_without_any_score_or_without_a_time_there_is_no_reward():
    for lacking, said in (
        ({"scores": {}}, ("scene", "clip_own")),
        ({"scores": None}, ("scene", "clip_own")),
        ({"seconds": None}, ("seconds",)),
    ):
        found = REWARD.of(KNOWN | lacking)
        assert found.value is None
        assert found.missing == said


def test_a_failure_has_a_reward_of_its_own_and_a_cancelled_request_none():
    assert REWARD(KNOWN | {"stage": "failed", "scores": {}, "seconds": None}) == -1.0
    assert REWARD.of(KNOWN | {"stage": "cancelled"}).value is None


@pytest.mark.parametrize(
    "bad",
    [{"seconds": math.nan}, {"seconds": math.inf}, {"scores": {"attributes": math.nan}}, {"preference": math.nan},
     {"battery": math.nan}, {"memory_mb": math.inf}, {"seconds": "soon"}],
)  # fmt: skip
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(BadRequest, match=r"reward: "):
        REWARD(KNOWN | bad)


def test_a_policy_is_told_a_number_or_nothing():
    assert reward_in({"reward": 0.25}) == 0.25
    assert reward_in({}) is None
    assert reward_in({"reward": None}) is None
    with pytest.raises(BadRequest):
        reward_in({"reward": math.nan})


def test_the_shipped_reward_knows_every_family_and_stays_inside_its_scales():
    reward = load_reward()
    assert sum(reward.tasks.general.values()) == pytest.approx(1)
    assert sum(reward.tasks.text.values()) == pytest.approx(1)
    for family in ("mini-sd3", "mini-sdxl", "sdxl-vega", "sd35"):
        assert reward.memory_of(program(family)) > reward.memory_of(program(family, 0)) > 0
    worst = reward.of(
        KNOWN
        | {"scores": {"attributes": 0.0, "clip_score": 0.0}, "seconds": reward.scales["seconds"], "preference": 1.0}
    )
    best = reward.of(
        KNOWN
        | {"scores": {"attributes": 1.0, "clip_score": reward.scales["clip_own"]}, "seconds": 0.0, "preference": 0.0}
    )
    assert saturated([sum(worst.terms.values()), sum(best.terms.values())]) == 0
    assert worst.value < 0 < best.value


def test_a_reward_that_does_not_add_up_is_refused(tmp_path: Path):
    path = tmp_path / "reward.yaml"
    for text, said in (
        ("scales: {scene: 0}", "scales"),
        (_yaml(scales={"scene": 1.0}), "no scale for"),
        (_yaml(tasks={"general": {"scene": 0.0}, "text": {"words": 1.0}}), "weight above 0"),
        (_yaml(colour="red"), "colour"),
        ("a: [", "reward.yaml"),
    ):
        path.write_text(text)
        with pytest.raises(BadRequest, match=said):
            load_reward(path)
    path.write_text(_yaml())
    assert load_reward(path) == REWARD
    with pytest.raises(BadRequest, match="cannot be read"):
        load_reward(tmp_path / "none.yaml")
    with pytest.raises(BadRequest, match="memory_mb"):
        REWARD(KNOWN | {"program": program("other")})


def _yaml(**changes: object) -> str:
    import yaml

    return yaml.safe_dump(msgspec.to_builtins(REWARD) | changes)


@given(st.lists(st.floats(0.01, 100), min_size=20, max_size=200))
def test_one_in_twenty_passes_its_scale(values):
    scale = calibrate([{"seconds": value} for value in values])["seconds"]
    above = np.mean([value > scale * 1.01 for value in values])
    assert above <= 0.06 + 1 / len(values)
    assert scale <= max(values) * 1.01


def test_scales_skip_what_is_missing_and_refuse_what_never_is():
    rows = [{"words": 1.0 if i == 7 else 0.0, "clip_own": None if i % 2 else 50.0} for i in range(100)]
    assert calibrate(rows) == {"words": 1.0, "clip_own": 50.0}  # a score that is mostly 0 has its highest as scale
    with pytest.raises(BadRequest, match="ocr"):
        calibrate([{"ocr": None}, {"ocr": None}])
    with pytest.raises(BadRequest, match="ocr"):
        calibrate([{"ocr": math.nan}])
