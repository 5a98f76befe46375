"""Two runs side by side: the same program, prompt and seed in both, and the paired difference of every score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.run_folder import Run
from experiments.statistics import interval
from relay.errors import BadRequest
from relay.program import Program
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    import polars as pl

SAMPLE = ["prompt", "seed", "start_prompt", "start_seed", "start_skipped"]  # one picture of a program


def compare(a: Run, b: Run, across: bool = False) -> list[dict[str, Any]]:
    """A row per program and score: both means, the difference b - a with its 95 % paired bootstrap interval over prompts (each
    its mean over seeds), and how many prompts and pairs there are.

    `across`: a program that only one of the runs has is set beside those of the other that take the same steps of the
    same members, one by one (`program` of a, `program_b`): for runs that differ in codec, matching or guidance. A
    baseline's setting stands beside that very setting alone.
    """
    left, right = a.outcomes, b.outcomes
    scores = [c for c in left.columns if c.startswith(SCORE) and c in right.columns]
    pairs = _pairs(left, right, across)
    found = []
    for one, other in pairs:
        joined = _of(left, one, scores).join(_of(right, other, scores), on=SAMPLE, suffix="_b", nulls_equal=True)
        for score in scores:
            pairs_of = joined.select("prompt", score, f"{score}_b").drop_nulls().drop_nans()
            if pairs_of.is_empty():
                continue
            # Seeds of a prompt are no prompts of their own.
            both = pairs_of.group_by("prompt", maintain_order=True).mean()
            ours, theirs = both[score].to_numpy(), both[f"{score}_b"].to_numpy()
            mean, low, high = interval(list(theirs - ours))
            found.append(
                {"family": one[0], "program": one[1], "program_b": other[1], "score": score.removeprefix(SCORE)}
                | {"a": float(ours.mean()), "b": float(theirs.mean())}
                | {"difference": mean, "low": low, "high": high, "prompts": len(both), "pairs": len(pairs_of)}
            )
    if not found:
        raise BadRequest(
            f"{a.folder} and {b.folder} share no row (the same program, prompt and seed); for runs whose programs differ"
            " in codec, matching or guidance say --across"
        )
    return found


Named = tuple[str, str]  # family, program


def _pairs(left: pl.DataFrame, right: pl.DataFrame, across: bool) -> list[tuple[Named, Named]]:
    """What is compared with what, in the order of the first run."""
    ours, theirs = _programs(left), _programs(right)
    if not across:
        return [(one, one) for one in ours if one in theirs]
    found = []
    for one, shape in ours.items():
        alike = [other for other, its in theirs.items() if its == shape and other not in ours]
        found += [(one, other) for other in ([one] if one in theirs else alike)]
    return found


def _programs(rows: pl.DataFrame) -> dict[Named, tuple[Any, ...]]:
    """Each program of a run with what must be the same for it to be compared across: who takes how many steps."""
    kinds = rows.select("family", "program", "method", "steps_total").unique(maintain_order=True)
    return {
        (family, text): (family, method, total, _way(text) if method == "program" else text)
        for family, text, method, total in kinds.iter_rows()
    }


def _way(text: str) -> tuple[tuple[str, int], ...]:
    return tuple((leg.member, leg.steps) for leg in Program.parse(text).legs)


def _of(rows: pl.DataFrame, named: Named, scores: list[str]) -> pl.DataFrame:
    return rows.filter(family=named[0], program=named[1]).select(SAMPLE + scores)
