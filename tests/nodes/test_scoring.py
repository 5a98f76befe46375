"""One picture's scores: by the scene judge, by our own CLIP, by metrics of one's own; what cannot be scored is missing."""

import math

import numpy as np
import pytest
from PIL import Image

from nodes.images import png_bytes, to_image
from nodes.scoring import OWN_CLIP, Scorer
from relay.errors import BadRequest
from relay.metrics.clip_quality import QUALITIES
from relay.scenes.language import parse
from relay.scenes.render import render


def drawn(prompt, side=64):
    return png_bytes(to_image(render([parse(prompt)], np.random.default_rng(0), side)[0] / 2 + 0.5), {})


def test_a_scene_is_scored_by_the_scene_judge_our_own_clip_and_the_ten_qualities():
    prompt = "a large red heart at the top left and a small blue circle, on a yellow background"
    right, missing = Scorer().score(drawn(prompt), prompt, scenes=True)
    wrong, _ = Scorer().score(drawn('the word "ABC" in red on a black background'), prompt, scenes=True)
    assert missing == {}
    assert (right["attributes"], right["strict"]) == (1.0, 1.0)
    assert wrong["attributes"] < 0.5
    assert right[OWN_CLIP] > wrong[OWN_CLIP]
    assert {f"q_{quality}" for quality in QUALITIES} < right.keys()
    assert "letters" not in right  # no word was asked for: not zero, not there
    assert "clip_score" not in right


def test_a_word_is_scored_whole():
    prompt = 'the word "CAT" in red on a black background'
    assert Scorer().score(drawn(prompt), prompt, True).scores["letters"] == 1.0
    assert Scorer().score(drawn(prompt.replace("CAT", "CAR")), prompt, True).scores["letters"] == 0.0


def test_what_cannot_be_scored_is_missing_with_its_reason_and_costs_the_rest_nothing():
    found = Scorer().score(drawn("a red circle"), "an oil painting of Delft", scenes=True)
    assert "no word" in found.missing["scene"]
    assert OWN_CLIP in found.scores
    assert "attributes" not in found.scores
    wide = png_bytes(Image.new("RGB", (64, 32)), {})
    assert "square" in Scorer().score(wide, "a red circle", scenes=True).missing["scene"]
    assert Scorer().score(b"no picture", "a red circle", scenes=True).missing.keys() == {"picture"}


class Redness:
    """A metric of one's own."""

    name = "redness"
    needs_reference = False

    def __init__(self, broken=False):
        self.broken, self.columns = broken, ("red", "void")

    def missing(self):
        return None

    def score(self, images, prompts, references=None):
        if self.broken:
            raise ZeroDivisionError("broken")
        return {"red": images[:, 0].mean((1, 2)).tolist(), "void": [math.nan] * len(images)}


def test_families_without_scenes_are_scored_by_the_configs_metrics():
    png = png_bytes(Image.new("RGB", (8, 8), "red"), {})
    assert Scorer([f"{__name__}:Redness"]).score(png, "anything", scenes=False) == ({"red": 1.0}, {})
    broken = Scorer([{"name": f"{__name__}:Redness", "broken": True}, "clip_score"]).score(png, "a red circle", False)
    assert broken.missing == {"redness": "ZeroDivisionError: broken"}
    assert broken.scores.keys() == {OWN_CLIP}  # our own CLIP never bears the real one's name
    assert "judge.metrics" in Scorer().score(png, "anything", scenes=False).missing["metrics"]
    with pytest.raises(BadRequest, match="lpips compares"):
        Scorer(["lpips"])
    with pytest.raises(BadRequest, match="no metric is called"):
        Scorer(["beauty"])
