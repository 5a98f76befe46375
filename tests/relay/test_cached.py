"""Cached starts: one's own latent gives the unbroken picture, another's only where everything but prompt and seed is equal."""

from dataclasses import replace

import pytest
import torch
from tiny import NEGATIVE, OTHER, PROMPT

from relay import CachedStart, Handoff
from relay.cached import first_leg_space, space_of
from relay.engine import StepEngine, Walk
from relay.errors import BadRequest, HandoffRefused

CALL = {"num_inference_steps": 6, "output_type": "latent"}
ARCHITECTURES = ("sdxl", "sd3")


@pytest.mark.parametrize("handoff", [6, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ones_own_latent_at_any_step_gives_the_unbroken_picture_bit_for_bit(pipes, name, handoff):
    whole = pipes[name](PROMPT, handoff=handoff, seed=7, keep=range(1, handoff), **CALL)
    assert list(whole.kept) == list(range(1, handoff))
    for step, (state,) in whole.kept.items():
        again = pipes[name](PROMPT, handoff=handoff, seed=99, cached=state, **CALL)
        assert torch.equal(again.images, whole.images)
        assert again.steps == whole.steps | {"large": handoff - step}
        assert again.starts == [{"source": "seed 7", "similarity": None, "skipped": step}]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_holds_for_batches_negative_prompts_other_sizes_and_over_a_handoff(pipes, name):
    call = {"handoff": 3, "negative_prompt": [NEGATIVE, "grey"], "width": 48, "height": 32, "num_images_per_prompt": 2}
    call |= CALL | {"num_inference_steps": 5}
    whole = pipes[name]([PROMPT, OTHER], seed=7, keep=[2], **call)
    again = pipes[name]([PROMPT, OTHER], seed=7, cached=whole.kept[2], **call)
    assert torch.equal(again.images, whole.images)
    assert again.only(1).starts == again.starts[1:2]
    call.pop("output_type")
    sent = pipes[name].start([PROMPT, OTHER], seed=7, cached=whole.kept[2], **call)
    made = pipes[name].finish(Handoff.from_bytes(sent.to_bytes()), output_type="latent")
    assert torch.equal(made.images, whole.images)
    assert made.starts == again.starts
    assert made.steps == whole.steps | {"large": 1}


def test_another_prompts_latent_is_gone_on_with(pipes):
    (state,) = pipes["sd3"](OTHER, handoff=6, seed=1, keep=[2], **CALL).kept[2]
    seen = []
    made = pipes["sd3"](
        PROMPT, handoff=6, seed=7, cached=replace(state, similarity=0.9), **CALL,
        callback_on_step_end=lambda pipe, i, sigma, tensors: seen.append((i, sigma, pipe.num_timesteps)) or {},
    )  # fmt: skip
    sigmas = pipes["sd3"].family.schedule("large", 6).sigmas
    assert seen == [(i, sigmas[2 + i], 4) for i in range(4)]
    assert not torch.equal(made.images, pipes["sd3"](PROMPT, handoff=6, seed=7, **CALL).images)
    assert made.starts[0]["similarity"] == 0.9


def test_the_engine_goes_on_from_a_cached_latent_in_any_company(pipes):
    pipe = pipes["sd3"]
    whole = pipe(PROMPT, handoff=6, seed=7, keep=[2], **CALL)
    cond = pipe.family.text.encode([PROMPT], None, True, (32, 32))
    sigmas = pipe.family.schedule("large", 6).sigmas
    engine = StepEngine(pipe.family.denoiser("large"), "large", None, max_batch=4, max_queue=4)
    engine.submit(Walk("cached", whole.kept[2][0].latent, sigmas[2:], cond, 3.0))
    other = pipe.family.initial_noise(1, (32, 32), torch.Generator().manual_seed(1))
    engine.submit(Walk("noise", other, sigmas, cond, 3.0))
    ended = {}
    while len(ended) < 2:
        ended |= {each.id: each.latent for each in engine.step()}
    assert (ended["cached"] - whole.images).abs().max() <= 1e-4 * whole.images.abs().max()


@pytest.mark.parametrize(
    "changed",
    [
        {"guidance_scale": 2.0},
        {"num_inference_steps": 7},
        {"negative_prompt": NEGATIVE},
        {"width": 48},
        {"mode": "edge-only"},
    ],
)
def test_nothing_crosses_to_another_space(pipes, changed):
    call = {"num_inference_steps": 6, "mode": "full-cloud"}
    (state,) = pipes["sd3"](PROMPT, seed=7, keep=[2], **call).kept[2]
    with pytest.raises(BadRequest, match="another family, member, schedule"):
        pipes["sd3"](PROMPT, cached=state, **call | changed)


def test_what_cannot_be_begun_from_is_refused_in_one_line(pipes):
    call = CALL | {"handoff": 3}
    (state,) = pipes["sd3"](PROMPT, seed=7, keep=[2], **call).kept[2]
    for wrong, said in [
        (replace(state, skipped=3), "between 1 and 2 steps"),
        (replace(state, latent=state.latent * float("nan")), "not finite"),
        (replace(state, latent=state.latent[:, :, :8]), "not of shape"),
        ([state, state], "one cached start"),
    ]:
        with pytest.raises(BadRequest, match=said):
            pipes["sd3"](PROMPT, cached=wrong, **call)
    with pytest.raises(BadRequest, match="kept between"):
        pipes["sd3"](PROMPT, keep=[3], **call)
    later = pipes["sd3"].plan(program="sd3/large:6:2-6/match=exact/codec=fp16/guidance=3/conditioning=encode")
    with pytest.raises(BadRequest, match="begins with noise"):
        first_leg_space(pipes["sd3"].family, later, None, (32, 32))


def test_a_handoff_that_tells_nonsense_of_its_start_is_refused(pipes):
    sent = pipes["sd3"].start(PROMPT, num_inference_steps=4, handoff=2, seed=1)
    for said in ("no json", '[{"skipped": 1}]', '[{"source": "a", "similarity": 1, "skipped": 1}, 3]'):
        with pytest.raises(HandoffRefused):
            pipes["sd3"].finish(replace(sent, meta={"starts": said}))


def test_a_space_is_all_that_a_latent_depends_on():
    facts = [{"channels": 4}, "large", [1.0, 0.5, 0.0], 3.0, None, (64, 64), "fp32"]
    others = [{"channels": 16}, "small", [1.0, 0.4, 0.0], 2.0, "blurry", (64, 32), "bf16"]
    names = {space_of(*facts)} | {space_of(*facts[:i], other, *facts[i + 1 :]) for i, other in enumerate(others)}
    assert len(names) == 8
    assert CachedStart("s", 3, torch.zeros(1)).told == {"source": "", "similarity": None, "skipped": 3}
