"""The report on cached starts: thresholds from validation rows; levels, similarity and what leaks in, from test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.cached_starts.calibrate import LEAST_PAIRS, MOST_TAKEN, PAPER, paired, rule_of, shares_of, taken_over
from experiments.cached_starts.draw import SHARES
from experiments.cached_starts.pairs import BINS
from experiments.cached_starts.work import STEPS
from experiments.statistics import interval
from relay.errors import BadRequest
from relay.files import write_atomically
from relay.program import Program
from scheduler.load.similarity import PAPER as PAPER_RULE
from scheduler.load.similarity import Rule

if TYPE_CHECKING:
    import polars as pl

    from experiments.run_folder import Run

Cell = dict[str, Any]


def text_and_data(run: Run) -> tuple[str, dict[str, Any]]:
    """Markdown and data, a family each. BadRequest where a split has no rows yet."""
    import polars as pl

    rows = run.outcomes
    if rows.is_empty():
        raise BadRequest(f"{run.folder} holds no rows yet: `python -m experiments.cached_starts run` draws them")
    both = paired(rows)
    data, parts = {}, [INTRODUCTION]
    for name in rows["family"].unique().sort():
        own = both.filter(pl.col("family") == name)
        if own["split"].n_unique() < 2:  # a run that is not done
            continue
        data[name] = found = _family(own, run.dtypes.get(name, ""))
        parts += _tables(name, found)
    if not data:
        raise BadRequest(f"{run.folder} has no family with both validation and test rows yet: let `run` go on")
    if len(data) < len(run.config.get("families", ())) or _unfinished(run, data):
        parts.insert(1, "**The run is not done**: fewer pairs, or families, than were asked for are in these tables.\n")
    return "\n".join(parts), data


def _unfinished(run: Run, data: Mapping[str, Cell]) -> bool:
    asked = run.config.get("pairs", 0)
    counts = [next(iter(found["programs"].values())) for found in data.values()]
    return any(min(each["pairs"], each["validation_pairs"]) < asked for each in counts)


INTRODUCTION = f"""\
A picture starts at step K from the latent that another prompt's walk had there. Quality is the share of attributes that
the scene judge finds right, relative to the same program, prompts and seeds from noise; intervals are 95 % bootstrap over
pairs. Similarity: cosine of the pooled prompt embeddings. Pairs were chosen to cover the whole range of similarity evenly, so
the row "all pairs" is no workload's mean. Thresholds come from validation pairs, every other figure from test pairs.

