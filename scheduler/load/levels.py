"""Levels: what a family's programs and cached starts are worth and cost, as measured, pruned to what is worth choosing.

The lattice is {steps skipped K} x {handoff step s} x {small steps n}, as far as the outcome store has rows of it; nothing
is filled in between. Per prompt class:

    quality   sum of the level's scores / sum of full-cloud's, over the same prompts and seeds of the same run
    cost      seconds of nodes' time an image, each member's step at the batch of its best throughput; latency at batch 1
    needs     least similarity of a cached prompt, for K > 0: only pairs at least so alike count, as nodes' rule has it

A level is kept in a class where no other is as good, as cheap and needs as little, and better in one of these. Full-cloud,
which everything is measured against, is always kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relay.errors import BadRequest
from relay.program import Program, drawn_alike
from scheduler.load.similarity import Rule, read_rule, skip_of
from scheduler.outcomes import read_table

if TYPE_CHECKING:
    import polars as pl

SHIPPED = tuple(Path(__file__).parents[2] / "docs" / "results" / name for name in ("rise", "cached-starts"))
ALL = "all"
LEAST_PROMPTS = 5  # of a class, below which its figure is not told
METRIC = "score_attributes"
KEYS = ["config_hash", "split", "workload", "prompt_index", "seed", "steps_total"]


@dataclass(frozen=True)
class Worth:
    """`quality` relative to full-cloud, with its 95 % interval over `prompts` (bootstrap). `front`: worth choosing."""

    quality: float
    low: float
    high: float
    prompts: int
    front: bool = False


@dataclass(frozen=True)
class Level:
    """One point of the lattice. `needs`: similarity that the rule asks of a cached start, None from noise. `classes`: by
    prompt class, and `all`. `busy_s`: by member, seconds of a node's time at its best batch; `latency_s`: alone."""

    program: Program
    skipped: int
    needs: float | None
    classes: Mapping[str, Worth]
    busy_s: Mapping[str, float]
    latency_s: float

    @property
    def cost_s(self) -> float:
        return sum(self.busy_s.values())

    @property
    def label(self) -> str:
        """K, s and n in a few characters."""
        steps = self.program.taken(self.skipped)
        begins = f"K = {self.skipped}, " if self.skipped else ""
        return f"{begins}{steps['large']} large + {steps['small']} small"


def lattice(
    family: str, folders: Sequence[Path] = SHIPPED, rule: Rule | None = None, split: str = "test"
) -> list[Level]:
    """All measured levels, the dearest first. BadRequest where the folders have no rows or no step times of the family."""
    import polars as pl

    rows = _rows(family, folders, split)
    curves = _curves(family, folders)
    rule = rule if rule is not None else read_rule(family)
    found = []
    for (text, skipped), of in rows.group_by(["program", "start_skipped"], maintain_order=True):
        program, skip = Program.parse(str(text)), int(skipped or 0)
        needs = least_similarity(rule, skip, program.legs[0].steps_total)
        if skip and needs is None:
            continue
        if needs is not None:
            of = of.filter(pl.col("start_similarity") >= needs)  # noqa: PLW2901
        if (classes := _classes(of)) and ALL in classes:
            found.append(Level(program, skip, needs, classes, *_costs(program, skip, curves)))
    full = [level for level in found if level.program.mode == "full-cloud" and not level.skipped]
    if not full:
        raise BadRequest(f"no run of {', '.join(map(str, folders))} has full-cloud rows of {family} on {split} prompts")
    return _marked(sorted(found, key=lambda level: -level.cost_s))


