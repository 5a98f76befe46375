"""Pictures from cached starts, in big batches: one walk of each source, then one of each K, relays branching off it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from experiments.cached_starts.pairs import Pair
from experiments.grid import SEED_STRIDE
from relay import codecs
from relay.matching import walk
from relay.sampling import walk_leg
from relay.scenes.detector import load_detector
from relay.scenes.judge import compare
from scheduler.load.similarity import skip_of
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    from relay.conditioning import Conditioning
    from relay.family import Family
    from relay.program import Program

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # of T: K in {0, 5, 10, 15, 20, 25} of 50
SOURCE_SEEDS = 500 * SEED_STRIDE  # sources start from noise of their own


@torch.inference_mode()
def draw(family: Family, pairs: Sequence[Pair], programs: Sequence[Program]) -> dict[tuple[str, int], torch.Tensor]:
    """(program, K) -> images (B, 3, H, W) in 0..1. All programs begin with the same member, T and guidance.

    Relays have no K at or behind their handoff step: nothing of the large member would be left.
    """
    size = family.spec.sizes.default
    schedules = family.schedules(size)
    first, guidance = programs[0].legs[0], programs[0].guidance[0]
    sigmas = list(schedules[first.member](first.steps_total).sigmas)
    cond, source_cond = (family.text.encode(texts, None, True, size) for texts in zip_texts(pairs))
    skips = sorted({skip_of(share, first.steps_total) for share in SHARES})
    ends = {program.legs[0].last for program in programs}

    def along(
        x: torch.Tensor, conditioning: Conditioning, begin: int, end: int, kept: set[int]
    ) -> dict[int, torch.Tensor]:
        """The latents at `kept` and at the end of a walk over sigmas[begin..end]."""
        states: dict[int, torch.Tensor] = {}

        def keep(i: int, _: float, latent: torch.Tensor) -> None:
            if begin + i + 1 in kept | {end}:
                states[begin + i + 1] = latent.clone()

        walk_leg(
            family.denoiser(first.member), x, sigmas[begin : end + 1], conditioning, guidance, member=first.member,
            on_step=keep,
        )  # fmt: skip
        return states

    def noise(seeds: Sequence[int]) -> torch.Tensor:
        unit = family.initial_noise(len(seeds), size, [torch.Generator().manual_seed(s) for s in seeds])
        return unit * schedules[first.member](first.steps_total).init_noise_sigma

    starts = along(noise([p.index + SOURCE_SEEDS for p in pairs]), source_cond, 0, max(skips), set(skips))
    starts[0] = noise([p.index for p in pairs])
    images: dict[tuple[str, int], torch.Tensor] = {}
    for skipped in skips:
        reached = along(starts[skipped], cond, skipped, max(ends), ends)
        for program in programs:
            latent = reached.get(program.legs[0].last)
            if latent is None:
                continue
            for k, (leg, own) in list(enumerate(walk(program, schedules)))[1:]:
                sent = codecs.decode(codecs.encode(latent, program.codec), program.codec, latent.shape)
                latent = walk_leg(
                    family.denoiser(leg.member), sent, own, cond, program.guidance[k], member=leg.member
                )  # fmt: skip
            images[str(program), skipped] = family.decode(latent).cpu()
    return images


def zip_texts(pairs: Sequence[Pair]) -> tuple[list[str], list[str]]:
    return [pair.prompt for pair in pairs], [pair.source for pair in pairs]


def rows_of(
    pairs: Sequence[Pair],
    programs: Sequence[Program],
    images: dict[tuple[str, int], torch.Tensor],
    facts: dict[str, Any],
) -> list[dict[str, Any]]:
    """Rows of the outcome store; `score_source_*` is the picture against its source's scene, whose objects it must not
    draw. A start from noise has no source, but is scored against the pair's all the same: what is alike by chance."""
    rows = []
    for program in programs:
        same = facts | {
            "method": "program", "program": str(program), "mode": program.mode,
            "steps_total": program.legs[0].steps_total, "handoff": program.steps["large"],
            "small_steps": program.steps["small"], "matching": program.matching, "codec": program.codec,
            "conditioning": program.conditioning, "guidance": ",".join(f"{g:g}" for g in program.guidance),
        }  # fmt: skip
        for skipped in sorted(k for text, k in images if text == str(program)):
            seen = load_detector().see(images[str(program), skipped] * 2 - 1, 64)
            for pair, what in zip(pairs, seen, strict=True):
                own, others = compare(pair.scene, what), compare(pair.source_scene, what)
                start: dict[str, Any] = {}
                if skipped:
                    start = {"start_prompt": pair.source, "start_seed": pair.index + SOURCE_SEEDS,
                             "start_similarity": pair.similarity, "start_skipped": skipped}  # fmt: skip
                rows.append(
                    same | start | {
                        "split": pair.split, "prompt_index": pair.index, "prompt": pair.prompt,
                        "scene": pair.scene.text(), "complexity": pair.scene.complexity, "seed": pair.index,
                        f"{SCORE}attributes": own.attributes, f"{SCORE}strict": float(own.strict),
                        f"{SCORE}source_attributes": others.attributes, f"{SCORE}source_strict": float(others.strict),
                    }
                )  # fmt: skip
    return rows
