"""A call in the shape that diffusers' users know: seeds, batches, outputs, callbacks; and what it reports."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NEGATIVE, OTHER, PROMPT

CALL = {"num_inference_steps": 4, "handoff": 2, "codec": "fp32", "output_type": "latent"}
BATCH_TOLERANCE = 1e-4  # design invariant 3: what a batch of another size may differ by in fp32


def close(a, b):
    return (a - b).norm() <= BATCH_TOLERANCE * b.norm()


@pytest.fixture(params=["sdxl", "sd3"])
def pipe(request, pipes):
    return pipes[request.param]


def test_the_same_seed_and_program_make_the_same_image_bit_for_bit(pipe):
    first = pipe(PROMPT, seed=3, **CALL)
    again = pipe(PROMPT, seed=3, program=first.program, output_type="latent")
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, pipe(PROMPT, seed=4, **CALL).images)


def test_image_i_of_each_prompt_uses_seed_plus_i(pipe):
    batch = pipe([PROMPT, OTHER], seed=10, num_images_per_prompt=2, **CALL)
    assert batch.seeds == [10, 11, 10, 11]
    assert batch.prompts == [PROMPT, PROMPT, OTHER, OTHER]
    for i, (prompt, seed) in enumerate(zip(batch.prompts, batch.seeds, strict=True)):
        assert close(batch.images[i : i + 1], pipe(prompt, seed=seed, **CALL).images)


def test_a_call_without_a_seed_reports_the_one_it_drew(pipe):
    made = pipe(PROMPT, **CALL)
    (seed,) = made.seeds
    assert torch.equal(pipe(PROMPT, seed=seed, **CALL).images, made.images)
    assert pipe(PROMPT, **CALL).seeds != [seed]


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


def test_each_member_has_a_guidance_of_its_own(pipe):
    def made(large, small):
        return pipe(PROMPT, guidance_scale=(large, small), seed=1, **CALL).images

    assert torch.equal(made(4.0, 4.0), pipe(PROMPT, guidance_scale=4.0, seed=1, **CALL).images)
    assert len({float(made(*each).sum()) for each in ((4.0, 4.0), (1.0, 4.0), (4.0, 1.0), (1.0, 1.0))}) == 4
    assert torch.equal(made(0.0, 0.5), made(1.0, 1.0))  # like diffusers: guided if and only if above 1


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
    assert [step for step, _, _ in heard] == list(range(pipe.num_timesteps)) == list(range(sum(made.steps.values())))
    sigmas = [sigma for _, sigma, _ in heard]
    assert sigmas == sorted(sigmas, reverse=True)
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
    relay = pipe(PROMPT, seed=1, small_steps=1, matching="nearest", **CALL | {"codec": "int8"})
    assert relay.steps == {"large": 2, "small": 1}
    assert relay.program.codec == "int8"
    assert set(relay.timings) == {"encode", "denoise[0] large", "handoff", "denoise[1] small", "decode"}
    assert all(seconds >= 0 for seconds in relay.timings.values())
    latent = 4 * 16 * 16
    assert latent < relay.handoff_bytes < latent + 16384  # int8 takes a byte a value; the rest is the header
    single = pipe(PROMPT, seed=1, mode="edge-only", num_inference_steps=2, output_type="latent")
    assert single.handoff_bytes == 0
    assert set(single.timings) == {"encode", "denoise[0] small", "decode"}


def test_one_image_of_a_batch_keeps_what_is_its_own(pipe):
    batch = pipe([PROMPT, OTHER], negative_prompt=[NEGATIVE, "grey"], seed=1, num_images_per_prompt=2, **CALL)
    third = batch.only(2)
    assert torch.equal(third.images, batch.images[2:3])
    assert (third.prompts, third.seeds, third.negative_prompts) == ([OTHER], [1], ["grey"])
    assert third.program == batch.program


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
