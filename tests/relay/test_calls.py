"""A call in the shape that diffusers' users know: seeds, batches, outputs, callbacks; and what it reports."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NEGATIVE, OTHER, PROMPT, write_family

from relay.errors import NonFiniteLatent
from relay.pipeline import RelayPipeline

# fp32: another codec would round the last bits' difference between batches up
CALL = {"num_inference_steps": 4, "handoff": 2, "codec": "fp32", "output_type": "latent"}
BATCH_TOLERANCE = 1e-4  # design invariant 3: what a batch of another size may differ by in fp32


def close(a, b):
    return (a - b).norm() <= BATCH_TOLERANCE * b.norm()


@pytest.fixture(params=["sdxl", "sd3"])
def pipe(request, pipes):
    return pipes[request.param]


def test_the_reported_seed_and_program_make_the_same_image_bit_for_bit(pipe):
    first = pipe(PROMPT, small_steps=3, **CALL | {"num_inference_steps": 5})
    (seed,) = first.seeds
    assert first.steps == {"large": 2, "small": 3}
    assert first.program.legs[1].steps == 3
    for program in (first.program, str(first.program)):
        again = pipe(PROMPT, seed=seed, program=program, output_type="latent")
        assert torch.equal(first.images, again.images)
    assert not torch.equal(again.images, pipe(PROMPT, seed=seed + 1, program=program, output_type="latent").images)


def test_image_i_of_each_prompt_uses_seed_plus_i(pipe):
    batch = pipe([PROMPT, OTHER], seed=10, num_images_per_prompt=2, **CALL)
    assert batch.seeds == [10, 11, 10, 11]
    assert batch.prompts == [PROMPT, PROMPT, OTHER, OTHER]
    for i, (prompt, seed) in enumerate(zip(batch.prompts, batch.seeds, strict=True)):
        alone = pipe(prompt, seed=seed, **CALL).images
        assert close(batch.images[i : i + 1], alone)
        assert (batch.images[i] - alone[0]).abs().max() < 1e-4


def test_a_call_without_a_seed_draws_another_each_time_and_reports_it(pipe):
    made, other = (pipe(PROMPT, **CALL) for _ in range(2))
    assert made.seeds != other.seeds
    assert torch.equal(pipe(PROMPT, seed=made.seeds[0], **CALL).images, made.images)
    assert not torch.equal(other.images, made.images)


def test_a_generator_is_a_seed_only_while_it_is_fresh(pipe):
    generator = torch.Generator().manual_seed(5)
    fresh, used = (pipe(PROMPT, generator=generator, **CALL) for _ in range(2))
    assert (fresh.seeds, used.seeds) == ([5], [None])
    assert torch.equal(pipe(PROMPT, seed=5, **CALL).images, fresh.images)
    assert not torch.equal(used.images, fresh.images)
    each = pipe([PROMPT, OTHER], generator=[torch.Generator().manual_seed(n) for n in (5, 6)], **CALL)
    assert each.seeds == [5, 6]
    assert close(each.images[:1], fresh.images)


def test_every_image_has_its_own_negative_prompt(pipe):
    both = pipe([PROMPT, PROMPT], negative_prompt=[NEGATIVE, OTHER], seed=1, **CALL)
    assert both.negative_prompts == [NEGATIVE, OTHER]
    for i, negative in enumerate((NEGATIVE, OTHER)):
        assert close(both.images[i : i + 1], pipe(PROMPT, negative_prompt=negative, seed=1, **CALL).images)
    assert not close(both.images[:1], both.images[1:])


def test_a_negative_prompt_serves_the_legs_that_are_guided(pipe):
    call = CALL | {"guidance_scale": (1.0, 3.0), "seed": 1}
    made = pipe(PROMPT, negative_prompt=NEGATIVE, **call)
    assert made.program.guidance == (1.0, 3.0)
    assert not close(made.images, pipe(PROMPT, **call).images)


def test_each_member_has_a_guidance_of_its_own(pipe):
    def made(scale):
        return pipe(PROMPT, guidance_scale=scale, seed=1, **CALL)

    assert made((2.0, 6.0)).program.guidance == (2.0, 6.0)
    assert made(4.0).program.guidance == (4.0, 4.0)
    assert torch.equal(made(4.0).images, made((4.0, 4.0)).images)
    each = [made((large, small)).images for large in (1.0, 2.0, 6.0) for small in (1.0, 2.0, 6.0)]
    assert not any(torch.allclose(one, other) for one, other in combinations(each, 2))
    assert torch.equal(made((0.0, 0.5)).images, each[0])  # like diffusers: guided if and only if above 1


def test_the_four_output_types_show_one_picture(pipe):
    latent, pt, array, pil = (
        pipe(PROMPT, seed=2, width=48, **CALL | {"output_type": kind}).images for kind in ("latent", "pt", "np", "pil")
    )
    assert latent.shape == (1, 4, 16, 24)
    assert (pt.shape, pt.dtype) == ((1, 3, 32, 48), torch.float32)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert (array.shape, array.dtype) == ((1, 32, 48, 3), np.float32)
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert isinstance(pil[0], Image.Image)
    assert pil[0].size == (48, 32)
    assert np.abs(np.asarray(pil[0]) / 255 - array[0]).max() <= 0.5 / 255 + 1e-6
    assert torch.equal(pipe.family.decode(latent), pt)


def test_the_callback_hears_every_step_of_every_leg(pipe):
    heard = []

    def callback(caller, step, sigma, tensors):
        heard.append((step, sigma, tensors["latents"].shape))
        assert caller is pipe
        return {}

    made = pipe(PROMPT, seed=1, callback_on_step_end=callback, **CALL)
    steps, sigmas, shapes = zip(*heard, strict=True)
    assert list(steps) == list(range(pipe.num_timesteps)) == list(range(sum(made.steps.values())))
    assert sigmas[:2] == pipe.family.schedule("large", 4).sigmas[:2]
    assert list(sigmas) == sorted(sigmas, reverse=True)
    assert set(shapes) == {made.images.shape}
    assert torch.equal(pipe(PROMPT, seed=1, **CALL).images, made.images)


def test_latents_that_the_callback_returns_go_on(pipe):
    def blank(caller, step, sigma, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == caller.num_timesteps - 1 else None

    assert not pipe(PROMPT, seed=1, callback_on_step_end=blank, **CALL).images.any()


def test_start_and_finish_count_their_own_steps(pipe):
    def counting(steps):
        return lambda caller, step, sigma, tensors: steps.append(step)

    begun, ended = [], []
    call = {name: value for name, value in CALL.items() if name != "output_type"}
    handoff = pipe.start(PROMPT, seed=1, callback_on_step_end=counting(begun), **call)
    made = pipe.finish(handoff, output_type="latent", callback_on_step_end=counting(ended))
    assert begun == [0, 1]
    assert ended == list(range(made.steps["small"]))


def test_a_result_reports_what_was_done_and_what_it_took(pipe):
    call = {"num_inference_steps": 4, "handoff": 2, "small_steps": 1, "matching": "nearest", "codec": "int8", "seed": 1}
    relay = pipe(PROMPT, **call)
    assert relay.steps == {"large": 2, "small": 1}
    assert relay.program.codec == "int8"
    assert list(relay.timings) == ["encode", "denoise[0] large", "handoff", "denoise[1] small", "decode"]
    assert all(seconds >= 0 for seconds in relay.timings.values())
    assert relay.handoff_bytes == len(pipe.start(PROMPT, **call).to_bytes())
    latent = 4 * 16 * 16
    assert latent < relay.handoff_bytes < latent + 16384  # int8 takes a byte a value; the rest is the header


@pytest.mark.parametrize(("mode", "member"), [("full-cloud", "large"), ("edge-only", "small")])
def test_a_single_leg_hands_nothing_over(pipe, mode, member):
    single = pipe(PROMPT, mode=mode, num_inference_steps=2)
    assert single.handoff_bytes == 0
    assert list(single.timings) == ["encode", f"denoise[0] {member}", "decode"]


def test_a_result_can_be_written_down(pipe):
    made = pipe(PROMPT, seed=3, deviation=True, **CALL)
    report = {"program": str(made.program), "seeds": made.seeds, "steps": made.steps, "timings": made.timings}
    report |= {"deviation": made.deviation, "handoff_bytes": made.handoff_bytes}
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("kind", ["latent", "pil"])
def test_one_image_of_a_batch_keeps_what_is_its_own(pipe, kind):
    texts = {"prompt": [PROMPT, OTHER], "negative_prompt": [NEGATIVE, "grey"]}
    batch = pipe(**texts, seed=1, num_images_per_prompt=2, **CALL | {"output_type": kind})
    third = batch.only(2)
    assert len(third.images) == 1
    assert np.array_equal(third.images[0], batch.images[2])
    assert (third.prompts, third.seeds, third.negative_prompts) == ([OTHER], [1], ["grey"])
    assert third.program == batch.program


def test_a_member_that_makes_nan_is_named_with_its_step(checkpoints, tmp_path):
    broken = RelayPipeline.from_pretrained(write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3"))
    with torch.no_grad():
        broken.family.denoiser("small").transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLatent, match=r"small .* step 1 of 2"):
        broken(PROMPT, **CALL)


def test_shipped_conditioning_is_what_encoding_again_gives(pipe):
    encoded, shipped = (
        pipe(PROMPT, seed=1, negative_prompt=NEGATIVE, conditioning=how, **CALL) for how in ("encode", "ship")
    )
    assert torch.equal(encoded.images, shipped.images)
    assert shipped.handoff_bytes > encoded.handoff_bytes


def test_what_a_call_does_not_name_comes_from_the_family(pipe):
    program = pipe.plan()
    assert (program.mode, program.legs[0].steps_total, program.legs[0].last) == ("relay", 4, 2)
    assert (program.matching, program.codec, program.guidance) == ("exact", "fp16", (3.0, 3.0))
    assert pipe.plan(num_inference_steps=5).legs[0].last == 3
