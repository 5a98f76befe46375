"""From rows to thresholds: how alike prompts must be for a picture to bear that K steps are skipped.

For each K the target is what the paper's level keeps of full quality (Argus, arXiv 2511.06724). What a start costs is
estimated from pairs of pictures (cached start and noise, same prompt), as a function of similarity that does not fall:
isotonic least squares. The threshold is the least similarity from which on that estimate, and the mean of all pairs at
or above it, keep the target; none where too few pairs would be left to say so. Quality alone is not enough: prompts that
differ in one colour are very much alike, and the picture that shows the other's colour loses little of its score. So of
the pairs at or above a threshold at most one in twenty may be *taken over*, that is show the source better than their own
prompt where the picture from noise does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay.errors import BadRequest
from scheduler.load.similarity import skip_of
from scheduler.outcomes import read_table

if TYPE_CHECKING:
    import polars as pl
    from numpy.typing import NDArray

PAPER = {0.0: 1.0, 0.1: 0.97, 0.2: 0.958, 0.3: 0.944, 0.4: 0.932, 0.5: 0.915}  # share of T skipped -> relative quality
LEAST_PAIRS = 20  # at or above a threshold: with fewer, nothing can be said of one in twenty
MOST_TAKEN = 0.05  # of them


def paired(rows: pl.DataFrame, score: str = "score_attributes") -> pl.DataFrame:
    """Each cached start beside the same program, prompt and seed from noise: `base` and `base_source`, their scores."""
    import polars as pl

    keys = ["family", "split", "program", "prompt_index"]
    noise = rows.filter(pl.col("start_skipped").is_null()).select(
        *keys, base=pl.col(score), base_strict=pl.col("score_strict"),
        base_source=pl.col("score_source_attributes"),
    )  # fmt: skip
    return rows.filter(pl.col("start_skipped").is_not_null()).join(noise, on=keys, how="inner")


def pairs_of(folders: Sequence[Path], family: str, split: str, score: str) -> pl.DataFrame:
    """The pairs of a family's prompts in these runs. BadRequest where they hold no cached start."""
    import polars as pl

    found = [frame for folder in folders if not (frame := read_table(folder, "outcomes")).is_empty()]
    rows = pl.concat(found, how="diagonal") if found else pl.DataFrame()
    if rows.is_empty() or "start_skipped" not in rows.columns:
        raise BadRequest(f"there are no rows of cached starts in {', '.join(map(str, folders))}")
    return paired(rows.filter((pl.col("family") == family) & (pl.col("split") == split)), score)


def isotonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The non-decreasing list closest to `values` in least squares (pool adjacent violators)."""
    blocks: list[list[float]] = []  # mean, count
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            mean, count = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * count) / (before[1] + count)
            before[1] += count
    return np.repeat([mean for mean, _ in blocks], [int(count) for _, count in blocks])


def taken_over(rows: pl.DataFrame) -> NDArray[np.bool_]:
    """Which of these paired pictures show the source better than their own prompt, where the one from noise does not."""
    own, source, base, chance = (
        rows[c].to_numpy() for c in ("score_attributes", "score_source_attributes", "base", "base_source")
    )
    return np.asarray((source > own) & (chance <= base))


def threshold(
    similarity: NDArray[np.float64], loss: NDArray[np.float64], full: float, target: float, taken: NDArray[np.bool_]
) -> float | None:
    """The least similarity that keeps `target` of `full` and is seldom taken over; None where none does. `loss`: cached
    minus noise, pairwise; `taken`: `taken_over`."""
    order = np.argsort(similarity, kind="stable")
    alike, change = similarity[order], loss[order]
    count = np.arange(len(change), 0, -1)
    kept = 1 + isotonic(change) / full
    above = 1 + change[::-1].cumsum()[::-1] / count / full
    over = taken[order][::-1].cumsum()[::-1] / count
    for i in range(len(alike) - LEAST_PAIRS + 1):
        if kept[i] >= target and above[i] >= target and over[i] <= MOST_TAKEN:
            return float(alike[i])
    return None


def rule_of(rows: pl.DataFrame, steps: int) -> list[tuple[float, float]]:
    """A family's rule from its paired validation rows of the large member alone: (similarity, share), most similar first.

    A K never asks for less similarity than a smaller one.
    """
    import polars as pl

    found: list[tuple[float, float]] = []
    least = -1.0
    for share, target in PAPER.items():
        of = rows.filter(pl.col("start_skipped") == skip_of(share, steps))
        if not share or of.is_empty():
            continue
        loss = (of["score_attributes"] - of["base"]).to_numpy()
        full = float(of["base"].to_numpy().mean())
        own = threshold(of["start_similarity"].to_numpy(), loss, full, target, taken_over(of))
        if own is None:
            break  # what this K asks for no larger one can do with
        least = max(least, float(np.ceil(own * 1000) / 1000))
        found.append((least, share))
    return found[::-1]


def shares_of(rows: pl.DataFrame, steps: int) -> dict[float, Any]:
    """share of T -> its rows."""
    import polars as pl

    return {
        share: of
        for share in PAPER
        if share and not (of := rows.filter(pl.col("start_skipped") == skip_of(share, steps))).is_empty()
    }
