"""Pace: a node's emulated slowness. Each step ends no earlier than `pace` times what it takes here, by sleeping.

It lies inside the member, so the engine measures paced steps, and its choice of a batch is that of the slow machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from relay.batching import StepTimes

if TYPE_CHECKING:
    import torch

    from relay.conditioning import Conditioning
    from relay.denoisers import Denoiser


class Paced:
    """A denoiser whose calls take as long as `curve` says: batch size -> seconds of a guided step, pace included."""

    def __init__(self, denoiser: Denoiser, curve: Mapping[int, float], largest: int):
        self.denoiser, self.device, self.dtype = denoiser, denoiser.device, denoiser.dtype
        # An unguided image is one row of a batch, a guided one two: as the engine reads the curve.
        self._guided, self._unguided = (StepTimes(curve, largest, weight) for weight in (1.0, 0.5))

    def __call__(
        self, x: torch.Tensor, sigma: torch.Tensor, cond: Conditioning, guidance: float | torch.Tensor
    ) -> torch.Tensor:
        import torch

        began = time.monotonic()
        denoised = self.denoiser(x, sigma, cond, guidance)
        times = self._guided if bool((torch.as_tensor(guidance) > 1).any()) else self._unguided
        # An accelerator may still be at it; whoever reads the result waits for what is left.
        if (rest := times.seconds(len(x)) - (time.monotonic() - began)) > 0:
            time.sleep(rest)
        return denoised
