"""full-cloud and edge-only are diffusers' own pipelines; an SDXL relay is its denoising_end and denoising_start."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import NEGATIVE, OTHER, PROMPT, SDXL_SCHEDULERS, build_sd3, write_family

from relay.pipeline import RelayPipeline

TOLERANCE = 1e-5


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def difference(ours, theirs):
    """Largest difference, relative to the largest value: random weights leave latents of the size of their noise."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1)


def assert_equals(ours, theirs):
    """Latents and pixels of the same call agree."""
    for kind in ("latent", "np"):
        assert difference(ours(output_type=kind).images, theirs(output_type=kind).images) < TOLERANCE


@pytest.fixture(scope="module")
def sdxl(checkpoints):
    return quiet(StableDiffusionXLPipeline.from_pretrained(checkpoints["sdxl"], add_watermarker=False))


@pytest.fixture(scope="module")
def sd3(checkpoints):
    parts = {"text_encoder_3": None, "tokenizer_3": None}  # not optional for diffusers 0.42, though the index says null
    return quiet(StableDiffusion3Pipeline.from_pretrained(checkpoints["sd3"], **parts))


BATCH = {"prompt": [PROMPT, OTHER], "num_inference_steps": 4, "width": 48, "height": 32}


@pytest.mark.parametrize("scheduler", SDXL_SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sdxl_full_cloud_and_edge_only(checkpoints, tmp_path, sdxl, scheduler, guidance):
    folder, where = checkpoints["sdxl"], f"scheduler_{scheduler}"
    ours = RelayPipeline.from_pretrained(
        write_family(tmp_path / "f.yaml", folder, "sdxl", large={"scheduler": where}, small={"scheduler": where})
    )
    small = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_small")
    for mode, denoiser in (("full-cloud", sdxl.unet), ("edge-only", small)):
        theirs = quiet(
            StableDiffusionXLPipeline(
                **sdxl.components | {"unet": denoiser},
                add_watermarker=False,
            )
        )
        theirs.scheduler = EulerDiscreteScheduler.from_pretrained(folder, subfolder=where)
        call = BATCH | {"guidance_scale": guidance}
        if guidance > 1:
            call["negative_prompt"] = [NEGATIVE, "grey"]
        assert_equals(
            lambda mode=mode, call=call, **kind: ours(mode=mode, generator=generators(1, 2), **call, **kind),
            lambda theirs=theirs, call=call, **kind: theirs(generator=generators(1, 2), **call, **kind),
        )


def test_sdxl_without_a_negative_prompt_uses_the_pipelines_zeros(pipes, sdxl):
    call = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 3.0}
    assert_equals(
        lambda **kind: pipes["sdxl"](mode="full-cloud", seed=5, **call, **kind),
        lambda **kind: sdxl(generator=generators(5), **call, **kind),
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd3_full_cloud_and_edge_only(checkpoints, pipes, sd3, guidance):
    small = SD3Transformer2DModel.from_pretrained(checkpoints["sd3"], subfolder="transformer_small")
    call = BATCH | {"guidance_scale": guidance}
    if guidance > 1:
        call["negative_prompt"] = [NEGATIVE, "grey"]
    for mode, denoiser in (("full-cloud", sd3.transformer), ("edge-only", small)):
        theirs = quiet(StableDiffusion3Pipeline(**sd3.components | {"transformer": denoiser}))
        assert_equals(
            lambda mode=mode, **kind: pipes["sd3"](mode=mode, generator=generators(1, 2), **call, **kind),
            lambda theirs=theirs, **kind: theirs(generator=generators(1, 2), max_sequence_length=0, **call, **kind),
        )


def test_sd3_with_a_t5_feeds_its_tokens(tmp_path):
    folder = build_sd3(tmp_path / "t5", t5=True)
    ours = RelayPipeline.from_pretrained(write_family(tmp_path / "f.yaml", folder, "sd3", text={"t5_tokens": 6}))
    theirs = quiet(StableDiffusion3Pipeline.from_pretrained(folder))
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 3.0}
    assert_equals(
        lambda **kind: ours(mode="full-cloud", seed=5, **call, **kind),
        lambda **kind: theirs(generator=generators(5), max_sequence_length=6, **call, **kind),
    )


