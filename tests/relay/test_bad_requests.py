"""What cannot be done is refused in one line, before any weights load: the family here has configs and no weights."""

import math
import shutil

import pytest
import torch
from tiny import NEGATIVE, PROMPT, write_family

from relay.errors import BadRequest, FamilyError, RelayError
from relay.pipeline import RelayPipeline

PROGRAM = "sd3/large:4:0-2/small:4:2-4/match=exact/codec=fp16/guidance=3,3/conditioning=encode"


@pytest.fixture(scope="module")
def weightless(checkpoints, tmp_path_factory):
    """Families of configs, tokenizers and no weights: whatever would load some fails with a FamilyError."""

    def family(architecture, **options):
        root = tmp_path_factory.mktemp("bare")
        shutil.copytree(checkpoints[architecture], root / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
        return write_family(root / f"{architecture}.yaml", root / "weightless", architecture, **options)

    return family


@pytest.fixture(scope="module")
def bare(weightless):
    return RelayPipeline.from_pretrained(weightless("sd3"))


def test_a_good_request_asks_for_the_weights_and_says_what_is_missing(bare):
    with pytest.raises(FamilyError, match="weightless/text_encoder") as refusal:
        bare(PROMPT)
    assert "\n" not in str(refusal.value)


def test_a_plan_needs_no_weights(bare):
    assert str(bare.plan(PROMPT, num_inference_steps=4, handoff=2)) == PROGRAM


BAD = {
    "a handoff beyond the steps": ({"num_inference_steps": 4, "handoff": 5}, "between 0 and the 4 steps"),
    "a negative handoff": ({"handoff": -1}, "handoff"),
    "half a step": ({"handoff": 1.5}, "whole number"),
    "a flag for a number": ({"handoff": True}, "whole number"),
    "text for a number": ({"num_inference_steps": "4"}, "whole number"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps"),
    "too many steps": ({"num_inference_steps": 1001}, "1000"),
    "no small steps": ({"handoff": 2, "small_steps": 0}, "small_steps"),
    "small steps in full-cloud": ({"mode": "full-cloud", "small_steps": 2}, "full-cloud"),
    "a schedule that does not leave the steps": (
        {"handoff": 2, "small_steps": 1, "small_schedule_steps": 4},
        "leaves 2 of 4 steps, not 1",
    ),
    "a relay without a large leg": ({"mode": "relay", "handoff": 0}, "hands over between 1 and 3"),
    "a relay without a small leg": ({"mode": "relay", "handoff": 4}, "hands over between 1 and 3"),
    "full-cloud with a handoff": ({"mode": "full-cloud", "handoff": 2}, "full-cloud of 4 steps means handoff 4"),
    "edge-only with a handoff": ({"mode": "edge-only", "handoff": 2}, "edge-only of 4 steps means handoff 0"),
    "an unknown mode": ({"mode": "cloud"}, "full-cloud, relay, edge-only"),
    "an unknown matching": ({"matching": "closest"}, "direct, nearest, exact"),
    "an unknown codec": ({"codec": "fp8"}, "fp32, fp16, bf16, int8"),
    "an unknown conditioning": ({"conditioning": "none"}, "encode, ship"),
    "an unknown output type": ({"output_type": "jpeg"}, "pil, np, pt, latent"),
    "an unknown argument": ({"steps": 4}, "unknown argument steps: .*num_inference_steps"),
    "guidance that is no number": ({"guidance_scale": math.nan}, "guidance_scale"),
    "infinite guidance": ({"guidance_scale": (3.0, math.inf)}, "guidance_scale"),
    "negative guidance": ({"guidance_scale": -1}, "guidance_scale"),
    "guidance in words": ({"guidance_scale": "high"}, "guidance_scale"),
    "guidance for three": ({"guidance_scale": (1, 2, 3)}, "guidance_scale"),
    "a negative prompt without guidance": ({"guidance_scale": 1, "negative_prompt": NEGATIVE}, "guidance above 1"),
    "negative prompts for others": ({"negative_prompt": [NEGATIVE, NEGATIVE]}, "as many negative prompts"),
    "a negative prompt that is no text": ({"negative_prompt": 5}, "text"),
    "a width between two cells": ({"width": 33}, "nearest is 32x32"),
    "a size beyond the position table": ({"width": 4096}, "up to 96"),
    "a width that is no whole number": ({"width": 32.0}, "width"),
    "no height": ({"height": 0}, "height"),
    "no image": ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a seed that is no whole number": ({"seed": 1.0}, "seed"),
    "a seed beyond 63 bits": ({"seed": 2**64}, "seed"),
    "two sources of noise": ({"seed": 1, "generator": torch.Generator()}, "one source"),
    "too few generators": (
        {"num_images_per_prompt": 2, "generator": [torch.Generator()]},
        "2 images need one generator or as many, not 1",
    ),
    "too many generators": ({"generator": [torch.Generator()] * 2}, "one generator or as many, not 2"),
    "a generator that is a number": ({"generator": 7}, "generator"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents of shape .* expected"),
    "latents that are no numbers": ({"latents": torch.full((1, 4, 16, 16), math.nan)}, "finite"),
    "latents that are no tensor": ({"latents": [[0.0]]}, "latents"),
    "the deviation of one leg": ({"mode": "full-cloud", "deviation": True}, "deviation"),
    "a program that is none": ({"program": "large:4"}, "not a program"),
    "another family's program": ({"program": PROGRAM.replace("sd3/", "other/")}, "family other"),
    "a program with a handoff of its own": ({"program": PROGRAM, "handoff": 2}, "a program fixes handoff"),
    "a program that its matching does not yield": (
        {"program": PROGRAM.replace("small:4:2", "small:4:3")},
        "index 2, not at 3 as the program says",
    ),
    "a program of an unknown member": ({"program": PROGRAM.replace("small", "medium")}, "no member 'medium'"),
    "a program that does not start from noise": (
        {"program": "sd3/large:4:1-4/match=exact/codec=fp16/guidance=3/conditioning=encode"},
        "starts from noise: .* start at index 0",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_the_request_is_refused(bare, what):
    call, message = BAD[what]
    with pytest.raises(BadRequest, match=message) as refusal:
        bare(PROMPT, **call)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ("  \n", "prompt is empty"),
        ([PROMPT, ""], "prompt is empty"),
        ([], "no prompt"),
        (None, "prompt is text"),
        (3, "prompt is text"),
        ([PROMPT, None], "prompt is text"),
    ],
)
def test_no_prompt_is_refused(bare, prompt, message):
    for ask in (bare, bare.start):
        with pytest.raises(BadRequest, match=message) as refusal:
            ask(prompt)
        assert "\n" not in str(refusal.value)


def test_direct_matching_of_schedules_that_differ_is_refused(weightless):
    karras = RelayPipeline.from_pretrained(weightless("sdxl", small={"scheduler": "scheduler_small"}))
    with pytest.raises(BadRequest, match="direct matching needs one sigma on both sides"):
        karras(PROMPT, matching="direct")


def test_scene_families_read_only_the_scene_language(weightless):
    scenes = RelayPipeline.from_pretrained(weightless("sd3", scenes=True))
    with pytest.raises(BadRequest, match="astronaut"):
        scenes("an astronaut on a horse")
    with pytest.raises(FamilyError, match="weightless"):
        scenes("a red circle")


@pytest.mark.parametrize("mode", ["full-cloud", "edge-only"])
def test_a_program_with_one_leg_hands_nothing_over(bare, mode):
    with pytest.raises(BadRequest, match=f"{mode} has one leg and hands nothing over"):
        bare.start(PROMPT, mode=mode)


@pytest.mark.parametrize(
    ("option", "named"),
    [({"torch_dtype": "fp8"}, "fp8"), ({"device": "toaster"}, "toaster"), ({"device": "cuda:99"}, "cuda:99")],
)
def test_a_dtype_or_device_that_is_not_there_is_refused(weightless, option, named):
    with pytest.raises(BadRequest, match=named):
        RelayPipeline.from_pretrained(weightless("sd3"), **option)


def test_an_error_is_one_line_whatever_it_quotes(bare):
    assert str(RelayError("first\nsecond\r\n third")) == "first second third"
    with pytest.raises(BadRequest) as refusal:
        bare(PROMPT, matching="a\nb")
    assert "\n" not in str(refusal.value)
