"""SD3 and SD3.5: an MMDiT that predicts the velocity of a rectified flow (arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

import torch

from relay.conditioning import Conditioning
from relay.denoisers import guided, per_sample

TRAIN_STEPS = 1000  # the transformer reads sigma in these units


class SD3Denoiser:
    """x = (1 - sigma) x0 + sigma n and v = n - x0, so x0 = x - sigma v."""

    def __init__(self, transformer: Any, device: torch.device | None = None):
        self.transformer = transformer
        self.device = device or transformer.device  # an offloaded module does not know where it will run
        self.dtype = transformer.dtype

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, guidance: float | torch.Tensor
    ) -> torch.Tensor:
        """See `relay.denoisers.Denoiser`."""
        velocity = guided(self._predict, x, sigma, cond.to(x.device, self.dtype), guidance)
        return x - per_sample(sigma, x) * velocity

    def _predict(self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.transformer(
            hidden_states=x.to(self.dtype),
            timestep=sigma.to(x.device) * TRAIN_STEPS,
            encoder_hidden_states=cond.prompt_embeds,
            pooled_projections=cond.pooled,
            return_dict=False,
        )[0]
