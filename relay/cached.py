"""Cached starts: a first leg that begins at its index K, from the latent that another prompt's walk had there.

After NIRVANA (NSDI 2024) and Argus (arXiv 2511.06724): the first steps of similar prompts draw much the same, so their
work may be skipped. A latent is of use only to a walk of its own *space*: one latent space and text conditioning, one
member, schedule, guidance, negative prompt, size and dtype. In its own space and for its own prompt it gives the
unbroken run, bit for bit.

Knows neither what is similar nor where latents are kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from relay.errors import BadRequest

if TYPE_CHECKING:
    from relay.family import Family
    from relay.program import Program


@dataclass(frozen=True)
class CachedStart:
    """A walk's latent (1, C, h, w) float32 after its first `skipped` steps.

    `source` says whose it is, `similarity` how alike the prompts are (cosine of their pooled embeddings; None where
    nobody compared them).
    """

    space: str
    skipped: int
    latent: torch.Tensor
    source: str = ""
    similarity: float | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"source": self.source, "similarity": self.similarity, "skipped": self.skipped}


def space_of(
    fingerprint: Any, member: str, sigmas: Sequence[float], guidance: float, negative: str | None,
    size: tuple[int, int], dtype: str,
) -> str:  # fmt: skip
    """The name of a space: equal where everything that a latent depends on, besides prompt and seed, is equal."""
    schedule = [round(sigma, 7) for sigma in sigmas]
    told = msgspec.json.encode([fingerprint, member, schedule, guidance, negative, size, dtype], order="sorted")
    return hashlib.blake2b(told, digest_size=12).hexdigest()


def first_leg_space(family: Family, program: Program, negative: str | None, size: tuple[int, int]) -> str:
    """The space of a program's first leg. Its last step is no part of it: a shorter leg's latents are the same."""
    leg, guidance = program.legs[0], program.guidance[0]
    if leg.first:
        raise BadRequest(f"a cached start skips steps of a leg that begins with noise, not of {leg}")
    prints = msgspec.to_builtins([family.fingerprint, family.conditioning_fingerprint])
    sigmas = family.schedules(size)[leg.member](leg.steps_total).sigmas
    dtype = family.dtype(family.member(leg.member))
    return space_of(prints, leg.member, sigmas, guidance, negative if guidance > 1 else None, size, dtype)


def check_start(start: CachedStart, program: Program, space: str, shape: Sequence[int]) -> None:
    """BadRequest where a cached latent is not one that this program's first leg passes. `shape`: (C, h, w)."""
    leg = program.legs[0]
    if start.space != space:
        raise BadRequest(
            f"the cached latent is of another family, member, schedule, guidance, negative prompt, size or dtype than {leg}"
        )
    if not 0 < start.skipped < leg.last:
        raise BadRequest(f"a cached start skips between 1 and {leg.last - 1} steps of {leg}, not {start.skipped}")
    if tuple(start.latent.shape) != (1, *shape) or not torch.isfinite(start.latent).all():
        raise BadRequest(f"the cached latent is not finite or not of shape {(1, *shape)}")
