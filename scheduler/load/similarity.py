"""How many steps a prompt may skip from another's latent, by the similarity of their embeddings.

The paper's thresholds are where calibration starts from; a family's own are measured with its judge (`python -m
experiments.cached_starts`) and lie in configs/cache/FAMILY.yaml.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from relay.errors import BadRequest
from relay.files import read_yaml

CONFIGS = Path(__file__).parents[2] / "configs" / "cache"
# Steps skipped of 50 by similarity of the prompts' embeddings (Argus, arXiv 2511.06724, after NIRVANA), as shares of T.
PAPER = ((0.95, 0.5), (0.9, 0.4), (0.85, 0.3), (0.75, 0.2), (0.65, 0.1))


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`steps`: pairs of least similarity and the share of T that may then be skipped, most similar first. Empty: none."""

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

    def skips(self, total: int) -> tuple[int, ...]:
        """The steps of a schedule of `total` at which latents are worth keeping, ascending."""
        return tuple(sorted({skipped for _, share in self.steps if 0 < (skipped := skip_of(share, total)) < total}))


def skip_of(share: float, total: int) -> int:
    """A share of T as whole steps; halves go to the safer side."""
    return int(share * total + 0.5 - 1e-9)


def read_rule(family: str) -> Rule:
    """A family's calibrated rule, the paper's where none was measured. BadRequest names the file and what is wrong."""
    path = CONFIGS / f"{family}.yaml"
    if not path.exists():
        return Rule()
    try:
        return read_yaml(path, Rule, strict=False)
    except BadRequest as error:
        raise BadRequest(str(error) if str(path) in str(error) else f"{path}: {error}") from None
