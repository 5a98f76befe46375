"""SDXL, SSD-1B, Vega: a U-Net that predicts epsilon or v of a variance-exploding latent (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from relay.conditioning import Conditioning
from relay.denoisers import guided, per_sample
from relay.schedules import replace_scheduler


class SDXLDenoiser:
    """x = x0 + sigma n; the U-Net reads x / sqrt(sigma^2 + 1) and the training step whose sigma this is.

    `train_sigmas`: ascending float64, the sigma of every training step. `log_sigma`: between two of them, t is
    interpolated in log sigma, as diffusers does for Karras and its like; else in sigma, the inverse of what diffusers
    does for plain spacing.
    """

    def __init__(
        self,
        unet: Any,
        train_sigmas: np.ndarray,
        *,
        prediction: str = "epsilon",
        log_sigma: bool = True,
        device: torch.device | None = None,
    ):
        self.unet = unet
        self.device = device or unet.device  # an offloaded module does not know where it will run
        self.dtype = unet.dtype
        self.prediction = prediction
        self.space = np.log if log_sigma else np.asarray
        self.train_levels = self.space(train_sigmas)

    @classmethod
    def from_scheduler(cls, unet: Any, config: Mapping[str, Any], device: torch.device | None = None) -> SDXLDenoiser:
        """The denoiser of a U-Net that was trained with the noise of this (Euler) scheduler config."""
        import diffusers

        config = replace_scheduler(config)
        scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
        spacings = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        warped = config.get("interpolation_type") == "log_linear" or any(config.get(key) for key in spacings)
        # float32 like the sigmas of a schedule, so that a training step's own sigma gives back that very step
        train_sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().numpy()
        return cls(
            unet,
            train_sigmas,
            prediction=config.get("prediction_type", "epsilon"),
            log_sigma=warped,
            device=device,
        )

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """Fractional training step (B,) float32 of sigma (B,), snapped to the whole one within 1e-3."""
        levels = self.space(sigma.detach().cpu().double().numpy())
        t = np.interp(levels, self.train_levels, np.arange(len(self.train_levels)))
        whole = t.round()
        return torch.from_numpy(np.where(abs(t - whole) < 1e-3, whole, t)).float()

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, guidance: float | torch.Tensor
    ) -> torch.Tensor:
        """See `relay.denoisers.Denoiser`."""
        output = guided(self._predict, x, sigma, cond.to(x.device, self.dtype), guidance)
        level = per_sample(sigma, x)
        if self.prediction == "v_prediction":  # arXiv 2202.00512, in variance-exploding terms
            return x / (level**2 + 1) - output * level / (level**2 + 1).sqrt()
        return x - level * output

    def _predict(self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.unet(
            (x / (per_sample(sigma, x) ** 2 + 1).sqrt()).to(self.dtype),
            self.timestep(sigma).to(x.device),
            encoder_hidden_states=cond.prompt_embeds,
            added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": cond.time_ids},
            return_dict=False,
        )[0]