`source's objects`: score of the picture against the *source's* scene, less the same for the picture from noise: what of the
other prompt is drawn beyond what both share by chance. `taken over`: share of pictures that show the source better than
their own prompt, where a picture from noise does not; of the pairs at or above a threshold at most {MOST_TAKEN:.0%} were, on
validation. `never`: no similarity keeps that and the paper's quality with at least {LEAST_PAIRS} validation pairs at or above it.
"""


def _family(own: pl.DataFrame, dtype: str) -> Cell:
    import polars as pl

    found: Cell = {"dtype": dtype, "programs": {}}
    validation, test = (own.filter(pl.col("split") == split) for split in ("validation", "test"))
    programs = sorted(map(Program.parse, test["program"].unique()), key=_first_the_large_member)
    for program in programs:
        text, steps = str(program), program.legs[0].steps_total
        mine = test.filter(pl.col("program") == text)
        before = validation.filter(pl.col("program") == text)
        if "rule" not in found:
            found["rule"] = rule_of(before, steps)
        rule = Rule(tuple(map(tuple, found["rule"])))
        found["programs"][text] = {
            "mode": program.mode, "steps": program.steps, "steps_total": steps,
            "pairs": mine["prompt_index"].n_unique(), "validation_pairs": before["prompt_index"].n_unique(),
            "levels": _levels(mine, steps, {"calibrated": rule, "paper": Rule(PAPER_RULE)}),
            "bins": _bins(mine, steps),
        }  # fmt: skip
    return found


def _first_the_large_member(program: Program) -> tuple[bool, bool, str]:
    """Alone, at the T that is served: on it the rule is calibrated."""
    return program.mode != "full-cloud", program.legs[0].steps_total != STEPS, str(program)


def _levels(rows: pl.DataFrame, steps: int, rules: Mapping[str, Rule]) -> list[Cell]:
    """For each K: all pairs, and those that a rule lets skip so much."""
    import polars as pl

    found = []
    for share, of in shares_of(rows, steps).items():
        cell: Cell = {"share": share, "skipped": int(of["start_skipped"][0]), "all": _cell(of)}
        for name, rule in rules.items():
            least = next((s for s, k in rule.steps if k == share), None)
            hits = of.filter(pl.col("start_similarity") >= least) if least is not None else of.clear()
            cell[name] = {"threshold": least} | _cell(hits)
        found.append(cell)
    return found


def _bins(rows: pl.DataFrame, steps: int) -> list[Cell]:
    import polars as pl

    return [
        {"from": low, "to": high, "shares": {
            str(share): _cell(of.filter((pl.col("start_similarity") >= low) & (pl.col("start_similarity") < high)))
            for share, of in shares_of(rows, steps).items()
        }}
        for low, high in pairwise(BINS)
    ]  # fmt: skip


def _cell(rows: pl.DataFrame) -> Cell:
    """Means over pairs: relative quality with its paired interval, and what of the source is drawn."""
    if rows.is_empty():
        return {"pairs": 0}
    own, base = rows["score_attributes"].to_numpy(), rows["base"].to_numpy()
    source, chance = rows["score_source_attributes"].to_numpy(), rows["base_source"].to_numpy()
    draws = np.random.default_rng(0).integers(len(own), size=(2000, len(own)))
    low, high = np.quantile(own[draws].mean(1) / np.maximum(base[draws].mean(1), 1e-9), [0.025, 0.975])
    return {
        "pairs": len(own), "quality": float(own.mean() / max(base.mean(), 1e-9)), "low": float(low), "high": float(high),
        "score": float(own.mean()), "base": float(base.mean()), "strict": float(rows["score_strict"].to_numpy().mean()),
        "leak": list(interval((source - chance).tolist())), "taken_over": float(taken_over(rows).mean()),
    }  # fmt: skip


def _tables(name: str, found: Cell) -> list[str]:
    first, *rest = found["programs"].items()
    rule = ", ".join(f"{least:g} -> {share:g} T" for least, share in found["rule"]) or "none"
    lines = [
        f"## {name}",
        "",
        f"Calibrated on {first[1]['validation_pairs']} validation pairs: {rule}."
        f" Computed in {found['dtype'] or 'the dtype of its family'}.",
        "",
    ]
    lines += _level_table(first[1], "the large member alone") + _bin_table(first[1])
    for _, program in rest:
        taken = " + ".join(f"{n} {member}" for member, n in program["steps"].items() if n)
        lines += _level_table(program, f"{program['mode']}, {taken} steps from noise")
    return lines


def _level_table(program: Cell, said: str) -> list[str]:
    lines = [
        f"### {said}, T = {program['steps_total']}: {program['pairs']} test pairs", "",
        "| K of 50 | K | paper | calibrated thresholds: similarity | hits | quality | source's objects | taken over |"
        " paper's thresholds: hits | quality | all pairs: quality | taken over |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | 0 | 100 % |  |  | 100 % |  |  |  | 100 % | 100 % |  |",
    ]  # fmt: skip
    for level in program["levels"]:
        own, paper, every = level["calibrated"], level["paper"], level["all"]
        least = "never" if own["threshold"] is None else f"≥ {own['threshold']:.3f}"
        cells = [
            f"{50 * level['share']:g}", level["skipped"], f"{PAPER[level['share']]:.1%}", least,
            _hits(own, program), _quality(own), _leak(own), _over(own), _hits(paper, program), _quality(paper),
            _quality(every), _over(every),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _bin_table(program: Cell) -> list[str]:
    shares = [share for share in SHARES if share]
    lines = [
        "Quality, and of the pictures that were taken over, by similarity and K of 50:", "",
        "| similarity | pairs | " + " | ".join(f"K = {50 * share:g}" for share in shares) + " |",
        "| --- | --- |" + " --- |" * len(shares),
    ]  # fmt: skip
    for each in program["bins"]:
        cells = [each["shares"].get(str(share), {"pairs": 0}) for share in shares]
        words = [f"{_quality(cell)}; {_over(cell)}" if cell["pairs"] else "" for cell in cells]
        label = f"{max(each['from'], -1):g} to {min(each['to'], 1):g}"
        lines.append(f"| {label} | {max(cell['pairs'] for cell in cells)} | " + " | ".join(words) + " |")
    return [*lines, ""]


def _hits(cell: Cell, program: Cell) -> str:
    return f"{cell['pairs']} of {program['pairs']}"


def _quality(cell: Cell) -> str:
    return f"{cell['quality']:.1%} [{cell['low']:.1%}, {cell['high']:.1%}]" if cell["pairs"] else ""


def _leak(cell: Cell) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*cell["leak"]) if cell["pairs"] else ""


def _over(cell: Cell) -> str:
    return f"{cell['taken_over']:.0%}" if cell["pairs"] else ""


def write_rules(folder: Path, data: Mapping[str, Cell]) -> None:
    """FAMILY.yaml for each family: what nodes read (scheduler.load.similarity)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in data.items():
        pairs: Sequence[tuple[float, float]] = found["rule"]
        body = ", ".join(f"[{least:g}, {share:g}]" for least, share in pairs)
        count = next(iter(found["programs"].values()))["validation_pairs"]
        head = (
            f"# Least similarity of two prompts, and the share of T that may then be skipped: {count} validation pairs in\n"
            f"# {found['dtype']}, `python -m experiments.cached_starts report`; what it is worth on test pairs:"
            " docs/results/cache-levels.md\n"
        )
        write_atomically(folder / f"{name}.yaml", f"{head}steps: [{body}]\n")
