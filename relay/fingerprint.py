"""Fingerprint: says "same latent space" by what a VAE does, never by what its file hashes to."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import torch

SCALE_TOLERANCE = 1e-4  # relative, on scaling and shift
THUMBNAIL_TOLERANCE = 0.1  # relative RMS
_SIDE = 8


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What two nodes compare before one trusts the other's latents."""

    channels: int
    factor: int  # pixels per latent cell and side
    scaling: float
    shift: float
    parameterisation: str  # flow | epsilon
    thumbnail: tuple[float, ...]  # 3 x 8 x 8


def decoder_input(vae_config: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) from the denoiser's scale to the VAE's, as diffusers' pipelines do."""
    mean, std = (getattr(vae_config, name, None) for name in ("latents_mean", "latents_std"))
    shift: Any = getattr(vae_config, "shift_factor", None) or 0.0
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        latents, shift = latents * std, mean
    return latents / vae_config.scaling_factor + shift


@torch.inference_mode()
def fingerprint(vae: Any, parameterisation: str) -> Fingerprint:
    """Fingerprint of a VAE (AutoencoderKL or AutoencoderTiny) and a parameterisation.

    The thumbnail is a fixed seed-0 normal latent (1, C, 8, 8), decoded in fp32 and pooled to 8 x 8.
    """
    config = vae.config
    if vae.dtype != torch.float32:
        vae = copy.deepcopy(vae).float()
    probe = torch.randn((1, config.latent_channels, _SIDE, _SIDE), generator=torch.Generator().manual_seed(0))
    image = vae.decode(decoder_input(config, probe).to(vae.device), return_dict=False)[0].cpu()
    return Fingerprint(
        channels=config.latent_channels,
        factor=image.shape[-1] // _SIDE,
        scaling=float(config.scaling_factor),
        shift=float(getattr(config, "shift_factor", None) or 0.0),
        parameterisation=parameterisation,
        thumbnail=tuple(torch.nn.functional.adaptive_avg_pool2d(image, _SIDE).flatten().tolist()),
    )


def thumbnail_distance(ours: tuple[float, ...], theirs: tuple[float, ...]) -> float:
    """Relative RMS distance of two thumbnails of one length."""
    a, b = torch.tensor(ours), torch.tensor(theirs)
    return float((a - b).norm() / a.norm().clamp_min(1e-12))


def compatible(ours: Fingerprint, theirs: Fingerprint) -> str | None:
    """None where both say the same latent space, else the reason why not.

    The thumbnail tolerance leaves room for what changes a VAE's arithmetic and not its latent space: another dtype
    of the weights (about 1e-3), other kernels (1e-5), the finetune behind the fp16-fixed SDXL VAE (a few 1e-2). A VAE
    trained anew maps the same latent to an unrelated picture, at a distance of the order of 1.
    """
    for name in ("channels", "factor", "parameterisation"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"{name} {getattr(theirs, name)}, expected {getattr(ours, name)}"
    for name in ("scaling", "shift"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if not abs(a - b) <= SCALE_TOLERANCE * max(abs(a), abs(b)):
            return f"VAE {name} {b:g}, expected {a:g}"
    if len(ours.thumbnail) != len(theirs.thumbnail):
        return "VAE thumbnail of another size"
    distance = thumbnail_distance(ours.thumbnail, theirs.thumbnail)
    if not distance <= THUMBNAIL_TOLERANCE:
        return f"VAE thumbnails {distance:.3f} apart, tolerance {THUMBNAIL_TOLERANCE}: another VAE"
    return None
