"""What a latent must share with another to be of any use to it, and what a hit may skip.

A latent is a picture under way of one latent space, walked by one member along one schedule with one guidance, of one size,
in one dtype: a `space`. Nothing crosses from one to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from relay.errors import BadRequest

# Steps skipped of 50 by similarity of the prompts' embeddings (Argus, arXiv 2511.06724, after NIRVANA), as shares of T: where
# calibration starts from. A family's own are measured with its judge.
PAPER = ((0.95, 0.5), (0.9, 0.4), (0.85, 0.3), (0.75, 0.2), (0.65, 0.1))


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`steps`: pairs of least similarity and the share of T that may then be skipped, most similar first."""

    steps: tuple[tuple[float, float], ...] = PAPER

    def __post_init__(self) -> None:
        pairs = list(self.steps)
        if any(not (-1 <= s <= 1 and 0 < k < 1) for s, k in pairs):
            raise BadRequest("a cache rule pairs a similarity of -1 to 1 with a share of T between 0 and 1")
        if pairs != sorted(pairs, reverse=True) or [k for _, k in pairs] != sorted((k for _, k in pairs), reverse=True):
            raise BadRequest("a cache rule goes from the most similar to the least, and skips no more on the way")

    def allowed(self, similarity: float) -> float:
        """The largest share of T that prompts so similar may skip; 0 where none."""
        return next((share for least, share in self.steps if similarity >= least), 0.0)


def space_of(
    fingerprint: dict[str, Any],
    member: str,
    sigmas: Sequence[float],
    guidance: float,
    size: tuple[int, int],
    dtype: str,
) -> str:
    """The name of a space: equal where everything that a latent depends on, besides prompt and seed, is equal."""
    told = msgspec.json.encode(
        [fingerprint, member, [round(s, 7) for s in sigmas], guidance, size, dtype], order="sorted"
    )
    return hashlib.blake2b(told, digest_size=12).hexdigest()
