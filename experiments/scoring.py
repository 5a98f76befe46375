"""Scores of programs, from shared prefixes and big batches; times come from a pass of their own (experiments.timing).

The first leg's trajectory runs once for all programs that begin alike, its states are kept where a program hands over,
and only the rest differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from relay import codecs
from relay.deviation import IntensityTrace
from relay.matching import walk
from relay.sampling import walk_leg
from relay.scenes.judge import Verdict, judge

if TYPE_CHECKING:
    from relay.conditioning import Conditioning
    from relay.family import Family
    from relay.program import Program
    from relay.scenes.language import Scene

Progress = Callable[[int, int], None]


@dataclass
class Drawn:
    """One batch: images (B, 3, H, W) in 0..1 per program (its text form), and what of them was asked to be watched."""

    images: dict[str, torch.Tensor]
    # Intensities (B', steps) of the small leg and of the large member going on from the same latent, first B' prompts.
    traces: dict[str, tuple[torch.Tensor, torch.Tensor]]
    prefixes: dict[str, torch.Tensor]  # (B', s): the same prompts' intensities over the first leg
    codec_errors: dict[str, torch.Tensor]  # (B,): |sent - latent| / |latent| at the first handoff, of programs with one
    sample_steps: int  # steps x samples that were really walked
    sample_steps_alone: int  # the same without shared prefixes


@dataclass
class Scored:
    """Verdicts per program (its text form), in prompt order, and the share of steps that sharing prefixes saved."""

    verdicts: dict[str, list[Verdict]]
    steps_saved: float


@torch.inference_mode()
def draw_batch(
    family: Family, captions: Sequence[str], seeds: Sequence[int], programs: Sequence[Program], watched: int = 0
) -> Drawn:
    """Draw every program on every prompt, prompt i from the noise of seeds[i].

    The first `watched` prompts are also walked on by the first leg's member over each second leg's sigmas, for the
    deviation of the latent's intensity, which is recorded over the whole way.
    """
    size = family.spec.sizes.default
    schedules = family.schedules(size)
    walks = {str(p): walk(p, schedules) for p in programs}
    cond = family.text.encode(list(captions), None, True, size)
    noise = family.initial_noise(len(seeds), size, [torch.Generator().manual_seed(s) for s in seeds])
    states, watches, taken = _shared_prefixes(family, programs, walks, noise, cond, watched)
    drawn = Drawn({}, {}, {}, {}, taken * len(seeds), sum(leg.steps for p in programs for leg in p.legs) * len(seeds))
    for program in programs:
        latent = states[_prefix(program)]
        for k in range(1, len(program.legs)):
            leg, sigmas = walks[str(program)][k]
            # What the wire does to a latent is part of the program.
            sent = codecs.decode(codecs.encode(latent, program.codec), program.codec, latent.shape)
            if k == 1:
                drawn.codec_errors[str(program)] = relative_error(sent, latent)
            seen = IntensityTrace()
            latent = walk_leg(
                family.denoiser(leg.member), sent, sigmas, cond, program.guidance[k], member=leg.member,
                on_step=seen.record,
            )  # fmt: skip
            drawn.sample_steps += leg.steps * len(seeds)
            if k == 1 and watched:
                reference = IntensityTrace()
                before, some = program.legs[0].member, cond.select(range(watched))
                walk_leg(
                    family.denoiser(before), sent[:watched], sigmas, some, program.guidance[0], member=before,
                    on_step=reference.record,
                )  # fmt: skip
                pair = [torch.stack(t.intensities, 1)[:watched] for t in (seen, reference)]
                drawn.traces[str(program)] = (pair[0], pair[1])
                *trajectory, last = _prefix(program)
                drawn.prefixes[str(program)] = torch.stack(watches[*trajectory].intensities[:last], 1)
        drawn.images[str(program)] = family.decode(latent).cpu()
    return drawn


def relative_error(sent: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Relative L2 error of each latent (B, C, h, w) after the wire, (B,) float64 on the CPU."""
    exact = latent.detach().double().cpu()
    return (sent.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)


def score_programs(
    family: Family,
    scenes: Sequence[Scene],
    captions: Sequence[str],
    programs: Sequence[Program],
    seeds: Sequence[int],
    batch: int = 50,
    progress: Progress | None = None,
) -> Scored:
    """Judge every program on every prompt; prompt i starts from the noise of seeds[i]."""
    verdicts: dict[str, list[Verdict]] = {str(p): [] for p in programs}
    taken = alone = 0
    for at in range(0, len(captions), batch):
        part = slice(at, at + batch)
        drawn = draw_batch(family, captions[part], seeds[part], programs)
        taken, alone = taken + drawn.sample_steps, alone + drawn.sample_steps_alone
        for text, images in drawn.images.items():
            verdicts[text] += judge(images * 2 - 1, list(scenes[part]))
        if progress:
            progress(min(at + batch, len(captions)), len(captions))
    return Scored(verdicts, 1 - taken / alone)


def _prefix(program: Program) -> tuple[str, int, float, int]:
    leg = program.legs[0]
    return leg.member, leg.steps_total, program.guidance[0], leg.last


def prefix_steps(programs: Sequence[Program]) -> dict[tuple[str, int, float], int]:
    """The trajectories that these programs' first legs share: member, T and guidance -> steps walked, once for all."""
    longest: dict[tuple[str, int, float], int] = {}
    for member, total, guidance, last in map(_prefix, programs):
        longest[member, total, guidance] = max(longest.get((member, total, guidance), 0), last)
    return longest


def _shared_prefixes(family: Family, programs, walks, noise, cond: Conditioning, watched: int):  # noqa: ANN001, ANN202
    """The latent after the first leg of every program; programs that begin alike share one trajectory.

    With it the first `watched` prompts' intensities along each trajectory, and the steps walked.
    """
    longest: dict[tuple[str, int, float], tuple[list[float], set[int]]] = {}
    for program in programs:
        member, total, guidance, last = _prefix(program)
        _, sigmas = walks[str(program)][0]
        kept, wanted = longest.get((member, total, guidance), ([], set()))
        longest[member, total, guidance] = (max(kept, sigmas, key=len), wanted | {last})
    states: dict[tuple[str, int, float, int], torch.Tensor] = {}
    watches: dict[tuple[str, int, float], IntensityTrace] = {key: IntensityTrace() for key in longest}
    for (member, total, guidance), (sigmas, wanted) in longest.items():

        def keep(i: int, sigma: float, x: torch.Tensor, key=(member, total, guidance), wanted=wanted) -> None:  # noqa: ANN001
            if watched:
                watches[key].record(i, sigma, x[:watched])
            if i + 1 in wanted:
                states[*key, i + 1] = x.clone()

        start = noise * family.schedule(member, total).init_noise_sigma
        walk_leg(family.denoiser(member), start, sigmas, cond, guidance, member=member, on_step=keep)
    return states, watches, sum(len(sigmas) - 1 for sigmas, _ in longest.values())