def test_one_generator_draws_the_whole_batch_and_latents_are_unit_noise(pipes, sdxl):
    call = {"prompt": PROMPT, "num_inference_steps": 2, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    ours = pipes["sdxl"](mode="full-cloud", generator=generators(3)[0], output_type="latent", **call)
    theirs = sdxl(generator=generators(3)[0], output_type="latent", **call)
    assert difference(ours.images, theirs.images) < TOLERANCE
    noise = torch.randn(2, 4, 16, 16, generator=generators(4)[0])
    ours = pipes["sdxl"](mode="full-cloud", latents=noise, output_type="latent", **call)
    theirs = sdxl(latents=noise, output_type="latent", **call)
    assert difference(ours.images, theirs.images) < TOLERANCE
    assert ours.seeds == [None, None]


@pytest.mark.parametrize("s", [2, 4])
def test_an_sdxl_relay_is_denoising_end_and_denoising_start(checkpoints, tmp_path, sdxl, s):
    """Where diffusers defines it: one schedule on both sides, cut at a training step, 4 latent channels."""
    folder, steps = checkpoints["sdxl"], 5
    ours = RelayPipeline.from_pretrained(write_family(tmp_path / "f.yaml", folder, "sdxl"))
    small = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_small")
    refiner = quiet(StableDiffusionXLImg2ImgPipeline(**sdxl.components | {"unet": small}, add_watermarker=False))
    call = {"prompt": [PROMPT, OTHER], "num_inference_steps": steps, "negative_prompt": [NEGATIVE] * 2}
    cut = s / steps
    handed = sdxl(denoising_end=cut, output_type="latent", generator=generators(1, 2), guidance_scale=3.0, **call)
    theirs = refiner(image=handed.images, denoising_start=cut, output_type="latent", guidance_scale=5.0, **call).images
    for matching in ("direct", "nearest", "exact"):
        made = ours(
            handoff=s, matching=matching, codec="fp32", guidance_scale=(3.0, 5.0), generator=generators(1, 2),
            output_type="latent", **call,
        )  # fmt: skip
        assert made.steps == {"large": s, "small": steps - s}
        assert difference(made.images, theirs) < TOLERANCE


@pytest.mark.parametrize("mode", ["full-cloud", "edge-only"])
@pytest.mark.parametrize("name", ["mini-sd3", "mini-sdxl"])
def test_an_embedded_family_is_diffusers_own_pipeline_over_its_folder(name, mode):
    """The small pipeline is `from_pretrained(folder, denoiser=..., scheduler=...)`, as the README says."""
    ours = RelayPipeline.from_pretrained(name)
    family = ours.family
    folder, member = family.spec.members["large"].repo, family.spec.members["small" if mode == "edge-only" else "large"]
    parts: dict = {"text_encoder_3": None, "tokenizer_3": None} if name == "mini-sd3" else {}
    if mode == "edge-only":
        import diffusers

        model = getattr(diffusers, family.architecture.model)
        scheduler = FlowMatchEulerDiscreteScheduler if name == "mini-sd3" else EulerDiscreteScheduler
        parts[family.architecture.denoiser] = model.from_pretrained(folder, subfolder=member.subfolder)
        parts["scheduler"] = scheduler.from_pretrained(folder, subfolder=member.scheduler)
    cls = StableDiffusion3Pipeline if name == "mini-sd3" else StableDiffusionXLPipeline
    theirs = quiet(cls.from_pretrained(folder, torch_dtype=torch.float32, **parts))
    call = {"prompt": "a large red striped heart at the top left, on a white background", "num_inference_steps": 6}
    extra = {"max_sequence_length": 0} if name == "mini-sd3" else {}
    assert_equals(
        lambda **kind: ours(mode=mode, seed=5, guidance_scale=2.5, **call, **kind),
        lambda **kind: theirs(generator=generators(5), guidance_scale=2.5, **call, **extra, **kind),
    )
