"""The fingerprint says "same latent space": copies in other arithmetic pass, another VAE does not."""

import copy

import msgspec
import pytest
import torch
from diffusers import AutoencoderTiny
from tiny import vae

from relay.fingerprint import THUMBNAIL_TOLERANCE, compatible, fingerprint


@pytest.fixture(scope="module")
def ours():
    return fingerprint(vae(), "epsilon")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_copy_passes_and_is_left_as_it_was(ours, dtype):
    half = vae().to(dtype)
    assert compatible(ours, fingerprint(half, "epsilon")) is None
    assert half.dtype == dtype


def test_the_fp16_fixed_vae_passes(ours):
    """Weights rescaled before a GroupNorm, as the fp16-fixed SDXL VAE does: other numbers inside, the same function."""
    fixed = vae()
    for block in fixed.decoder.up_blocks:
        for resnet in block.resnets:
            with torch.no_grad():
                resnet.conv1.weight *= 0.125  # norm2 follows and divides it out again
                resnet.conv1.bias *= 0.125
    assert any(not torch.equal(a, b) for a, b in zip(vae().parameters(), fixed.parameters(), strict=True))
    assert compatible(ours, fingerprint(fixed, "epsilon")) is None
    assert compatible(ours, fingerprint(fixed.half(), "epsilon")) is None


def test_a_retrained_vae_is_refused(ours):
    assert "another VAE" in compatible(ours, fingerprint(vae(seed=5), "epsilon"))
    tuned = copy.deepcopy(vae())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weights in tuned.decoder.parameters():
            weights.add_(0.5 * weights.std().nan_to_num() * torch.randn(weights.shape, generator=generator))
    assert "another VAE" in compatible(ours, fingerprint(tuned, "epsilon"))


def test_scaling_shift_channels_factor_and_parameterisation_are_compared(ours):
    assert "scaling" in compatible(ours, fingerprint(vae(scaling_factor=0.6), "epsilon"))
    assert "shift" in compatible(ours, fingerprint(vae(shift_factor=0.1), "epsilon"))
    assert "parameterisation" in compatible(ours, fingerprint(vae(), "flow"))
    for change in ({"channels": 16}, {"factor": 8}):
        assert next(iter(change)) in compatible(ours, msgspec.structs.replace(ours, **change))
    assert compatible(ours, msgspec.structs.replace(ours, scaling=ours.scaling * (1 + 1e-6))) is None


def test_nan_never_compares_as_close(ours):
    nan = float("nan")
    assert compatible(ours, msgspec.structs.replace(ours, thumbnail=(nan,) * 192)) is not None
    assert compatible(ours, msgspec.structs.replace(ours, scaling=nan)) is not None
    assert compatible(ours, msgspec.structs.replace(ours, thumbnail=(0.0,))) is not None


def test_an_autoencoder_tiny_has_one_too():
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=8,
    )  # fmt: skip
    first = fingerprint(tiny, "flow")
    assert (first.channels, first.factor, len(first.thumbnail)) == (8, 2, 192)
    assert compatible(first, fingerprint(tiny.half(), "flow")) is None


def test_the_tolerance_leaves_an_order_of_magnitude_on_the_copys_side(ours):
    copied = torch.tensor(fingerprint(vae().half(), "epsilon").thumbnail)
    distance = (copied - torch.tensor(ours.thumbnail)).norm() / torch.tensor(ours.thumbnail).norm()
    assert distance < THUMBNAIL_TOLERANCE / 10


def test_per_channel_mean_and_std_are_part_of_the_thumbnail(ours):
    shifted = fingerprint(vae(latents_mean=[0.5, 0, -0.5, 0], latents_std=[1, 2, 1, 2]), "epsilon")
    assert "another VAE" in compatible(ours, shifted)
