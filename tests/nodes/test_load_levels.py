"""What a gateway under load makes of the shipped levels and of the router's word, without processes."""

from __future__ import annotations

import numpy as np
import pytest

from nodes.gateway.load import LoadControl
from nodes.gateway.registry import Registry
from nodes.requests import ImageRequest, Refusal
from relay.errors import BadRequest
from relay.program import Program
from scheduler.load.prediction import read_levels, shipped
from scheduler.load.settings import LoadSettings

SIZES = {"mini-sd3": 10_000}, {"mini-sd3": 30_000}
EASY, HARD = 'the word "CAT" in red', "a red heart, a blue ring, a green star and a small yellow square"


@pytest.fixture(scope="module")
def levels():
    return read_levels(shipped("mini-sd3"), "mini-sd3")


def started(levels, **options):
    control = LoadControl(LoadSettings(deadline_s=2.0), Registry(1.0), seed=0)
    control.start([Program.parse(level.program) for level in levels.levels], SIZES, **options)
    return control


def test_shipped_levels_are_measured_and_predict_what_a_prompt_loses(levels):
    quality = [level.quality for level in levels.levels]
    assert quality == sorted(quality, reverse=True)
    assert levels.levels[0].work.program.mode == "full-cloud"
    easy, hard = levels.predict([EASY, HARD])
    assert ((easy >= 0) & (easy <= 1)).all()
    assert hard[0] - hard[-1] > easy[0] - easy[-1]  # letters are hardly drawn by either member
    assert np.mean(levels.sample, axis=0) == pytest.approx(quality, abs=0.02)


def test_the_routers_word_is_taken_from_the_router_that_levels_were_fitted_with_alone(levels):
    assert started(levels).told()["reads"] == "prompt"
    assert started(levels, routers={"mini-sd3": "another"}).told()["reads"] == "prompt"
    fits = started(levels, routers={"mini-sd3": levels.router_version})
    assert fits.told()["reads"] == "prompt and router"
    fits.read(EASY)  # one that the router has not read is predicted from its words
    assert fits.told()["counters"] == {}


def test_where_no_node_is_there_a_request_is_told_when_to_come_back(levels):
    control = started(levels)
    programs = [work.program for work in control.works]
    with pytest.raises(Refusal, match="nobody can serve it now") as refusal:
        control.admit(ImageRequest(prompt=EASY), programs, "local")
    assert (refusal.value.status, refusal.value.retry_after_s) == (503, 5.0)
    assert control.told()["counters"] == {"late": 1}


def test_what_is_on_offer_must_have_been_measured(levels):
    control = LoadControl(LoadSettings(deadline_s=2.0), Registry(1.0))
    text = levels.levels[0].program.replace(":28:0-28", ":27:0-27")
    with pytest.raises(BadRequest, match=r":27:0-27/.* is on offer and has no measured quality"):
        control.start([Program.parse(text)], SIZES)
    lacking = LoadControl(LoadSettings(deadline_s=2.0, levels="nowhere.json"), Registry(1.0))
    with pytest.raises(BadRequest, match=r"no measured levels in nowhere\.json"):
        lacking.start([Program.parse(levels.levels[0].program)], SIZES)
