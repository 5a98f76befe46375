"""Step times measured: seconds of a guided step of a member over batch size, and what a request costs beside its steps.

Whoever times (benchmarks, the experiment runner, a node that registers) measures the same thing here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from relay.family import Family

PROMPT = "a large red heart at the top left and a small blue circle at the bottom, on a yellow background"


@torch.inference_mode()
def step_curve(family: Family, member: str, batches: Sequence[int], repeats: int = 5) -> dict[int, float]:
    """Median seconds of one guided step at each batch size, in turns (a step of B images is a forward of 2 B rows)."""
    size, denoiser = family.spec.sizes.default, family.denoiser(member)
    guidance = family.spec.members[member].guidance
    cond = family.text.encode([PROMPT], None, True, size).to(denoiser.device, denoiser.dtype)
    sigma = family.schedules(size)[member](10).sigmas[4]

    def step(batch: int) -> Callable[[], float]:
        x = family.initial_noise(batch, size, torch.Generator().manual_seed(0)).to(denoiser.device)
        many, level = cond.select([0] * batch), torch.full((batch,), sigma)
        # an accelerator has finished when its result is read
        return lambda: denoiser(x, level, many, guidance).sum().item()

    return dict(zip(batches, interleaved([step(b) for b in batches], repeats), strict=True))


@torch.inference_mode()
def ends(family: Family) -> tuple[float, float]:
    """Seconds of encoding a prompt and of decoding a latent of the default size, after one of each that warms up."""
    size = family.spec.sizes.default
    noise = family.initial_noise(1, size, torch.Generator().manual_seed(0))

    def encode() -> Any:
        return family.text.encode([PROMPT], None, True, size)

    encode_s, decode_s = interleaved([encode, lambda: family.decode(noise)], 1)
    return encode_s, decode_s


def interleaved(jobs: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each job after one warm-up, taken in turns so that a drifting machine drifts for all."""
    times: list[list[float]] = [[] for _ in jobs]
    for i in range(repeats + 1):
        for job, kept in zip(jobs, times, strict=True):
            started = time.perf_counter()
            job()
            if i:
                kept.append(time.perf_counter() - started)
    return [statistics.median(kept) for kept in times]
