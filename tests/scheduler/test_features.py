"""Features: read from any prompt, bounded, named, and the same for one action as for many."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import ARMS, CURVES, PROMPTS, actions, context, node, program

from relay.errors import BadRequest
from relay.scenes.sampling import caption, sample_scene
from scheduler.action_table import ActionTable, table_of
from scheduler.features import ACTION, CONTEXT, PROMPT, RISE, complexity, featurise, read_features, rise_context
from scheduler.finish_time import finish_time
from scheduler.policy import Action
from scheduler.syntax import read_prompt

OFFER = actions(
    [program(f, s) for f in CURVES for s in (28, 10, 0)] + [program(s=8, small=6)],
    ("edge-1", "edge-2"),
    ("phone-1", "edge-2"),
)
NODES = (
    node("edge-1", backlog_s=0.7, running=3, queued=2, encode_s=0.01, decode_s=0.02),
    node("edge-2", backlog_s=0.1, round_trip_s=0.001, bytes_per_s=1e8, decode_s=0.01),
    node("phone-1", battery=0.1, round_trip_s=0.08, bytes_per_s=3e5, running=1, decode_s=0.05),
)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a red circle", {"objects": 1, "attributes": 1, "relations": 0, "words": 3}),
        ("two large dogs and a small cat on a sofa", {"objects": 4, "attributes": 2, "relations": 1, "numbers": 1}),
        ("A photo of a man riding a horse", {"objects": 2, "relations": 1, "style": 1}),
        ("masterpiece, highly detailed, 8k, a castle", {"objects": 1, "style": 4}),
        ('a storefront with "Hello World" written on it', {"objects": 1, "letters": 10, "text": True}),
        ("a neon sign that says OPEN", {"objects": 1, "letters": 4, "text": True}),
        ("a man reading a book", {"objects": 2, "text": False}),
        ("it's a dog's life", {"letters": 0, "text": False}),
        ("a circle with stripes at the top left, in red", {"objects": 1, "attributes": 2}),
        ("a thousand 99999999999999999999 stars", {"numbers": 1, "objects": 13}),
        ("", {"objects": 0, "words": 0}),
    ],
)
def test_prompts_are_read_by_their_words(prompt, found):
    told = read_prompt(prompt)
    assert {name: getattr(told, name) for name in found} == found


def test_scenes_are_counted_though_their_grammar_is_not_known():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(300)]
    told = [read_prompt(caption(scene, rng)) for scene in scenes]
    assert np.mean([scene.objects == each.objects for scene, each in zip(scenes, told, strict=True)]) > 0.95
    assert all(bool(scene.word) == each.text for scene, each in zip(scenes, told, strict=True))


@given(st.text(max_size=300))
def test_any_text_has_bounded_features(prompt):
    told = read_features(prompt)
    assert tuple(told) == PROMPT
    assert all(0 <= value <= 1 for value in told.values())
    assert 0 <= complexity(told) <= 1


def _any_state(rng: np.random.Generator) -> dict[str, object]:
    """From nothing to far more than there ever is, in every unit, and now and then unknown."""

    def some(most: float) -> float:
        return 0.0 if rng.random() < 0.2 else float(most ** rng.uniform(-1, 1))

    return {
        "backlog_s": some(1e4), "encode_s": some(1e3), "decode_s": some(1e3), "running": int(some(64)),
        "queued": int(some(1e3)), "batch": int(rng.integers(1, 65)), "slower": float(8 ** rng.uniform(-1, 1)),
        "battery": None if rng.random() < 0.3 else float(rng.random()),
        "round_trip_s": None if rng.random() < 0.3 else some(1e4),
        "bytes_per_s": None if rng.random() < 0.3 else some(1e12),
    }  # fmt: skip


def test_every_state_has_bounded_features_and_each_action_its_own_time():
    rng = np.random.default_rng(1)
    for _ in range(150):
        nodes = tuple(node(name, **_any_state(rng)) for name in ("edge-1", "edge-2", "phone-1"))
        told = context(
            prompt=PROMPTS[2], nodes=nodes, preference=float(rng.uniform(-1, 2)),
            deadline_s=None if rng.random() < 0.5 else float(rng.uniform(-5, 1e3)),
        )  # fmt: skip
        found = featurise(told, OFFER, time_scale_s=float(100 ** rng.uniform(-1, 1)))
        assert found.context.shape == (len(CONTEXT),)
        assert found.actions.shape == (len(OFFER), len(ACTION))
        for values in (found.context, found.actions, rise_context(told)):
            assert np.isfinite(values).all()
            assert values.min() >= 0
            assert values.max() <= 1
        one_by_one = [finish_time(told, action) for action in OFFER]
        assert table_of(OFFER).finish_s(told) == pytest.approx(one_by_one, rel=1e-9)


def test_features_say_what_they_are_named_for():
    told = context(prompt=PROMPTS[1], nodes=NODES, preference=0.8, deadline_s=0.5, notes={"quality_relay": 0.7})
    found = featurise(told, OFFER)
    seen = dict(zip(CONTEXT, found.context.tolist(), strict=True))
    assert seen["text"] == 1
    assert seen["letters"] == pytest.approx(3 / 12)
    assert seen["preference"] == pytest.approx(0.8)
    assert (seen["router"], seen["router_quality_relay"], seen["router_quality_full_cloud"]) == (
        1,
        pytest.approx(0.7),
        0,
    )
    assert (seen["low_battery"], seen["battery"]) == (1, pytest.approx(0.1))
    assert seen["edge_backlog_least"] == pytest.approx(0.1 / 1.1)
    rows = {str(a): dict(zip(ACTION, row.tolist(), strict=True)) for a, row in zip(OFFER, found.actions, strict=True)}
    relay = rows[str(Action(program(s=10), ("edge-1", "phone-1")))]
    assert relay["handoff"] == pytest.approx(10 / 28)
    assert relay["small"] == pytest.approx(18 / 28)
    assert relay["quality"] == pytest.approx(0.7)
    assert (relay["battery"], relay["occupancy"]) == (pytest.approx(0.1), pytest.approx(0.75))
    assert relay["drain"] == relay["device_work"] > 0
    assert relay["late"] == 1
    seconds = finish_time(told, Action(program(s=10), ("edge-1", "phone-1")))
    assert relay["finish"] == pytest.approx(seconds / 5, rel=1e-5)
    best = min(rows.values(), key=lambda row: row["finish"])
    assert best["slower"] == 0
    idle = rows[str(Action(program(s=28), ("edge-2",)))]
    assert (idle["device_work"], idle["quality"], idle["drain"]) == (0, 0, 0)
    assert found.labels[0] == ("family=mini-sd3", "mode=full-cloud", found.labels[0][2], "node0=edge-1")


def test_one_action_looks_the_same_alone_and_among_others_but_for_what_compares_it():
    told, alone = context(nodes=NODES), OFFER[3]
    among = featurise(told, OFFER).actions[3]
    own = featurise(told, [alone]).actions[0]
    compared = [ACTION.index("slower")]
    assert np.delete(own, compared) == pytest.approx(np.delete(among, compared))
    assert own[compared] == 0


def test_a_job_that_goes_on_is_no_edge_only_program():
    whole = program(s=10)
    from dataclasses import replace

    rest = replace(whole, legs=whole.legs[1:], guidance=whole.guidance[1:])
    assert ActionTable([Action(rest, ("phone-1",))]).modes == ["rest"]


def test_rise_sees_eight_numbers():
    busy = (
        node("edge-1", running=2),
        node("edge-2", running=4),
        node("phone-1", running=1, battery=0.15, bytes_per_s=2.5e6),
    )
    told = context(prompt=PROMPTS[1], nodes=busy, preference=1.0)
    seen = dict(zip(RISE, rise_context(told).tolist(), strict=True))
    assert len(seen) == 8
    assert (seen["text"], seen["low_battery"], seen["preference"], seen["slow_network"]) == (1, 1, 1, 0.5)
    assert (
        seen["occupancy_sd35"] == seen["occupancy_sdxl"] == pytest.approx((0.5 + 1) / 2)
    )  # phones hold no large member
    assert seen["occupancy_vega"] == pytest.approx((0.5 + 1 + 0.25) / 3)
    assert 0 < seen["complexity"] < 1


def test_what_was_read_before_takes_the_prompts_place():
    told = context(prompt="", prompt_features=read_features(PROMPTS[2]))
    assert (
        featurise(told, OFFER[:1]).context.tolist() == featurise(context(prompt=PROMPTS[2]), OFFER[:1]).context.tolist()
    )
    with pytest.raises(BadRequest, match="lack"):
        featurise(context(prompt_features={"objects": 0.1}), OFFER[:1])


def test_tables_are_kept_and_never_mixed_up():
    table = table_of(actions(ARMS))
    assert table_of(actions(ARMS)) is table
    for _ in range(600):  # programs that come and go, whose ids may be used again
        new = actions([program(s=int(np.random.default_rng(_).integers(1, 28)))])
        assert table_of(new).actions == tuple(new)
    assert math.isclose(table_of(actions(ARMS)).member_steps[1, 0], 10 / 28)
