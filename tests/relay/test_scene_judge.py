"""The judge's rules, and its eyes on true renders."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from relay.scenes.detector import Seen, load_detector
from relay.scenes.judge import compare, judge
from relay.scenes.language import Group, parse
from relay.scenes.render import render
from relay.scenes.sampling import complete, held_out, sample_scene

HEART = Group("heart", 1, "red", "plain", "large", "top left")
RING = Group("ring", 1, "blue", "striped", "small", "right")


def seen(*objects, background="white", word="", ink=""):
    return Seen(tuple(objects), background, word, ink)


def test_all_right_is_strict():
    verdict = compare(parse("a large red plain heart at the top left, on a white background"), seen(HEART))
    assert verdict.attributes == 1
    assert verdict.strict
    assert verdict.categories["single_object"]


def test_only_what_was_said_is_scored():
    verdict = compare(parse("a heart"), seen(HEART, background="green"))
    assert verdict.strict
    assert set(verdict.parts) == {"presence", "shape"}


def test_a_missing_object_makes_all_its_attributes_wrong():
    verdict = compare(parse("a large red plain heart at the top left, on a white background"), seen())
    assert verdict.attributes == pytest.approx(1 / 6)


def test_an_unasked_object_is_an_error():
    verdict = compare(parse("a heart"), seen(HEART, RING))
    assert not verdict.strict
    assert verdict.attributes == pytest.approx(2 / 3)
    assert not verdict.categories["counting"]


def test_an_object_at_another_place_is_missing():
    verdict = compare(parse("a red heart at the bottom"), seen(HEART))
    assert verdict.attributes == 0
    assert not verdict.categories["position"]


def test_swapped_colours_fail_binding():
    prompt = parse("a blue heart at the top left and a red ring at the right")
    assert not compare(prompt, seen(HEART, RING)).categories["attribute_binding"]
    swapped = seen(replace(HEART, colour="blue"), replace(RING, colour="red"))
    assert compare(prompt, swapped).categories["attribute_binding"]


def test_unplaced_objects_are_matched_as_well_as_can_be():
    assert compare(parse("a blue ring and a red heart"), seen(HEART, RING)).strict


def test_letters_count_one_by_one_and_as_a_word():
    prompt = parse('the word "CAT" in red')
    assert compare(prompt, seen(word="CAT", ink="red")).strict
    almost = compare(prompt, seen(word="CAR", ink="red"))
    assert almost.parts["letter"] == (2, 3)
    assert not almost.categories["letters"]
    assert not compare(prompt, seen(word="CATS", ink="red")).strict


def test_the_shipped_judge_reads_true_renders_as_well_as_it_promises():
    rng = np.random.default_rng(5)
    scenes = [complete(s, rng) for s in held_out(500, "test")]
    verdicts = judge(render(scenes, rng), scenes)
    parts = {}
    for verdict in verdicts:
        for kind, (right, asked) in verdict.parts.items():
            so_far = parts.get(kind, (0, 0))
            parts[kind] = (so_far[0] + right, so_far[1] + asked)
    assert {k: r / a for k, (r, a) in parts.items() if r / a < 0.99} == {}


def test_the_shipped_judge_tells_another_prompts_picture_apart():
    rng = np.random.default_rng(6)
    scenes = held_out(100, "test")
    images = render(scenes, rng)
    right, wrong = judge(images, scenes), judge(images.roll(1, 0), scenes)
    assert sum(v.attributes for v in right) / 100 > 0.99
    assert sum(v.attributes for v in wrong) / 100 < 0.5


def test_an_image_of_another_size_is_read_alike():
    rng = np.random.default_rng(7)
    scene = complete(parse("a large red heart at the top left and a small green ring at the right"), rng)
    big = render([scene], rng, side=128)
    assert load_detector().see(big)[0].objects == tuple(sorted(scene.groups, key=lambda g: g.place != "top left"))


def test_rendering_is_a_function_of_scenes_and_seed():
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(8)]
    first, second = (render(scenes, np.random.default_rng(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (8, 3, 64, 64)
    assert first.abs().max() <= 1
