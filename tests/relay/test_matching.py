"""Sigma matching: where the next leg continues."""

import math

import pytest
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import SDXL_NOISE, SDXL_SCHEDULERS

from relay.errors import BadRequest, FamilyError
from relay.matching import match, plan, walk
from relay.program import MATCHINGS, Program
from relay.schedules import Schedule, make_schedule


def schedules_of(scheduler):
    made = {}
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    return lambda steps: made.setdefault(steps, make_schedule(config, steps))


FLOW = schedules_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
OTHER_FLOW = schedules_of(FlowMatchEulerDiscreteScheduler(shift=1.5))
KARRAS = schedules_of(EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS["karras"]))
LEADING = schedules_of(EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS["leading"]))
TRAILING = schedules_of(EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS["trailing"]))
ALL = {"flow": FLOW, "karras": KARRAS, "leading": LEADING, "trailing": TRAILING}
GUIDANCE = {"large": 3.0, "small": 2.0}


def planned(large=KARRAS, small=LEADING, **options):
    schedules = {"large": large, "small": small}
    return plan("f", schedules, guidance=GUIDANCE, **options), schedules


@given(st.sampled_from(sorted(ALL)), st.sampled_from(MATCHINGS), st.integers(2, 40), st.data())
def test_same_schedule_is_the_very_suffix_for_every_matching(name, matching, steps, data):
    s = data.draw(st.integers(1, steps - 1))
    sigmas = ALL[name](steps).sigmas
    assert match(sigmas[s], s, ALL[name], steps, None, matching) == (steps, s, list(sigmas[s:]))


@given(st.integers(3, 40), st.integers(3, 40), st.data())
def test_exact_goes_on_from_sigma_s_and_walks_every_own_sigma_below(steps, own_steps, data):
    s = data.draw(st.integers(1, steps - 1))
    sigma_s, own = KARRAS(steps).sigmas[s], TRAILING(own_steps).sigmas
    _, first, walked = match(sigma_s, s, TRAILING, own_steps, None, "exact")
    assert walked == [sigma_s, *(sigma for sigma in own if sigma < sigma_s)]
    assert len(walked) == own_steps - first + 1


@given(st.integers(3, 40), st.integers(3, 40), st.data())
def test_nearest_takes_over_at_the_closest_own_sigma_in_log(steps, own_steps, data):
    s = data.draw(st.integers(1, steps - 1))
    sigma_s, own = KARRAS(steps).sigmas[s], LEADING(own_steps).sigmas
    _, first, walked = match(sigma_s, s, LEADING, own_steps, None, "nearest")
    gaps = [abs(math.log(sigma / sigma_s)) for sigma in own[:-1]]
    assert gaps[first] == min(gaps)
    assert walked == list(own[first:])


def test_direct_names_both_sigmas_where_they_differ():
    sigma_s = KARRAS(10).sigmas[4]
    with pytest.raises(BadRequest, match=f"{sigma_s:.6g}.*{LEADING(10).sigmas[4]:.6g}"):
        match(sigma_s, 4, LEADING, 10, None, "direct")
    with pytest.raises(BadRequest, match="leaves 6 of 10 steps, not 5"):
        match(FLOW(10).sigmas[4], 4, FLOW, 10, 5, "direct")


def test_exact_refuses_schedules_that_do_not_overlap_and_nearest_takes_the_first():
    high = TRAILING(30).sigmas[0]
    with pytest.raises(BadRequest, match="do not overlap"):
        match(high, 0, LEADING, 10, None, "exact")
    assert match(high, 0, LEADING, 10, None, "nearest")[1] == 0


@given(
    st.sampled_from([(FLOW, FLOW), (FLOW, OTHER_FLOW), (KARRAS, KARRAS), (KARRAS, TRAILING), (TRAILING, KARRAS)]),
    st.sampled_from(["nearest", "exact"]),
    st.integers(2, 20),
    st.integers(1, 12),
    st.data(),
)
def test_n_given_leaves_exactly_n_steps_on_the_schedule_that_fits_best(pair, matching, steps, n, data):
    sender, receiver = pair
    s = data.draw(st.integers(1, steps - 1))
    sigma_s = sender(steps).sigmas[s]

    def remaining(total):
        own = receiver(total).sigmas
        gaps = [abs(math.log(sigma / sigma_s)) for sigma in own[:-1]]
        nearest = gaps.index(min(gaps))
        first = nearest if matching == "nearest" else sum(sigma >= sigma_s * (1 - 1e-6) for sigma in own) - 1
        return (total - first, gaps[first]) if first >= 0 else (None, None)

    fitting = [gap for total in range(n, 60) for left, gap in [remaining(total)] if left == n]
    try:
        total, first, walked = match(sigma_s, s, receiver, None, n, matching)
    except BadRequest:
        assert not fitting
        return
    assert (total - first, len(walked)) == (n, n + 1)
    assert remaining(total)[1] <= min(fitting, default=math.inf) + 1e-9


