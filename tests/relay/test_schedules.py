"""Schedules are what diffusers' schedulers walk, and only deterministic Euler ones."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny import SDXL_NOISE, SDXL_SCHEDULERS

from relay.errors import BadRequest, FamilyError
from relay.schedules import make_schedule, replace_scheduler


def config(scheduler):
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


@pytest.mark.parametrize("spacing", SDXL_SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 7, 30])
def test_epsilon_schedules_are_eulers(spacing, steps):
    scheduler = EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS[spacing])
    schedule = make_schedule(config(scheduler), steps)
    scheduler.set_timesteps(steps)
    assert list(schedule.sigmas) == scheduler.sigmas.tolist()
    assert schedule.init_noise_sigma == float(scheduler.init_noise_sigma)
    assert (schedule.steps, schedule.parameterisation) == (steps, "epsilon")


def test_flow_schedules_are_shifted_once_and_start_at_one():
    schedule = make_schedule(config(FlowMatchEulerDiscreteScheduler(shift=3.0)), 28)
    assert (schedule.sigmas[0], schedule.sigmas[-1], schedule.init_noise_sigma) == (1.0, 0.0, 1.0)
    assert schedule.parameterisation == "flow"


def test_dynamic_shifting_needs_the_image_size():
    dynamic = config(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(FamilyError, match="image size"):
        make_schedule(dynamic, 8)
    few, many = (make_schedule(dynamic, 8, tokens).sigmas[4] for tokens in (256, 4096))
    assert few < many


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_a_scheduler_that_is_not_euler_is_refused_until_its_yaml_replaces_it(cls):
    foreign = config(cls(**SDXL_NOISE, timestep_spacing="trailing"))
    with pytest.raises(FamilyError, match="replace_scheduler: euler"):
        make_schedule(foreign, 8)
    same = EulerDiscreteScheduler(**SDXL_NOISE, timestep_spacing="trailing")
    assert make_schedule(replace_scheduler(foreign), 8) == make_schedule(config(same), 8)


def test_a_flow_solver_is_replaced_by_the_flow_euler_of_its_shift():
    solver = config(UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
    expected = make_schedule(config(FlowMatchEulerDiscreteScheduler(shift=3.0)), 8)
    assert make_schedule(replace_scheduler(solver), 8) == expected


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(prediction_type="sample"),
        EulerDiscreteScheduler(final_sigmas_type="sigma_min"),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    ],
)
def test_options_that_are_not_a_walk_to_zero_are_refused(scheduler):
    with pytest.raises(FamilyError, match="not supported"):
        make_schedule(config(scheduler), 8)


def test_more_steps_than_the_scheduler_has_is_a_bad_request():
    with pytest.raises(BadRequest, match="ask for fewer"):
        make_schedule(config(EulerDiscreteScheduler(**SDXL_NOISE, timestep_spacing="leading")), 1001)


@pytest.mark.parametrize("steps", [1, 3, 1000])
def test_sigmas_are_finite_float32_and_descend_to_zero(steps):
    sigmas = make_schedule(config(EulerDiscreteScheduler(**SDXL_NOISE)), steps).sigmas
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas[-1] == 0
    assert math.isfinite(sigmas[0])
    assert torch.tensor(sigmas).double().tolist() == list(sigmas)
