"""Quality per prompt, mode and metric, out of the outcome store: what every router learns from and is judged on.

    data = load("runs/experiments/decisions", "mini-sd3")            # or metrics="scene"
    data.train.quality      (N, 3, M): prompts x (full-cloud, relay, edge-only) x metrics
    data.mu                 (3, M): means over the train prompts, RouteT2I's mu_i

A router to compare implements `PromptRouter`; whoever compares two modes only (RouteT2I: cloud = full-cloud, edge =
edge-only) takes `quality[:, FULL]` and `quality[:, EDGE]`. A prompt counts where every mode has drawn it, so a run that
is not finished can be read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from relay.errors import BadRequest
from scheduler.router.settings import EDGE, FULL, METRIC_SETS, MODES, RELAY, Reference, read_settings

if TYPE_CHECKING:
    import polars as pl

__all__ = ["EDGE", "FULL", "MODES", "RELAY", "PromptRouter", "RoutingData", "Split", "load"]

Floats = NDArray[np.float64]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Prompts of one split. `quality` (N, 3, M) in 0..1, nan where a metric does not apply to the prompt."""

    prompts: tuple[str, ...]
    scenes: tuple[str, ...]  # what the prompt asks for, canonically; empty for free text
    complexity: tuple[str, ...]
    quality: Floats

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> Split:
        """The given rows, in the given order."""
        rows = [int(i) for i in rows]
        prompts, scenes, complexity = (
            tuple(part[i] for i in rows) for part in (self.prompts, self.scenes, self.complexity)
        )
        return Split(prompts, scenes, complexity, self.quality[rows])

    def mean_quality(self) -> Floats:
        """(N, 3): the mean over the metrics that apply to each prompt; what the promise is about."""
        return np.nanmean(self.quality, axis=2)


@dataclass(frozen=True)
class RoutingData:
    """One family's quality by mode. `programs`: mode -> the program that stands for it."""

    family: str
    metric_set: str
    metrics: tuple[str, ...]
    programs: dict[str, str]
    train: Split
    validation: Split
    test: Split

    @cached_property
    def mu(self) -> Floats:
        """mu_i of each mode (3, M): the metric's mean over the train prompts that it applies to."""
        return np.nanmean(self.train.quality, axis=0)

    def gap(self, a: int = FULL, b: int = EDGE) -> Floats:
        """|mu_i(a) - mu_i(b)|, (M,)."""
        return np.abs(self.mu[a] - self.mu[b])

    @cached_property
    def digest(self) -> str:
        """16 hex digits over prompts and qualities of all splits: which data a router was trained on."""
        digest = blake2b(digest_size=8)
        for split in (self.train, self.validation, self.test):
            digest.update("\n".join(split.prompts).encode() + np.ascontiguousarray(split.quality).tobytes())
        return digest.hexdigest()

    def only(self, metrics: Sequence[str]) -> RoutingData:
        """The same prompts with some of the metrics, for instance those whose gap is outside noise."""
        columns = [self.metrics.index(metric) for metric in metrics]
        splits = {name: getattr(self, name) for name in SPLITS}
        fewer = {name: replace(split, quality=split.quality[:, :, columns]) for name, split in splits.items()}
        return replace(self, metrics=tuple(metrics), **fewer)


@runtime_checkable
class PromptRouter(Protocol):
    """What is compared, two-way: `score` says for each prompt how likely edge-only is the better one.

    It stands where PRS stands in the decision: the cloud gets the prompts with the lowest scores, those below alpha.
    A router whose scores are no PRS (of no meaning at 1/2) sets `capped` False, and alpha is then a plain quantile.
    """

    name: str
    capped: bool

    def fit(self, data: RoutingData, seed: int) -> None:
        """Learn from data.train; data.validation tunes; data.test is not looked at."""
        ...

    def score(self, split: Split) -> Floats:
        """(N,) in 0..1, from the prompts alone (an oracle may look at `quality`, and says so in its name)."""
        ...


def load(
    folders: str | Path | Iterable[str | Path],
    family: str,
    metrics: str = "clip",
    reference: Reference | None = None,
) -> RoutingData:
    """A family's data from run folders; BadRequest where there are no rows to learn from.

    `reference`: the relay that stands for the mode; default: configs/router.yaml's. Several seeds are averaged.
    """
    from scheduler.outcomes import read_table

    if metrics not in METRIC_SETS:
        raise BadRequest(f"unknown metric set {metrics!r}: choose one of {', '.join(METRIC_SETS)}")
    reference = reference or _reference_of(family)
    several = [folders] if isinstance(folders, str | Path) else list(folders)
    rows = read_table([Path(folder) for folder in several], "outcomes")
    where = ", ".join(map(str, several))
    columns = [f"score_{name}" for name in METRIC_SETS[metrics]]
    if lacking := [column for column in columns if column not in rows.columns]:
        raise BadRequest(
            f"{where} holds no scores {', '.join(lacking)}: run it with the metrics scene and clip_quality"
        )
    chosen = _by_mode(rows, family, reference)
    if any(frame.is_empty() for frame in chosen.values()):
        raise BadRequest(
            f"{where} holds no {' and no '.join(m for m, f in chosen.items() if f.is_empty())} rows of {family}"
            f" (relay: {reference.handoff} + {reference.small_steps or 'the rest of'} steps); run"
            " `relay-experiment run configs/experiments/decisions.yaml`"
        )
    programs = {mode: frame["program"][0] for mode, frame in chosen.items()}
    splits = {name: _split(chosen, name, columns) for name in SPLITS}
    return RoutingData(family, metrics, METRIC_SETS[metrics], programs, **splits)


def _reference_of(family: str) -> Reference:
    references = read_settings().references
    if family not in references:
        raise BadRequest(f"configs/router.yaml names no reference relay for {family}: add one under `references`")
    return references[family]


def _by_mode(rows: pl.DataFrame, family: str, reference: Reference) -> dict[str, pl.DataFrame]:
    """Each mode's rows of one program: the relay that is the reference, the longest schedule of the others."""
    import polars as pl

    rows = rows.filter(family=family, method="program")
    if "start_prompt" in rows.columns:
        rows = rows.filter(pl.col("start_prompt").is_null() | (pl.col("start_prompt") == ""))
    found = {}
    for mode in MODES:
        some = rows.filter(mode=mode)
        if mode == "relay":
            n = pl.col("small_steps")
            some = some.filter(handoff=reference.handoff).filter(n == (reference.small_steps or n.max()))
        some = some.filter(pl.col("steps_total") == pl.col("steps_total").max())
        found[mode] = some.filter(pl.col("program") == some["program"][0]) if len(some) else some
    return found


def _split(chosen: dict[str, pl.DataFrame], name: str, columns: list[str]) -> Split:
    """The prompts of a split that every mode has drawn, in the run's order."""
    import polars as pl

    keys = ["prompt_index", "prompt", "scene", "complexity"]
    tables = {
        mode: frame.filter(split=name).group_by(keys).agg(pl.col(columns).mean()).sort("prompt_index", "prompt")
        for mode, frame in chosen.items()
    }
    shared = tables[MODES[0]].select(keys)
    for mode in MODES[1:]:
        shared = shared.join(tables[mode].select(keys), on=keys, how="semi")
    shared = shared.sort("prompt_index", "prompt")
    stacked = [shared.join(tables[mode], on=keys, how="left", maintain_order="left") for mode in MODES]
    quality = np.stack([frame.select(columns).to_numpy() for frame in stacked], axis=1).astype(np.float64)
    return Split(tuple(shared["prompt"]), tuple(shared["scene"]), tuple(shared["complexity"]), quality)
