"""What a baseline is: another way to spend less than the large member alone, on the same prompts, seeds and noise.

Every baseline starts image i from the noise that `RelayPipeline` draws for seeds[i] and uses each member's own guidance,
so that its images pair with those of full-cloud and of every relay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from relay.pipeline import RelayOutput, RelayPipeline

if TYPE_CHECKING:
    from relay.family import Family
    from relay.program import Program


@dataclass(frozen=True)
class Setting:
    """One operating point. `values` are plain scalars, so that a row of the outcome store can hold them as JSON.

    `members`: who holds the latent in turn, each on a node of its own and `small` on the asker's device. That fixes
    what a link is charged: the latent at each change, in the family's codec, and the image where it ends elsewhere.
    """

    label: str
    values: Mapping[str, Any]
    members: tuple[str, ...] = ("large",)


@dataclass
class Result:
    """`steps`: what each member took per image, steps that a cache made cheaper counted as steps."""

    images: torch.Tensor  # (B, 3, H, W) float32 in 0..1, on the CPU
    denoising_s: float  # of the whole batch
    steps: dict[str, int] = field(default_factory=dict)


class Baseline(Protocol):
    """`name` is what tables say; `paper` where the idea is from; `note` what a reader must know of how it is run."""

    name: str
    paper: str
    note: str

    def applies(self, family: Family) -> str | None:
        """None where it can be run on this family, else one line that says why not. Loads no weights."""
        ...

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        """A handful of operating points for full-cloud runs of `steps` steps (default: the large member's own)."""
        ...

    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        """Image i is of prompts[i] from seeds[i]. The family's models are afterwards as they were before."""
        ...


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One per image, as `RelayPipeline` makes them of seeds."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def full_cloud(family: Family, steps: int | None = None) -> Program:
    """The large member alone: what every baseline is an approximation of."""
    steps = steps or family.spec.members["large"].steps
    return RelayPipeline(family).plan(num_inference_steps=steps, handoff=steps)


def call(
    family: Family, prompts: list[str], seeds: Sequence[int], program: Program | str, output_type: str = "pt"
) -> RelayOutput:
    """The project's own call: baselines that only change models or programs have no loop of their own."""
    pipe = RelayPipeline(family)
    return pipe(list(prompts), program=program, generator=generators(seeds), output_type=output_type)


def as_result(output: RelayOutput) -> Result:
    return Result(output.images.float().cpu(), sum(output.denoising_s.values()), output.steps)


def share(steps: int, part: float) -> int:
    """That part of `steps`, one at least."""
    return max(1, round(steps * part))


class Stopwatch:
    """Seconds spent inside `running()`, with what the accelerator still had to do."""

    seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        _synchronize()
        started = time.perf_counter()
        yield
        _synchronize()
        self.seconds += time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