def _rows(family: str, folders: Sequence[Path], split: str) -> pl.DataFrame:
    """Quality rows of programs, each beside full-cloud's score of its prompt, seed and run: `full`."""
    import polars as pl

    frames = [frame for folder in folders if not (frame := read_table(folder, "outcomes")).is_empty()]
    if not frames:
        raise BadRequest(f"there are no outcome rows in {', '.join(map(str, folders))}: name a run folder with --run")
    rows = pl.concat(frames, how="diagonal").filter(
        (pl.col("family") == family) & (pl.col("split") == split) & (pl.col("method") == "program")
    )
    if not rows.is_empty():  # one T: a level of another would be measured against another full-cloud
        total = rows.filter(pl.col("mode") == "full-cloud")["steps_total"].mode().min()
        rows = rows.filter(pl.col("steps_total") == total)
    alike = {text: drawn_alike(text) for text in rows["program"].unique()}
    rows = rows.with_columns(pl.col("program").replace_strict(alike, return_dtype=pl.String) if alike else "program")
    if METRIC not in rows.columns or rows.is_empty():
        known = ", ".join(sorted({name for frame in frames for name in frame["family"].unique()}))
        raise BadRequest(f"no scene scores of {family} are in these runs; they have {known}")
    full = rows.filter((pl.col("mode") == "full-cloud") & pl.col("start_skipped").is_null())
    full = full.select(*KEYS, full=pl.col(METRIC)).unique(KEYS)
    beside = rows.join(full, on=KEYS, how="inner")
    return beside.filter(pl.col(METRIC).is_not_null() & pl.col(METRIC).is_not_nan())


def _curves(family: str, folders: Sequence[Path]) -> dict[str, dict[int, float]]:
    """member -> batch -> seconds a step, of the first run that measured it."""
    for folder in folders:
        own: dict[str, dict[int, float]] = {}
        for row in read_table(folder, "curves").iter_rows(named=True):
            if row["family"] == family:
                own.setdefault(row["member"], {})[int(row["batch"])] = float(row["step_s"])
        if own:
            return own
    raise BadRequest(f"no run of {', '.join(map(str, folders))} has step times of {family}")


def least_similarity(rule: Rule, skipped: int, total: int) -> float | None:
    """The least similarity at which so many steps may be skipped; None where never, or none are."""
    allowed = [least for least, share in rule.steps if skipped and skip_of(share, total) >= skipped]
    return min(allowed, default=None)


def _costs(program: Program, skipped: int, curves: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], float]:
    busy: dict[str, float] = {}
    latency = 0.0
    for member, steps in program.taken(skipped).items():
        if not steps:
            continue
        if member not in curves:
            raise BadRequest(f"no step times of member {member} were measured")
        curve = curves[member]
        busy[member] = steps * min(seconds / batch for batch, seconds in curve.items())
        latency += steps * curve[min(curve)]
    return busy, latency


def _classes(rows: pl.DataFrame) -> dict[str, Worth]:
    import polars as pl

    found = {}
    for name in [*sorted(rows["complexity"].unique()), ALL]:
        of = rows if name == ALL else rows.filter(pl.col("complexity") == name)
        if len(of) >= LEAST_PROMPTS:
            found[name] = _worth(of[METRIC].to_numpy(), of["full"].to_numpy())
    return found


def _worth(own: np.ndarray, full: np.ndarray) -> Worth:
    draws = np.random.default_rng(0).integers(len(own), size=(1000, len(own)))
    low, high = np.quantile(own[draws].mean(1) / np.maximum(full[draws].mean(1), 1e-9), [0.025, 0.975])
    return Worth(float(own.mean() / max(full.mean(), 1e-9)), float(low), float(high), len(own))


def _marked(levels: list[Level]) -> list[Level]:
    """With each class's front marked."""
    names = {name for level in levels for name in level.classes}
    fronts = {name: front([level for level in levels if name in level.classes], name) for name in names}
    return [
        replace(
            level,
            classes={
                name: replace(worth, front=any(level is each for each in fronts[name]))
                for name, worth in level.classes.items()
            },
        )
        for level in levels
    ]


def front(levels: Sequence[Level], name: str = ALL) -> list[Level]:
    """Those worth choosing in a class, the safest (best) first; see the module."""

    def ease(level: Level) -> tuple[float, float, float]:
        """Larger is better in each; from noise nothing is needed."""
        return level.classes[name].quality, -level.cost_s, 2.0 if level.needs is None else -level.needs

    def beaten(level: Level) -> bool:
        own = ease(level)
        return any(
            all(a >= b for a, b in zip(ease(other), own, strict=True)) and ease(other) != own for other in levels
        )

    def reference(level: Level) -> bool:
        return level.program.mode == "full-cloud" and not level.skipped

    kept = [level for level in levels if reference(level) or not beaten(level)]
    return sorted(kept, key=lambda level: (not reference(level), -level.classes[name].quality))
