"""Two runs side by side: the same program, prompt and seed in both, and the paired difference of every score."""

from __future__ import annotations

from typing import Any

from experiments.run_folder import Run
from experiments.statistics import interval
from relay.errors import BadRequest
from scheduler.outcomes import SCORE

KEY = ["family", "program", "prompt", "seed"]


def compare(a: Run, b: Run, across: bool = False) -> list[dict[str, Any]]:
    """A row per program and score: both means, the difference b - a with its 95 % paired bootstrap interval, the pairs.

    `across` pairs by family, mode and handoff instead of the whole program: for runs that differ in codec or matching.
    """
    shared = ["family", "mode", "handoff", "small_steps", "steps_total"] if across else ["family", "program"]
    key = [*shared, "prompt", "seed"]
    left, right = a.outcomes, b.outcomes
    scores = [c for c in left.columns if c.startswith(SCORE) and c in right.columns]
    joined = left.select(key + scores).join(right.select(key + scores), on=key, suffix="_b", nulls_equal=True)
    if joined.is_empty():
        raise BadRequest(
            f"{a.folder} and {b.folder} share no row (the same program, prompt and seed); for runs whose programs differ"
            " in codec, matching or guidance say --across"
        )
    found = []
    for group, rows in joined.group_by(shared, maintain_order=True):
        for score in scores:
            pairs = rows.select(score, f"{score}_b").drop_nulls().drop_nans()
            if pairs.is_empty():
                continue
            ours, theirs = pairs[score].to_numpy(), pairs[f"{score}_b"].to_numpy()
            mean, low, high = interval(list(theirs - ours))
            found.append(
                dict(zip(shared, group, strict=True))
                | {"score": score.removeprefix(SCORE), "a": float(ours.mean()), "b": float(theirs.mean())}
                | {"difference": mean, "low": low, "high": high, "pairs": len(pairs)}
            )
    return found


def missing_rows(a: Run, b: Run) -> int:
    """Rows of either run that the other has not."""
    both = a.outcomes.select(KEY).join(b.outcomes.select(KEY), on=KEY, how="inner").height
    return a.outcomes.height + b.outcomes.height - 2 * both
