"""Sampling: one leg is a plain Euler loop over neighbouring pairs of a list of sigmas; slicing the list is a relay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from relay.conditioning import Conditioning
from relay.denoisers import Denoiser, per_sample
from relay.errors import NonFiniteLatent

OnStep = Callable[[int, float, torch.Tensor], torch.Tensor | None]


def euler_step(x: torch.Tensor, denoised: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """One Euler step of samples that may stand at different sigmas (arXiv 2206.00364, algorithm 1 without churn).

    x, denoised (B, C, h, w) float32; sigma, sigma_next (B,) float32. At sigma_next = 0 the result is exactly `denoised`.
    """
    now, then = per_sample(sigma, x), per_sample(sigma_next, x)
    return torch.where(then == 0, denoised, x + (x - denoised) / now * (then - now))


@torch.inference_mode()
def walk_leg(
    denoiser: Denoiser,
    x: torch.Tensor,
    sigmas: Sequence[float],
    cond: Conditioning,
    guidance: float | torch.Tensor,
    *,
    member: str,
    on_step: OnStep | None = None,
) -> torch.Tensor:
    """x (B, C, h, w) float32, noisy at sigmas[0], walked to sigmas[-1] on the denoiser's device.

    `on_step(i, sigma_next, x)` is told of every step i, from 0, and may return a latent to go on with.
    NonFiniteLatent names the member and the step.
    """
    x = x.to(denoiser.device, torch.float32)
    cond = cond.to(denoiser.device, denoiser.dtype)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        now, then = (torch.full((len(x),), level, dtype=torch.float32) for level in (sigma, sigma_next))
        x = euler_step(x, denoiser(x, now, cond, guidance), now, then)
        if not torch.isfinite(x).all():
            raise non_finite(member, i + 1, sigmas, denoiser.dtype)
        if on_step is not None:
            replaced = on_step(i, sigma_next, x)
            x = x if replaced is None else replaced.to(x)
    return x


def non_finite(member: str, step: int, sigmas: Sequence[float], dtype: torch.dtype) -> NonFiniteLatent:
    """The error of a `member` whose step number `step`, counted from 1, along `sigmas` gave NaN or infinity."""
    return NonFiniteLatent(
        f"{member} made a non-finite latent in step {step} of {len(sigmas) - 1} (sigma {sigmas[step - 1]:.4g},"
        f" {str(dtype).removeprefix('torch.')}): try another dtype or a lower guidance"
    )
