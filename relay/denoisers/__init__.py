"""Denoisers: the one place where each architecture's conventions are translated to `denoised = model(x, sigma)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from relay.conditioning import Conditioning
from relay.errors import BadRequest

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]


class Denoiser(Protocol):
    """A member as a function of a noisy latent and a noise level per sample."""

    device: torch.device
    dtype: torch.dtype

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, guidance: float | torch.Tensor
    ) -> torch.Tensor:
        """x (B, C, h, w) float32 on `device`; sigma (B,) float32, best on the CPU (a GPU would wait for it);
        guidance one value or (B,). Returns the denoised latent x0 (B, C, h, w) float32."""
        ...


def guided(
    predict: Predict, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, guidance: float | torch.Tensor
) -> torch.Tensor:
    """Classifier-free guidance, u + g (c - u) (arXiv 2207.12598), in float32, with a scale per sample.

    `predict` maps (x, sigma, positive conditioning) to the model's raw output. Like diffusers, a sample is guided if
    and only if its scale is above 1, and unconditional rows come first; unguided samples cost one row, not two.
    """
    scale = torch.as_tensor(guidance, dtype=torch.float32).expand(len(x))
    rows = (scale > 1).nonzero().flatten()
    if not len(rows):
        return predict(x, sigma, cond).float()
    if cond.negative_embeds is None or cond.negative_pooled is None:
        raise BadRequest("guidance above 1 needs negative embeddings: encode the prompt with guidance")
    time_ids = cond.time_ids
    rows_x, rows_cond, rows_sigma = rows.to(x.device), rows.to(cond.pooled.device), rows.to(sigma.device)
    both = Conditioning(
        torch.cat([cond.negative_embeds[rows_cond], cond.prompt_embeds]),
        torch.cat([cond.negative_pooled[rows_cond], cond.pooled]),
        time_ids=None if time_ids is None else torch.cat([time_ids[rows_cond], time_ids]),
    )
    output = predict(torch.cat([x[rows_x], x]), torch.cat([sigma[rows_sigma], sigma]), both).float()
    unconditional, conditional = output.split([len(rows), len(x)])
    weight = scale[rows].to(x.device).view(-1, 1, 1, 1)
    guided_rows = unconditional + weight * (conditional[rows_x] - unconditional)
    return guided_rows if len(rows) == len(x) else conditional.index_copy(0, rows_x, guided_rows)


def per_sample(sigma: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """sigma (B,) as (B, 1, 1, 1) on x's device."""
    return sigma.to(x.device).view(-1, 1, 1, 1)
