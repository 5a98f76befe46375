"""Denoisers: a batch may hold samples at different sigmas and guidances, and each is as if it were alone."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny import NEGATIVE, OTHER, PROMPT, SDXL_NOISE, SDXL_SCHEDULERS, unet

from relay.conditioning import Conditioning
from relay.denoisers.sdxl import SDXLDenoiser
from relay.errors import BadRequest, NonFiniteLatent
from relay.sampling import euler_step, walk_leg

SIGMAS = {"sdxl": [14.0, 3.3, 0.7], "sd3": [1.0, 0.62, 0.08]}


@pytest.fixture
def conditioning(pipes):
    def encode(name, guidance=True):
        texts = pipes[name].family.text
        negative = [NEGATIVE, "grey", "blurry"] if guidance else None
        return texts.encode([PROMPT, OTHER, "a green square"], negative, guidance, (32, 32))

    return encode


@pytest.mark.parametrize("name", ["sdxl", "sd3"])
@pytest.mark.parametrize("guidance", [torch.tensor([3.0, 1.0, 7.0]), torch.tensor([5.0, 2.0, 3.0]), torch.zeros(3)])
def test_samples_at_different_sigmas_and_guidances_are_as_if_alone(pipes, conditioning, name, guidance):
    denoiser, cond = pipes[name].family.denoiser("large"), conditioning(name)
    x, sigma = torch.randn(3, 4, 8, 12), torch.tensor(SIGMAS[name])
    with torch.inference_mode():
        batch = denoiser(x, sigma, cond, guidance)
        for i in range(3):
            alone = denoiser(x[i : i + 1], sigma[i : i + 1], cond.select([i]), float(guidance[i]))
            assert (batch[i] - alone[0]).abs().max() < 1e-5 * max(1, alone.abs().max())
            assert not torch.allclose(batch[i], batch[(i + 1) % 3])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_an_unguided_sample_costs_one_row(pipes, conditioning, name):
    denoiser, cond = pipes[name].family.denoiser("large"), conditioning(name)
    model, rows = (denoiser.unet if name == "sdxl" else denoiser.transformer), []
    hook = model.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    x, sigma = torch.randn(3, 4, 8, 8), torch.tensor(SIGMAS[name])
    for guidance in (1.0, 3.0, torch.tensor([1.0, 3.0, 1.0])):
        denoiser(x, sigma, cond, guidance)
    hook.remove()
    assert rows == [3, 6, 4]


def test_guidance_without_negative_embeddings_is_refused(pipes, conditioning):
    with pytest.raises(BadRequest, match="negative embeddings"):
        pipes["sd3"].family.denoiser("large")(
            torch.randn(3, 4, 8, 8), torch.ones(3), conditioning("sd3", guidance=False), 3.0
        )


@pytest.mark.parametrize("spacing", SDXL_SCHEDULERS)
def test_sdxl_reads_the_training_step_that_diffusers_gives_a_sigma(spacing):
    scheduler = EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS[spacing])
    scheduler.set_timesteps(17)
    denoiser = SDXLDenoiser.from_scheduler(unet(0), {**scheduler.config, "_class_name": "EulerDiscreteScheduler"})
    t = denoiser.timestep(scheduler.sigmas[:-1])
    assert (t - scheduler.timesteps).abs().max() < 2e-3
    if spacing in ("leading", "trailing"):
        assert torch.equal(t, scheduler.timesteps)


def test_v_prediction_gives_the_x0_that_diffusers_computes():
    scheduler = EulerDiscreteScheduler(**SDXL_NOISE, prediction_type="v_prediction", timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    model = unet(0)
    denoiser = SDXLDenoiser.from_scheduler(model, {**scheduler.config, "_class_name": "EulerDiscreteScheduler"})
    cond = Conditioning(torch.randn(1, 8, 32), torch.randn(1, 16), time_ids=torch.tensor([[32.0, 32, 0, 0, 32, 32]]))
    x, t = torch.randn(1, 4, 8, 8) * scheduler.sigmas[0], scheduler.timesteps[0]
    with torch.inference_mode():
        added = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
        v = model(scheduler.scale_model_input(x, t), t, cond.prompt_embeds, added_cond_kwargs=added).sample
        expected = scheduler.step(v, t, x).pred_original_sample
        assert (denoiser(x, scheduler.sigmas[:1], cond, 1.0) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sdxl", "sd3"])
def test_half_precision_members_walk_float32_latents(checkpoints, tmp_path, name, dtype):
    from tiny import write_family

    from relay.pipeline import RelayPipeline

    path, call = write_family(tmp_path / "f.yaml", checkpoints[name], name), {"num_inference_steps": 3, "handoff": 1}
    half = RelayPipeline.from_pretrained(path, torch_dtype=dtype)
    full = RelayPipeline.from_pretrained(path)
    assert half.family.denoiser("large").dtype == dtype
    made, reference = (pipe(PROMPT, seed=1, output_type="latent", **call).images for pipe in (half, full))
    assert made.dtype == torch.float32
    assert (made - reference).norm() / reference.norm() < 0.1
    assert half(PROMPT, seed=1, output_type="np", **call).images.dtype == "float32"


def test_an_euler_step_moves_each_sample_by_its_own_sigmas_and_ends_exactly_at_denoised():
    x, denoised = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 4, 4)
    stepped = euler_step(x, denoised, torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.0]))
    assert torch.allclose(stepped[0], (x[0] + denoised[0]) / 2, atol=1e-6)
    assert torch.equal(stepped[1], denoised[1])


class Failing:
    """A member that breaks at its third step."""

    device, dtype, calls = torch.device("cpu"), torch.float32, 0

    def __call__(self, x, sigma, cond, guidance):
        self.calls += 1
        return x * (float("nan") if self.calls == 3 else 0.5)


def test_a_non_finite_latent_names_member_and_step():
    cond = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1))
    with pytest.raises(NonFiniteLatent, match=r"small .* step 3 of 4"):
        walk_leg(Failing(), torch.ones(1, 1, 2, 2), [4.0, 3.0, 2.0, 1.0, 0.0], cond, 1.0, member="small")


def test_on_step_may_replace_the_latent():
    cond, seen = Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1)), []

    def on_step(i, sigma_next, x):
        seen.append((i, sigma_next))
        return torch.full_like(x, 7.0) if i == 1 else None

    x = walk_leg(Failing(), torch.ones(1, 1, 2, 2), [2.0, 1.0, 0.0], cond, 1.0, member="m", on_step=on_step)
    assert seen == [(0, 1.0), (1, 0.0)]
    assert (x == 7).all()
