"""RelayPipeline: the shape of diffusers' pipelines, what was asked is what is done, and refusals before weights load."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import NEGATIVE, OTHER, PROMPT, write_family

from relay.errors import BadRequest, NonFiniteLatent
from relay.pipeline import RelayPipeline

CALL = {"num_inference_steps": 4, "handoff": 2, "seed": 3}


def test_the_four_output_types_are_one_picture(pipes):
    made = {kind: pipes["sd3"](PROMPT, output_type=kind, **CALL).images for kind in ("pil", "np", "pt", "latent")}
    assert isinstance(made["pil"][0], Image.Image)
    assert made["np"].shape == (1, 32, 32, 3)
    assert np.array_equal(made["np"], made["pt"].permute(0, 2, 3, 1).numpy())
    assert np.abs(np.asarray(made["pil"][0]) / 255 - made["np"][0]).max() <= 0.5 / 255 + 1e-6
    assert made["latent"].shape == (1, 4, 16, 16)


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_image_i_of_a_prompt_uses_seed_plus_i_whatever_its_batch(pipes, name):
    call = CALL | {"output_type": "latent", "codec": "fp32"}  # fp16 would round the last bits' difference up
    batch = pipes[name]([PROMPT, OTHER], num_images_per_prompt=2, **call)
    assert batch.seeds == [3, 4, 3, 4]
    assert batch.prompts == [PROMPT, PROMPT, OTHER, OTHER]
    for i in range(4):
        alone = pipes[name](batch.prompts[i], **call | {"seed": batch.seeds[i]}).images[0]
        assert (alone - batch.images[i]).abs().max() < 1e-4


def test_a_report_pins_the_picture(pipes):
    first = pipes["sdxl"](PROMPT, num_inference_steps=5, small_steps=3, handoff=2, output_type="latent")
    again = pipes["sdxl"](PROMPT, program=str(first.program), seed=first.seeds[0], output_type="latent")
    assert torch.equal(first.images, again.images)
    assert first.steps == {"large": 2, "small": 3}
    assert first.program.legs[1].steps == 3


def test_without_a_seed_pictures_differ_and_the_drawn_seed_is_reported(pipes):
    call = {"num_inference_steps": 2, "handoff": 1, "output_type": "latent"}
    one, other = (pipes["sd3"](PROMPT, **call) for _ in range(2))
    assert one.seeds != other.seeds
    assert torch.equal(one.images, pipes["sd3"](PROMPT, seed=one.seeds[0], **call).images)


def test_a_generator_that_was_drawn_from_has_no_seed_to_report(pipes):
    generator = torch.Generator().manual_seed(5)
    call = {"num_inference_steps": 1, "mode": "full-cloud", "output_type": "latent", "generator": generator}
    assert pipes["sd3"](PROMPT, **call).seeds == [5]
    assert pipes["sd3"](PROMPT, **call).seeds == [None]


def test_stages_are_timed_and_bytes_counted(pipes):
    made = pipes["sdxl"](PROMPT, **CALL)
    assert list(made.timings) == ["encode", "denoise[0] large", "handoff", "denoise[1] small", "decode"]
    assert all(seconds >= 0 for seconds in made.timings.values())
    assert made.handoff_bytes == len(pipes["sdxl"].start(PROMPT, **CALL).to_bytes())
    assert pipes["sdxl"](PROMPT, mode="full-cloud", num_inference_steps=2).handoff_bytes == 0


def test_the_callback_has_diffusers_signature_and_may_change_latents(pipes):
    seen = []

    def callback(pipe, step, sigma, tensors):
        seen.append((step, sigma, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * (0 if step == 3 else 1)}

    made = pipes["sd3"](PROMPT, callback_on_step_end=callback, output_type="latent", **CALL)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert seen[0][1] == 1.0
    assert not made.images.any()
    assert pipes["sd3"].num_timesteps == 4


def test_guidance_is_a_value_per_member(pipes):
    def run(**call):
        return pipes["sd3"](PROMPT, output_type="latent", **CALL | call)

    both = run(guidance_scale=(2.0, 6.0))
    assert both.program.guidance == (2.0, 6.0)
    assert run(guidance_scale=4.0).program.guidance == (4.0, 4.0)
    others = [run(guidance_scale=pair).images for pair in ((2.0, 2.0), (6.0, 6.0), (6.0, 2.0))]
    assert not any(torch.allclose(both.images, other) for other in others)


def test_unguided_legs_run_beside_guided_ones(pipes):
    made = pipes["sdxl"](PROMPT, guidance_scale=(1.0, 3.0), negative_prompt=NEGATIVE, **CALL)
    assert made.program.guidance == (1.0, 3.0)


@pytest.mark.parametrize("name", ["sdxl-twin", "sd3-twin"])
def test_deviation_is_zero_where_the_large_member_goes_on_and_not_where_another_does(pipes, name):
    twin = pipes[name](PROMPT, deviation=True, output_type="latent", **CALL)
    assert twin.deviation == {"per_step": [0.0, 0.0], "mean": 0.0, "max": 0.0}
    pipe = pipes[name.removesuffix("-twin")]
    relay = pipe(PROMPT, deviation=True, output_type="latent", **CALL)
    assert len(relay.deviation["per_step"]) == relay.steps["small"]
    assert relay.deviation["max"] == max(relay.deviation["per_step"]) > 0
    assert torch.equal(relay.images, pipe(PROMPT, output_type="latent", **CALL).images)
    assert pipe(PROMPT, **CALL).deviation is None


def test_deviation_follows_its_definition(pipes):
    """|relay - reference| / reference of mean absolute values; equal schedules: the reference is the full-cloud run."""

    def intensities(**call):
        trail = []

        def callback(pipe, step, sigma, tensors):
            trail.append(tensors["latents"].abs().mean().item())
            return {}

        made = pipes["sd3"](PROMPT, callback_on_step_end=callback, output_type="latent", codec="fp32", seed=3,
                            num_inference_steps=6, **call)  # fmt: skip
        return trail, made

    relay, made = intensities(handoff=2, deviation=True)
    reference, _ = intensities(handoff=6)
    expected = [abs(a - b) / b for a, b in zip(relay[2:], reference[2:], strict=True)]
    assert made.deviation["per_step"] == pytest.approx(expected, rel=1e-4)
    assert made.deviation["mean"] == pytest.approx(sum(expected) / 4, rel=1e-4)


REFUSED = [
    ({"handoff": 5}, "between 0 and the 4 steps"),
    ({"handoff": -1}, "handoff"),
    ({"handoff": 1.5}, "handoff"),
    ({"handoff": "2"}, "handoff"),
    ({"handoff": True}, "handoff"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 1001}, "num_inference_steps"),
    ({"small_steps": 0}, "small_steps"),
    ({"small_steps": -3}, "small_steps"),
    ({"mode": "cloud"}, "mode"),
    ({"mode": "full-cloud"}, "means handoff 4"),
    ({"mode": "edge-only"}, "means handoff 0"),
    ({"mode": "relay", "handoff": 4}, "between 1 and 3"),
    ({"handoff": 4, "small_steps": 2}, "full-cloud"),
    ({"matching": "guess"}, "matching"),
    ({"matching": "direct"}, "sigma"),
    ({"codec": "fp8"}, "codec"),
    ({"conditioning": "guess"}, "conditioning"),
    ({"output_type": "jpeg"}, "output_type"),
    ({"guidance_scale": float("nan")}, "guidance"),
    ({"guidance_scale": float("inf")}, "guidance"),
    ({"guidance_scale": -1}, "guidance"),
    ({"guidance_scale": (1, 2, 3)}, "guidance"),
    ({"guidance_scale": "high"}, "guidance"),
    ({"guidance_scale": 1.0, "negative_prompt": NEGATIVE}, "negative prompt does nothing"),
    ({"negative_prompt": [NEGATIVE, NEGATIVE]}, "as many negative prompts"),
    ({"negative_prompt": 3}, "prompt"),
    ({"prompt": ""}, "empty"),
    ({"prompt": "  "}, "empty"),
    ({"prompt": []}, "no prompt"),
    ({"prompt": [PROMPT, ""]}, "empty"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    ({"width": 33}, "32x32"),
    ({"height": 0}, "height"),
    ({"width": 32.0}, "width"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"generator": [torch.Generator()] * 2, "seed": None}, "one generator or as many"),
    ({"generator": torch.Generator()}, "one source"),
    ({"latents": torch.zeros(1, 4, 8, 8), "seed": None}, "latents of shape"),
    ({"program": "nonsense", "num_inference_steps": None, "handoff": None}, "not a program"),
    ({"program": "sdxl/large:4:0-4/match=exact/codec=fp16/guidance=3/conditioning=encode"}, "a program fixes"),
    ({"strength": 0.5}, "unknown argument strength"),
    ({"mode": "edge-only", "handoff": 0, "deviation": True}, "deviation"),
]


@pytest.fixture(scope="module")
def unloadable(checkpoints, tmp_path_factory):
    """A family whose weights are gone: whatever is refused with BadRequest was refused before they were asked for."""
    import shutil

    root = tmp_path_factory.mktemp("unloadable")
    folder = shutil.copytree(checkpoints["sdxl"], root / "f")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return RelayPipeline.from_pretrained(
        write_family(root / "sdxl.yaml", folder, "sdxl", small={"scheduler": "scheduler_small"})
    )


@pytest.mark.parametrize(("change", "named"), REFUSED)
def test_bad_input_is_one_line_before_any_model_is_loaded(unloadable, change, named):
    call = {"prompt": PROMPT} | CALL | change
    with pytest.raises(BadRequest, match=named) as refusal:
        unloadable(**{key: value for key, value in call.items() if value is not None or key == "prompt"})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("program", "named"),
    [
        ("other/large:4:0-4/match=exact/codec=fp16/guidance=3/conditioning=encode", "family other"),
        ("sdxl/medium:4:0-4/match=exact/codec=fp16/guidance=3/conditioning=encode", "no member 'medium'"),
        ("sdxl/large:4:1-4/match=exact/codec=fp16/guidance=3/conditioning=encode", "starts from noise"),
        ("sdxl/large:4:0-2/small:4:3-4/match=exact/codec=fp16/guidance=3,3/conditioning=encode", "as the program says"),
    ],
)
def test_programs_that_do_not_fit_the_family_are_refused(unloadable, program, named):
    with pytest.raises(BadRequest, match=named):
        unloadable(PROMPT, program=program, seed=0)


def test_start_needs_something_to_hand_over(unloadable):
    with pytest.raises(BadRequest, match="hands nothing over"):
        unloadable.start(PROMPT, mode="full-cloud", num_inference_steps=4)


def test_a_member_that_makes_nan_is_named_with_its_step(checkpoints, tmp_path):
    pipe = RelayPipeline.from_pretrained(write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3"))
    with torch.no_grad():
        pipe.family.denoiser("small").transformer.proj_out.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLatent, match=r"small .* step 1 of 2"):
        pipe(PROMPT, **CALL)


def test_scene_families_read_only_the_scene_language(checkpoints, tmp_path):
    path = write_family(tmp_path / "f.yaml", checkpoints["sd3"], "sd3", scenes=True)
    pipe = RelayPipeline.from_pretrained(path)
    with pytest.raises(BadRequest, match="astronaut"):
        pipe("an astronaut on a horse", **CALL)
    assert pipe("a red circle", **CALL).images


def test_a_result_can_be_written_down(pipes):
    made = pipes["sd3"](PROMPT, deviation=True, **CALL)
    report = {"program": str(made.program), "seeds": made.seeds, "steps": made.steps, "timings": made.timings}
    assert json.loads(json.dumps(report | {"deviation": made.deviation}))["steps"] == {"large": 2, "small": 2}


def test_only_is_one_image_of_a_batch(pipes):
    batch = pipes["sd3"]([PROMPT, OTHER], negative_prompt=[NEGATIVE, "grey"], **CALL)
    one = batch.only(1)
    assert (len(one.images), one.prompts, one.seeds, one.negative_prompts) == (1, [OTHER], [3], ["grey"])