@pytest.mark.parametrize("n", [40, 55, 60, 61])
@pytest.mark.parametrize("matching", ["nearest", "exact"])
def test_a_length_that_the_scheduler_cannot_make_hides_no_longer_one(matching, n):
    with pytest.raises(BadRequest):
        TRAILING(61)
    sigma_s = KARRAS(20).sigmas[4]
    total, first, _ = match(sigma_s, 4, TRAILING, None, n, matching)
    assert total - first == n


def test_n_equal_to_what_is_left_chooses_the_senders_own_schedule():
    for name, schedule in ALL.items():
        for matching in MATCHINGS:
            assert match(schedule(28).sigmas[12], 12, schedule, None, 16, matching)[:2] == (28, 12), name


def test_a_thinned_small_schedule_is_a_shorter_one():
    program, schedules = planned(FLOW, FLOW, steps=28, handoff=7, small_steps=10)
    assert program.steps == {"large": 7, "small": 10}
    (_, large), (_, small) = walk(program, schedules)
    assert (len(large), len(small), small[0], small[-1]) == (8, 11, large[-1], 0.0)


def test_the_ends_are_single_legs():
    assert str(planned(steps=20, handoff=20)[0]).startswith("f/large:20:0-20/match=exact/codec=fp16/guidance=3/")
    assert str(planned(steps=20, handoff=0)[0]).startswith("f/small:20:0-20/match=exact/codec=fp16/guidance=2/")
    assert planned(steps=20, handoff=0, small_steps=9)[0].steps == {"large": 0, "small": 9}


@pytest.mark.parametrize(
    "options",
    [
        {"handoff": 21},
        {"handoff": -1},
        {"handoff": 20, "small_steps": 4},
        {"handoff": 0, "small_steps": 4, "small_schedule_steps": 5},
        {"handoff": 8, "matching": "direct"},
        {"handoff": 8, "matching": "guess"},
        {"handoff": 8, "small_steps": 0},
        {"handoff": 8, "small_steps": 5, "small_schedule_steps": 20},
    ],
)
def test_plans_that_contradict_themselves_are_refused(options):
    with pytest.raises(BadRequest):
        planned(steps=20, **options)


@given(st.integers(2, 30), st.sampled_from(["nearest", "exact"]), st.data())
def test_walk_agrees_with_plan_and_refuses_any_other_start(steps, matching, data):
    handoff = data.draw(st.integers(1, steps - 1))
    try:
        program, schedules = planned(steps=steps, handoff=handoff, matching=matching)
    except BadRequest:
        return  # Karras may start above the leading schedule
    for leg, sigmas in walk(program, schedules):
        assert len(sigmas) == leg.steps + 1
    small = program.legs[1]
    if small.first:
        text = str(program).replace(f"{small.first}-{small.last}", f"{small.first - 1}-{small.last}")
        if Program.parse(text) != program and Program.parse(text).legs[0] == program.legs[0]:
            with pytest.raises(BadRequest, match="as the program says"):
                walk(Program.parse(text), schedules)


def test_members_of_different_parameterisations_do_not_share_a_program():
    program, schedules = planned(FLOW, KARRAS, steps=10, handoff=9, matching="nearest")
    with pytest.raises(FamilyError, match="parameterisation"):
        walk(program, schedules)


def test_an_unknown_member_is_named():
    program = Program.parse("f/medium:4:0-4/match=exact/codec=fp16/guidance=1/conditioning=encode")
    with pytest.raises(BadRequest, match="medium"):
        walk(program, {"large": FLOW})


def test_a_schedule_counts_its_steps():
    assert Schedule((2.0, 1.0, 0.0), 2.0, "epsilon").steps == 2
