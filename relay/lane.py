"""A lane: the walks that can share a batch, and the batch that runs.

Walks share one where latent shape, conditioning shapes and being guided are the same; an unguided walk among guided
ones would step at their pace without needing their second forward. The running batch is one latent tensor and one
`Conditioning`, kept between steps and gathered again only where other walks step than before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from relay.batching import StepTimes
from relay.conditioning import Conditioning


@dataclass(eq=False)
class Walk:
    """One image's stretch on one member."""

    id: str
    latent: torch.Tensor  # (1, C, h, w), noisy at sigmas[0]; once begun, where it stood when it last left the batch
    sigmas: Sequence[float]  # what is left to walk, descending; it leaves at the last one
    conditioning: Conditioning  # of this one image; its negatives count only where it is guided
    guidance: float = 1.0  # above 1 it is guided, as everywhere
    deadline: float = math.inf  # by time.monotonic()
    arrived: float = field(default_factory=time.monotonic)
    # Told after each step: steps done, sigma now, latent (1, C, h, w), a view into the batch: clone what is kept.
    on_step: Callable[[int, float, torch.Tensor], object] | None = None
    done: int = field(default=0, init=False)  # steps

    @property
    def left(self) -> int:
        return len(self.sigmas) - 1 - self.done

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def urgency(self) -> tuple[float, float]:
        """Who steps first: by deadline, then arrival."""
        return self.deadline, self.arrived

    def embeddings(self) -> Conditioning:
        """What of the conditioning its steps read."""
        cond = self.conditioning
        return cond if self.guided else Conditioning(cond.prompt_embeds, cond.pooled, time_ids=cond.time_ids)

    def lane(self) -> Hashable:
        """What a walk must have in common with another to share a batch."""
        embeddings = tuple((name, tensor.shape[1:]) for name, tensor in self.embeddings().tensors().items())
        return self.latent.shape[1:], self.guided, embeddings


class Lane:
    """Walks in order of urgency, the first of which step together."""

    def __init__(self, times: StepTimes, bound: int):
        self.times = times
        self.bound = bound  # most images in a step
        self.steps_in_bound = 0  # since the bound last changed
        self.walks: list[Walk] = []
        self.seconds = 0.0  # of computing that it may still take at its turn
        self.clear()

    def clear(self) -> None:
        """No batch, and no memory held for one."""
        self.rows: list[Walk] = []  # whose row of the batch is whose; those that have ended stay till the next gather
        self.x = torch.empty(0)  # (B, C, h, w) float32 on the denoiser's device
        self.cond: Conditioning | None = None  # of B images
        self.guidance = torch.empty(0)  # (B,)

    @property
    def size(self) -> int:
        """How many step next."""
        return self.times.choose(len(self.walks), self.bound)

    @property
    def step_s(self) -> float:
        """Seconds of the next step, as known now."""
        return self.times.seconds(self.size)

    def latent_of(self, walk: Walk) -> torch.Tensor:
        """Where a walk stands, (1, C, h, w), a copy where it is in the batch."""
        row = next((i for i, each in enumerate(self.rows) if each is walk), None)
        return walk.latent if row is None else self.x[row : row + 1].clone()

    def gather(self, chosen: Sequence[Walk], device: torch.device, dtype: torch.dtype) -> None:
        """Make `chosen` the batch. Whoever is left out keeps its latent; on an error nothing has changed."""
        if set(chosen) == set(self.rows):
            return
        staying = [i for i, walk in enumerate(self.rows) if walk in chosen]
        entering = [walk for walk in chosen if walk not in self.rows]
        aside = [(walk, self.latent_of(walk)) for walk in self.rows if walk not in chosen and walk in self.walks]
        latents = [walk.latent.to(device, torch.float32) for walk in entering]
        conds = [walk.embeddings().to(device, dtype) for walk in entering]
        if staying:
            assert self.cond is not None
            latents.insert(0, self.x[staying])
            conds.insert(0, self.cond.select(staying))
        x, cond = torch.cat(latents), Conditioning.cat(conds)
        for walk, latent in aside:
            walk.latent = latent
        self.rows = [*(self.rows[i] for i in staying), *entering]
        self.x, self.cond = x, cond
        self.guidance = torch.tensor([walk.guidance for walk in self.rows], dtype=torch.float32)

    def set_bound(self, bound: int) -> None:
        self.bound, self.steps_in_bound = bound, 0
