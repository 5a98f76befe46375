"""The scene language reads what it writes, and refuses the rest in one line that helps."""

import numpy as np
import pytest

from relay.errors import BadRequest
from relay.scenes.language import EXAMPLES, Group, Scene, parse
from relay.scenes.sampling import COMPLEXITIES, caption, complete, held_out, sample_scene, scene_stream, split_of


def test_canonical_captions_read_back_as_the_same_scene():
    rng = np.random.default_rng(1)
    for _ in range(500):
        scene = sample_scene(rng)
        assert parse(scene.text()) == scene


def test_every_wording_of_a_scene_means_that_scene():
    rng = np.random.default_rng(2)
    for _ in range(1000):
        scene = sample_scene(rng)
        read = parse(caption(scene, rng))
        assert sorted(map(repr, read.groups)) == sorted(map(repr, scene.groups))
        assert (read.background, read.word, read.word_colour) == (scene.background, scene.word, scene.word_colour)


def test_words_of_everyday_are_understood():
    scene = parse("Three tiny solid stars and a big cross with stripes in the middle, on an orange background.")
    assert scene.background == "orange"
    assert scene.groups == (
        Group("star", count=3, texture="plain", size="small"),
        Group("cross", texture="striped", size="large", place="centre"),
    )


def test_a_relation_places_an_object_next_to_the_one_before():
    scene = parse("a red circle at the centre, a blue star to the left of it and a green ring below it")
    assert [g.place for g in scene.groups] == ["centre", "left", "bottom left"]


def test_a_word_keeps_its_capitals_and_may_be_a_colour():
    assert parse('the word "RED" in blue on a white background') == Scene((), "white", "RED", "blue")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "empty"),
        ("a red dragon", "'dragon'"),
        ("a photo of a castle at night", "'photo'"),
        ("a red blue circle", "two colours"),
        ("two red circle", "do not agree"),
        ("two red circles at the top", "single object"),
        ("a red circle at the top and a star at the top", "one place"),
        ("a red circle on a red background", "cannot be seen"),
        ("three circles and two stars", "at most 4"),
        ("a red circle, a star above it", "place named just before"),
        ("a star at the top, a ring above it", "no room"),
        ('the word "LONG"', "1 to 3 capitals"),
        ('the word "abc"', "1 to 3 capitals"),
        ("on a white background", "no object"),
        ("a large red", "no shape"),
        ("a ring on a background", "needs a colour"),
    ],
)
def test_what_is_outside_the_language_is_refused_in_one_helpful_line(prompt, named):
    with pytest.raises(BadRequest) as refusal:
        parse(prompt)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_examples_that_refusals_show_can_be_drawn():
    for example in EXAMPLES:
        parse(example)


def test_splits_never_mix_and_classes_are_even():
    test, validation = held_out(100, "test"), held_out(100, "validation")
    assert {split_of(s) for s in test} == {"test"}
    assert {split_of(s) for s in validation} == {"validation"}
    assert [sum(s.complexity == c for s in test) for c in COMPLEXITIES] == [20] * 5
    assert len({s.text() for s in test}) == 100
    training = scene_stream(0, "train")
    assert not {next(training).text() for _ in range(300)} & {s.text() for s in test + validation}


def test_drawing_fills_what_was_left_open_and_keeps_what_was_said():
    rng = np.random.default_rng(3)
    for _ in range(200):
        asked = sample_scene(rng)
        drawn = complete(asked, rng)
        assert len(drawn.groups) == asked.objects
        places = [g.place for g in drawn.groups]
        assert len(set(places)) == len(places)
        assert all(g.colour != drawn.background and g.colour and g.size and g.texture for g in drawn.groups)
        assert complete(drawn, rng) == drawn
