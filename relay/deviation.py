"""Latent-intensity deviation: how far a handoff moves the latent from where the large member would have taken it.

Intensity is the mean absolute value of a latent. After every step of the small leg, deviation = |relay - reference| /
reference, where the reference is the large member going on from the same latent over the very sigmas that the small
one walks (with equal schedules: the full-cloud run). RISE (arXiv 2606.17378) reports it to be small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class IntensityTrace:
    """Collects the intensity of each image after every step; give `record` to `walk_leg` as its `on_step`."""

    intensities: list[torch.Tensor] = field(default_factory=list)

    def record(self, i: int, sigma: float, x: torch.Tensor) -> None:
        """x (B, C, h, w) after step i."""
        self.intensities.append(intensity(x))


def intensity(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute value per image, (B,) float64 on the CPU."""
    return x.detach().double().abs().mean((1, 2, 3)).cpu()


def relative_deviation(relay: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """|relay - reference| / reference, value by value, of intensities of one shape."""
    return (relay - reference).abs() / reference


def deviation(relay: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> dict[str, list[float] | float]:
    """Per step (mean over images), and its mean and maximum over steps; both traces hold (B,) intensities per step."""
    per_step = [relative_deviation(a, b).mean().item() for a, b in zip(relay, reference, strict=True)]
    return {"per_step": per_step, "mean": sum(per_step) / len(per_step), "max": max(per_step)}
