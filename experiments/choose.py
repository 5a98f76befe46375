"""Which setting of each baseline a test run reports: chosen from a run of all of them, on prompts of no test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from experiments.baselines.points import label_of
from experiments.provenance import provenance
from experiments.report.data import main_score
from experiments.timing import LATENCY
from relay.errors import BadRequest
from relay.files import write_atomically
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    from experiments.run_folder import Run


@dataclass(frozen=True)
class Choice:
    baseline: str
    label: str
    steps: int  # T
    score: float
    speedup: float  # of full-cloud's denoising time at batch 1
    fast_enough: bool = True  # of what was asked; else it is the baseline's fastest


def choose(run: Run, speedups: Sequence[float], score: str | None = None) -> dict[str, list[Choice]]:
    """Family -> for each of `speedups` one setting a baseline, named once: of those at least so many times as fast as
    full-cloud the best, else the fastest."""
    rows = run.outcomes
    if "test" in rows["split"].unique():
        raise BadRequest(f"{run.folder} holds rows of the test split: settings are chosen on validation prompts")
    column = f"{SCORE}{score}" if score else main_score(rows)
    if column is None or column not in rows.columns:
        raise BadRequest(f"{run.folder} has no score {score or ''}".rstrip())
    seconds = _denoising(run)
    settings = rows.filter(mode="baseline").group_by("family", "method", "program", "steps_total", maintain_order=True)
    candidates: dict[tuple[str, str], list[Choice]] = {}
    for family, method, text, total, mean in settings.agg(pl.col(column).mean()).iter_rows():
        full = _full_cloud(rows, family, total)
        if (family, text) not in seconds or (family, full) not in seconds:
            raise BadRequest(f"{run.folder} has not timed {text} of {family}: let the run finish")
        fast = seconds[family, full] / seconds[family, text]
        label = label_of(method, text, total)
        candidates.setdefault((family, method), []).append(Choice(method, label, total, mean, fast))
    if not candidates:
        raise BadRequest(f"{run.folder} holds no baselines: nothing to choose from")
    found: dict[str, list[Choice]] = {}
    for (family, method), some in sorted(candidates.items()):
        if len({choice.steps for choice in some}) > 1:
            raise BadRequest(f"{run.folder} has {method} at several T: choose from a run of one T")
        once: dict[str, Choice] = {}
        for speedup in sorted(speedups):
            best = _best(some, speedup)
            once.setdefault(best.label, best)
        found.setdefault(family, []).extend(once.values())
    return found


def _best(some: Sequence[Choice], speedup: float) -> Choice:
    fitting = [choice for choice in some if choice.speedup >= speedup]
    if fitting:
        return max(fitting, key=lambda c: c.score)
    return replace(max(some, key=lambda c: c.speedup), fast_enough=False)


def _full_cloud(rows: pl.DataFrame, family: str, total: int) -> str:
    full = rows.filter(family=family, mode="full-cloud", steps_total=total)["program"]
    if full.is_empty():
        raise BadRequest(
            f"no row of full-cloud of {family} at T = {total}: that is what a baseline's speed is held against"
        )
    return str(full[0])


def _denoising(run: Run) -> dict[tuple[str, str], float]:
    """Median seconds of both members' steps at batch 1; (family, program) ->."""
    times = run.times.filter(measure=LATENCY, link="none")
    if times.is_empty():
        raise BadRequest(f"{run.folder} has no times: `relay-experiment run` takes them where `times` is not null")
    both = times.with_columns(pl.col("large_s") + pl.col("small_s").fill_null(0.0))
    medians = both.group_by("family", "program").agg(pl.col("large_s").median())
    return {(family, text): seconds for family, text, seconds in medians.iter_rows()}


def write_chosen(run: Run, chosen: dict[str, list[Choice]], speedups: Sequence[float], out: Path) -> str:
    """Write what `experiments.baselines.chosen` reads, with where it comes from; the text."""
    made, own, rows = provenance(), run.facts["provenance"], run.outcomes
    asked = " and at ".join(f"{speedup:g}x" for speedup in sorted(speedups))
    split, count = ", ".join(rows["split"].unique()), rows["prompt"].n_unique()
    lines = [
        f"# Of each baseline the setting with the best score at {asked} full-cloud's denoising speed or more, else the fastest.",
        f"# {made['command']}, commit {made['commit']}, {made['date']}",
        f"# from {run.config['name']} ({run.config_hash}): {count} {split} prompts, {run.dtype or 'dtype not told'}, commit"
        f" {own['commit']}, {own['date']}, {own['processor']};",
        "# beside each: score, speedup at batch 1 (programs and settings interleaved)",
    ]
    for family, choices in chosen.items():
        lines += [f"{family}:", f"  steps: {choices[0].steps}", "  settings:"]
        for baseline, listed in groupby(choices, key=lambda c: c.baseline):
            told = [f"{json.dumps(c.label)}  # {c.score:.3f}, {c.speedup:.2f}x" + ("" if c.fast_enough else ": its fastest")
                    for c in listed]  # fmt: skip
            if len(told) == 1:
                lines.append(f"    {baseline}: {told[0]}")
            else:
                lines += [f"    {baseline}:", *(f"      - {each}" for each in told)]
    text = "\n".join(lines) + "\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)
    return text
