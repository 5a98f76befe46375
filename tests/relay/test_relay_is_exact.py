"""Invariant 1: with the same member on both sides, handing over at any s gives the unbroken run's latent."""

import pytest
import torch
from tiny import NEGATIVE, OTHER, PROMPT

from relay import codecs
from relay.program import CODECS, MATCHINGS

STEPS = 4
ARCHITECTURES = ("sdxl-twin", "sd3-twin")
CALL = {"num_inference_steps": STEPS, "seed": 7, "output_type": "latent"}


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_handing_over_at_any_step_is_the_unbroken_run_bit_for_bit(pipes, name, matching):
    unbroken = pipes[name](PROMPT, handoff=STEPS, **CALL).images
    for s in range(STEPS):
        relayed = pipes[name](PROMPT, handoff=s, matching=matching, codec="fp32", **CALL)
        assert torch.equal(relayed.images, unbroken)
        assert relayed.steps == {"large": s, "small": STEPS - s}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_codec_changes_only_what_it_rounds_at_the_handoff(pipes, name, matching, codec):
    pipe, s = pipes[name], 2

    def rounded(pipe, step, sigma, tensors):
        x = tensors["latents"]
        return {"latents": codecs.decode(codecs.encode(x, codec), codec, x.shape)} if step == s - 1 else {}

    unbroken = pipe(PROMPT, handoff=STEPS, callback_on_step_end=rounded, **CALL).images
    assert torch.equal(pipe(PROMPT, handoff=s, matching=matching, codec=codec, **CALL).images, unbroken)
    plain = pipe(PROMPT, handoff=STEPS, **CALL).images
    assert (unbroken - plain).norm() / plain.norm() < {"fp32": 1e-9, "fp16": 2e-3, "bf16": 2e-2, "int8": 5e-2}[codec]


@pytest.mark.parametrize("conditioning", ["encode", "ship"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_holds_for_batches_negative_prompts_other_sizes_and_shipped_conditioning(pipes, name, conditioning):
    call = CALL | {"negative_prompt": [NEGATIVE, "grey"], "width": 48, "height": 32, "num_images_per_prompt": 2}
    unbroken = pipes[name]([PROMPT, OTHER], handoff=STEPS, **call).images
    relayed = pipes[name]([PROMPT, OTHER], handoff=1, codec="fp32", conditioning=conditioning, **call)
    assert torch.equal(relayed.images, unbroken)
    assert relayed.images.shape == (4, 4, 16, 24)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("conditioning", ["encode", "ship"])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_two_hosts_make_the_picture_that_one_process_makes(pipes, name, conditioning, codec):
    from relay.handoff import Handoff

    call = {"num_inference_steps": 5, "handoff": 2, "seed": 3, "num_images_per_prompt": 2}
    call |= {"conditioning": conditioning, "codec": codec}
    whole = pipes[name](PROMPT, output_type="pt", **call)
    sent = pipes[name].start(PROMPT, **call)
    for received in (Handoff.from_bytes(sent.to_bytes()), sent):  # over a wire, or the very object
        finished = pipes[name].finish(received, output_type="pt")
        assert torch.equal(finished.images, whole.images)
        assert (finished.program, finished.seeds) == (whole.program, whole.seeds)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_first_and_three_legs_are_lists_with_no_code_of_their_own(pipes, name):
    unbroken = pipes[name](PROMPT, handoff=6, **CALL | {"num_inference_steps": 6}).images
    for legs in ("small:6:0-2/large:6:2-6", "large:6:0-2/small:6:2-3/large:6:3-6"):
        guidance = ",".join("3" * (legs.count("/") + 1))
        program = f"{name}/{legs}/match=exact/codec=fp32/guidance={guidance}/conditioning=encode"
        made = pipes[name](PROMPT, program=program, seed=7, output_type="latent")
        assert torch.equal(made.images, unbroken)
        assert str(made.program) == program
        assert made.program.mode == "other"


def test_a_checkpoint_inside_a_leg_goes_on_where_it_was(pipes):
    from relay.handoff import Handoff

    pipe, call = pipes["sd3"], {"num_inference_steps": 6, "handoff": 4, "seed": 1, "codec": "fp32"}
    trail = []
    whole = pipe(
        PROMPT,
        output_type="latent",
        callback_on_step_end=lambda pipe, i, sigma, tensors: trail.append(tensors["latents"].clone()) or {},
        **call,
    )
    checkpoint = pipe.start(PROMPT, **call)
    checkpoint.leg_index, checkpoint.index, checkpoint.latent = 0, 2, trail[1]
    received = Handoff.from_bytes(checkpoint.to_bytes())
    assert received.under_way
    assert torch.equal(pipe.finish(received, output_type="latent").images, whole.images)
