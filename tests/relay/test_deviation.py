"""The latent-intensity deviation: how far the small member's latents leave the large one's way."""

from itertools import pairwise

import pytest
import torch
from tiny import PROMPT

from relay.deviation import deviation

CALL = {"num_inference_steps": 6, "handoff": 2, "codec": "fp32", "output_type": "latent", "seed": 1}


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["sdxl-twin", "sd3-twin"])
def test_it_is_zero_for_the_same_member(pipes, name, codec):
    measured = pipes[name](PROMPT, deviation=True, **CALL | {"codec": codec}).deviation
    assert measured == {"per_step": [0.0] * 4, "mean": 0.0, "max": 0.0}


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_the_reference_is_the_large_member_on_the_sigmas_that_the_small_one_walks(pipes, name):
    pipe = pipes[name]
    intensities = []

    def record(caller, step, sigma, tensors):
        intensities.append(tensors["latents"].double().abs().mean().item())

    relay = pipe(PROMPT, deviation=True, callback_on_step_end=record, **CALL)
    small = intensities[2:]
    handoff = pipe.start(PROMPT, **{key: value for key, value in CALL.items() if key != "output_type"})

    intensities.clear()
    leg = relay.program.legs[1]
    own = pipe.family.schedule(leg.member, leg.steps_total).sigmas
    x, cond = handoff.latent, pipe.family.text.encode([PROMPT], None, True, (32, 32))
    sigmas = [handoff.sigma, *own[leg.first + 1 :]]
    with torch.inference_mode():
        for now, then in pairwise(sigmas):
            denoised = pipe.family.denoiser("large")(x, torch.tensor([now]), cond, 3.0)
            x = denoised + (x - denoised) * (then / now)
            intensities.append(x.double().abs().mean().item())
    expected = [abs(a - b) / b for a, b in zip(small, intensities, strict=True)]
    assert relay.deviation["per_step"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert relay.deviation["mean"] == pytest.approx(sum(expected) / len(expected), rel=1e-3)
    assert 0 < relay.deviation["mean"] <= relay.deviation["max"] == max(relay.deviation["per_step"])


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_it_is_measured_only_if_asked_for_and_changes_no_image(pipes, name):
    measured, plain = pipes[name](PROMPT, deviation=True, **CALL), pipes[name](PROMPT, **CALL)
    assert torch.equal(measured.images, plain.images)
    assert plain.deviation is None


def test_it_is_a_mean_over_images_then_a_mean_and_a_maximum_over_steps():
    relay = [torch.tensor([1.1, 2.0]), torch.tensor([1.0, 1.0])]
    reference = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])]
    measured = deviation(relay, reference)
    assert measured["per_step"] == pytest.approx([0.05, 0.625])
    assert (measured["mean"], measured["max"]) == pytest.approx((0.3375, 0.625))
