"""The latent caches of a simulation's edges: which requests find a latent to start from, and what it keeps of their quality.

*Who finds what* comes from the stored prompts' own embeddings, as edges compare them: each edge holds the walks from noise of
the last `prompts` prompts that it finished (least recently used go), a walk leaves a latent at each step of the family's
rule that its first leg passed, and a request takes the one that spares it most among those that its similarity allows; of
equals the nearer. A request never finds its own prompt: stored prompts are few and are drawn again and again, which is no
workload's doing.

*What is kept* comes from a run of cached starts (`experiments.cached_starts`): the share of a program's quality that is left
at K steps, as a function of similarity that does not fall (isotonic least squares, as thresholds are made); never above 1.
Look-ups take no time: real ones are below a step's (docs/results/cache.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.cached_starts.calibrate import isotonic, pairs_of
from relay.program import Program, drawn_alike
from scheduler.load.similarity import Rule, skip_of
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    from scheduler.load.expected import Work

Floats = NDArray[np.float64]


class Caching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`starts` in a config. `store`: runs of cached starts; `prompts`: how many an edge keeps the latents of; `embeds`: the
    family whose text encoder says what is similar, where it is not the case's own."""

    store: list[str]
    prompts: Annotated[int, msgspec.Meta(ge=1)] = 1000
    embeds: str | None = None


class Kept:
    """(program, K) -> the share of quality that is kept at a similarity; of one split."""

    def __init__(self, folders: Sequence[Path], family: str, metric: str, split: str):
        pairs = pairs_of(folders, family, split, SCORE + metric)
        self._curves: dict[tuple[str, int], tuple[Floats, Floats]] = {}
        for (text, skipped), of in pairs.group_by(["program", "start_skipped"]):
            of = of.sort("start_similarity")  # noqa: PLW2901
            lost = (of[SCORE + metric] - of["base"]).to_numpy() / max(float(of["base"].to_numpy().mean()), 1e-9)
            share = np.clip(1 + isotonic(lost), 0.0, 1.0)
            self._curves[drawn_alike(str(text)), int(str(skipped))] = of["start_similarity"].to_numpy(), share

    def skips(self, program: Program) -> set[int]:
        """Steps at which starts of this program were measured."""
        text = drawn_alike(str(program))
        return {skipped for known, skipped in self._curves if known == text}

    def share(self, program: Program, skipped: int, similarity: float) -> float:
        alike, share = self._curves[drawn_alike(str(program)), skipped]
        return float(np.interp(similarity, alike, share))


class Caches:
    """Of a split's prompts. `vectors` (N, P): unit vectors of them."""

    def __init__(self, vectors: NDArray[np.float32], rule: Rule, kept: Kept, prompts: int):
        self.alike = vectors @ vectors.T
        self.rule, self.kept, self.prompts = rule, kept, prompts

    def begin(self) -> Found:
        """Empty ones, for a run."""
        return Found(self)


class Found:
    """The caches of one run's edges."""

    def __init__(self, of: Caches):
        self.of = of
        self._there: dict[
            str, OrderedDict[int, int]
        ] = {}  # edge -> prompt -> the last step that its walk left a latent at
        self._skips: dict[str, set[int]] = {}

    def find(self, edge: str, prompt: int, program: Program, most: int) -> tuple[int, float]:
        """Steps that a request may skip there, at most `most`, and how alike its source is; 0 where it finds nothing."""
        there, total = self._there.get(edge), program.legs[0].steps_total
        if not there:
            return 0, 0.0
        text = str(program)
        if text not in self._skips:
            self._skips[text] = self.of.kept.skips(program)
        whose = np.fromiter(there, int, len(there))
        alike, depth = self.of.alike[prompt, whose], np.fromiter(there.values(), int, len(there))
        for least, share in self.of.rule.steps:
            skipped = skip_of(share, total)
            if skipped > most or skipped not in self._skips[text]:
                continue
            fits = np.where((alike >= least) & (depth >= skipped) & (whose != prompt), alike, -np.inf)
            if (best := int(fits.argmax())) >= 0 and np.isfinite(fits[best]):
                there.move_to_end(int(whose[best]))
                return skipped, float(fits[best])
        return 0, 0.0

    def leave(self, edge: str, prompt: int, program: Program) -> None:
        """A walk from noise has ended there."""
        there = self._there.setdefault(edge, OrderedDict())
        there[prompt] = max(there.pop(prompt, 0), program.legs[0].last - 1)
        while len(there) > self.of.prompts:
            there.popitem(last=False)

    def quality(self, from_noise: float, work: Work, skipped: int, similarity: float) -> float:
        """Of a picture that skipped so many steps."""
        return from_noise * self.of.kept.share(work.program, skipped, similarity) if skipped else from_noise


def vectors_of(family: str, prompts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors (N, P) of prompts as a family's edges compare them; seconds."""
    from experiments.cached_starts.pairs import embed
    from nodes.session import quiet_libraries
    from relay.family import Family

    quiet_libraries()
    loaded = Family.load(family)
    parts = [embed(loaded, prompts[first : first + 100]) for first in range(0, len(prompts), 100)]
    return np.concatenate(parts)
