"""What programs draw, from the outcome store: scores per program x prompt x seed, and its prompts as a workload.

Only prompts that every program drew are kept, so that no policy is judged on what another could not choose. A score
that a row has not (letters where none were asked for) is missing, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.workloads.prompts import Prompt, check_ask, generator
from relay.errors import BadRequest
from relay.program import Program
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    import polars as pl

Cell = Mapping[str, float]  # score -> value, of one image
Means = dict[str, float]


@dataclass(frozen=True)
class Scores:
    """`cells[program text][prompt text]`: one a seed. `prompts`: split -> its prompts, in the store's order."""

    programs: tuple[Program, ...]
    prompts: Mapping[str, tuple[Prompt, ...]]
    cells: Mapping[str, Mapping[str, tuple[Cell, ...]]]
    metrics: tuple[str, ...]

    def cell(self, program: str, prompt: str, seed: int) -> Cell:
        """The scores of the image that this program draws of this prompt; `seed` chooses among those that were drawn."""
        several = self.cells[program][prompt]
        return several[seed % len(several)]

    def of(self, program: str, prompt: str) -> tuple[Cell, ...]:
        """One a seed."""
        return self.cells[program][prompt]

    def of_class(self, program: str, prompt: str) -> Cell:
        """Means over all prompts of this one's complexity."""
        return self._classes[program][self._class_of[prompt]]

    @cached_property
    def _class_of(self) -> dict[str, str]:
        return {prompt.text: prompt.complexity for several in self.prompts.values() for prompt in several}

    @cached_property
    def _classes(self) -> dict[str, dict[str, Means]]:
        """Program -> complexity -> mean scores."""
        found = {}
        for program, rows in self.cells.items():
            groups: dict[str, list[Cell]] = {}
            for prompt, several in rows.items():
                groups.setdefault(self._class_of[prompt], []).extend(several)
            found[program] = {name: mean_of(cells) for name, cells in groups.items()}
        return found


@dataclass(frozen=True)
class Stored:
    """The store's prompts as a workload; `classes`: only these complexities, each equally likely to be in a pool."""

    scores: Scores
    classes: tuple[str, ...] | None = None
    name: str = "stored"

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        check_ask(self.name, split, count)
        here = [p for p in self.scores.prompts.get(split, ()) if self.classes is None or p.complexity in self.classes]
        if count > len(here):
            said = f" of class {', '.join(self.classes)}" if self.classes else ""
            raise BadRequest(
                f"the outcome store has {len(here)} {split} prompts{said} that all programs drew, not {count}:"
                f" ask for fewer, or let its run go on"
            )
        order = generator(seed, f"pool of {split}").permutation(len(here))[:count]
        return [here[i] for i in sorted(order.tolist())]


def read_scores(
    folders: Path | Sequence[Path], metrics: Sequence[str] | None = None, programs: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
) -> Scores:  # fmt: skip
    """Scores of run folders, finished or not. `metrics` without `score_`; None: all of them."""
    import polars as pl

    from scheduler.outcomes import read_table

    rows = read_table(folders, "outcomes").filter(pl.col("method") == "program")
    if families is not None:
        rows = rows.filter(pl.col("family").is_in(list(families)))
    if programs is not None:
        rows = rows.filter(pl.col("program").is_in(list(programs)))
    if rows.is_empty():
        raise BadRequest(f"{folders} holds no rows of the programs asked for: draw them with `relay-experiment run`")
    return scores_of(rows, metrics)


def scores_of(rows: pl.DataFrame, metrics: Sequence[str] | None = None) -> Scores:
    """Scores out of rows as in `scheduler.outcomes.OUTCOME_SCHEMA`."""
    there = [c.removeprefix(SCORE) for c in rows.columns if c.startswith(SCORE)]
    wanted = list(metrics) if metrics is not None else there
    if lacking := [m for m in wanted if m not in there]:
        raise BadRequest(f"the outcome store has no score {', '.join(lacking)}; it has {', '.join(there)}")
    names = sorted(rows["program"].unique().to_list())
    columns = ["program", "prompt", "seed", "split", "complexity", "scene", "prompt_index"]
    drawn: dict[str, dict[str, list[tuple[int, Cell]]]] = {name: {} for name in names}
    said: dict[str, Prompt] = {}
    split_of: dict[str, str] = {}
    for row in rows.select(columns + [SCORE + m for m in wanted]).iter_rows(named=True):
        text = row["prompt"]
        cell = {m: v for m in wanted if (v := row[SCORE + m]) is not None and np.isfinite(v)}
        drawn[row["program"]].setdefault(text, []).append((row["seed"], cell))
        if text not in said:
            key = f"{row['split']}/{row['prompt_index']}"
            said[text] = Prompt(text, row["complexity"] or "?", row["scene"] or None, key)
            split_of[text] = row["split"]
    everywhere = [text for text in said if all(text in drawn[name] for name in names)]
    cells = {
        name: {text: tuple(cell for _, cell in sorted(drawn[name][text], key=lambda p: p[0])) for text in everywhere}
        for name in names
    }
    prompts: dict[str, list[Prompt]] = {}
    for text in everywhere:
        prompts.setdefault(split_of[text], []).append(said[text])
    return Scores(
        tuple(Program.parse(name) for name in names), {k: tuple(v) for k, v in prompts.items()}, cells, tuple(wanted)
    )


def mean_of(cells: Sequence[Cell]) -> Means:
    """Mean of each score over the seeds that have it."""
    names: dict[str, list[float]] = {}
    for cell in cells:
        for name, value in cell.items():
            names.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in names.items()}


def describe(scores: Scores) -> dict[str, Any]:
    """For a report: how many programs, prompts a split, seeds."""
    seeds = {len(cells) for rows in scores.cells.values() for cells in rows.values()}
    return {
        "programs": len(scores.programs), "prompts": {split: len(p) for split, p in sorted(scores.prompts.items())},
        "seeds": sorted(seeds),
    }  # fmt: skip
