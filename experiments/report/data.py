"""What a report shows, from the rows of its runs: groups of programs that may be compared, with all their figures.

A group is one run x family x workload x T. Within it every program drew the same prompts, and full-cloud and edge-only
of that T are what a relay is measured by. Intervals are over prompts: seeds of one prompt are averaged first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from experiments.report.labels import program_labels, score_name, slug
from experiments.run_folder import Run
from experiments.statistics import gap_closed, interval
from relay.errors import BadRequest
from relay.program import Program
from scheduler.outcomes import SCORE, image_path

if TYPE_CHECKING:
    from PIL.Image import Image

STAGES = ("encode_s", "large_s", "handoff_s", "transfer_s", "small_s", "decode_s", "return_s")
MAIN_SCORES = ("score_attributes", "score_clip_score")  # the first that a run has is what it is ranked by
LATENCY = "latency, batch 1"
NO_LINK = "none"
HARD = "4"  # the complexity class that stands for a hard prompt: four objects

Interval = tuple[float, float, float]  # mean, low, high


@dataclass
class Entry:
    """One program or one setting of a baseline, in one group."""

    method: str
    program: str
    mode: str
    label: str
    parsed: Program | None
    handoff: int | None
    small_steps: int | None
    latent_bytes: int | None
    codec_error: float | None  # of the latent on the wire, relative, mean over prompts; None where it was not stored
    score: Interval
    scores: dict[str, float]  # means of every metric
    values: dict[str, float]  # prompt -> score, seeds averaged
    by_class: dict[str, Interval]
    images: dict[str, tuple[str, float]]  # prompt -> image of the first seed, and that image's score
    deviation: tuple[float, float] | None  # mean and largest, means over the watched prompts
    intensity: tuple[np.ndarray, np.ndarray] | None  # relay and reference, (watched prompts, steps)
    prefix: np.ndarray | None  # intensity up to the handoff, (watched prompts, s); None in runs that did not store it
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # link -> median seconds of each stage
    ratio: float | None = None  # to the large member's score
    gap: Interval | None = None  # share closed on four objects, or on all prompts where there is no such class
    gaps: dict[str, Interval | None] = field(default_factory=dict)
    latency: float | None = None  # median seconds end to end over the group's main link
    speedup: float | None = None  # against full-cloud, the same
    on_front: bool = False

    @property
    def seconds(self) -> float:
        """Its latency, where it has one."""
        return self.latency or 0.0

    @property
    def is_relay(self) -> bool:
        return self.mode == "relay"

    @property
    def is_cached_relay(self) -> bool:
        """A relay combined with a cache, which stands among the baselines."""
        return self.method.startswith("relay+")

    def less(self, other: Entry) -> Interval:
        """Its score less another's, paired over the prompts that both have, with the 95 % interval."""
        return interval(
            [self.values[prompt] - other.values[prompt] for prompt in other.values if prompt in self.values]
        )


@dataclass
class Group:
    shards: list[Run]  # of one run; the one with times first
    family: str  # as rows name it
    source: str  # as the config names it: a name or the path of a YAML
    workload: str
    split: str
    steps_total: int
    label: str
    score: str  # column of the main score
    classes: list[str]
    prompts: dict[str, str]  # text -> complexity class, in the workload's order
    seeds: int
    entries: list[Entry]
    links: list[str]
    link: str  # the main one

    @property
    def run(self) -> Run:
        return self.shards[0]

    def image(self, digest: str) -> Image | None:
        """A stored picture, from whichever shard has it; None where its file is gone."""
        for shard in self.shards:
            if image_path(shard.folder, digest).exists():
                return shard.image(digest)
        return None

    @property
    def slug(self) -> str:
        return slug(self.label)

    @cached_property
    def large(self) -> Entry | None:
        return next((e for e in self.entries if e.mode == "full-cloud"), None)

    @cached_property
    def small(self) -> Entry | None:
        return next((e for e in self.entries if e.mode == "edge-only"), None)

    @cached_property
    def main_line(self) -> list[Entry]:
        """One relay for each handoff step, the first of the config: what charts over s show; by s."""
        found: dict[int, Entry] = {}
        for entry in self.entries:
            if entry.is_relay and entry.handoff is not None:
                found.setdefault(entry.handoff, entry)
        return [found[s] for s in sorted(found)]

    @property
    def walk(self) -> list[Entry]:
        """Small alone, the main line, large alone: everything over s from 0 to T."""
        return [e for e in (self.small, *self.main_line, self.large) if e]

    @property
    def score_name(self) -> str:
        return score_name(self.score)

    @property
    def timed(self) -> list[Entry]:
        return [e for e in self.entries if e.latency is not None]

    def place(self, entry: Entry) -> int:
        """s of a program: 0 for the small member alone, T for the large one."""
        return {"edge-only": 0, "full-cloud": self.steps_total}.get(entry.mode, entry.handoff or 0)


def read_groups(runs: Sequence[Run]) -> list[Group]:
    """All groups of these runs; BadRequest where there is nothing to report."""
    several: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        several.setdefault((run.config_hash, run.dtype), []).append(run)
    groups = [g for shards in several.values() for g in _groups_of(shards)]
    if not groups:
        raise BadRequest(
            f"{', '.join(str(r.folder) for r in runs)}: no quality rows yet; `relay-experiment run` goes on"
        )
    parts = [[g.run.config["name"], g.family, g.workload, g.split, f"T = {g.steps_total}"] for g in groups]
    varies = [len({p[i] for p in parts}) > 1 for i in range(5)]
    varies[1] = True
    if varies[4] and len({g.family for g in groups}) == len(groups):
        varies[4] = False  # each family has its own T: its name says enough
    labels = [" · ".join(word for word, shown in zip(said, varies, strict=True) if shown) for said in parts]
    for group, label in zip(groups, labels, strict=True):
        # two runs of one name are told apart by their configs, and by what they were computed in
        told = " ".join(filter(None, (group.run.config_hash, group.run.dtype)))
        group.label = label if labels.count(label) == 1 else f"{label} · {told}"
    return groups


def _groups_of(shards: list[Run]) -> list[Group]:
    shards = sorted(shards, key=lambda run: run.times.is_empty())
    outcomes = pl.concat([run.outcomes for run in shards], how="diagonal")
    outcomes = outcomes.filter(pl.col("start_skipped").fill_null(0) == 0)  # cached starts are another question
    outcomes = outcomes.unique(["family", "program", "workload", "split", "prompt", "seed"], maintain_order=True)
    times = pl.concat([run.times for run in shards], how="diagonal").filter(pl.col("measure") == LATENCY)
    run = shards[0]
    score = main_score(outcomes)
    order = [text for texts in run.facts.get("programs", {}).values() for text in texts]
    sources = {t.split("/")[0]: key for key, texts in run.facts.get("programs", {}).items() for t in texts}
    groups = []
    if score is None:
        return []
    for (family, workload, split), rows in outcomes.group_by(["family", "workload", "split"], maintain_order=True):
        programs = rows.filter(pl.col("method") == "program")
        ranked = sorted(programs["program"].unique(), key=lambda t: (order.index(t) if t in order else len(order), t))
        for total in sorted(programs["steps_total"].drop_nulls().unique()):
            some = rows.filter(pl.col("steps_total") == total)
            group = _group(shards, (str(family), str(workload), str(split)), int(total), some, score, ranked)
            group.source = sources.get(group.family, group.family)
            _add_times(group, times.filter(pl.col("family") == family))
            _add_figures(group)
            groups.append(group)
    return groups


def main_score(outcomes: pl.DataFrame) -> str | None:
    """The column that a report ranks by: one of MAIN_SCORES, else the first score there is."""
    scores = [c for c in outcomes.columns if c.startswith(SCORE) and outcomes[c].drop_nulls().len()]
    return next((score for score in (*MAIN_SCORES, *scores) if score in scores), None)


def _group(
    shards: list[Run], key: tuple[str, str, str], total: int, rows: pl.DataFrame, score: str, ranked: list[str]
) -> Group:
    family, workload, split = key
    columns = rows.select("prompt", "complexity", "prompt_index").sort("prompt_index", "prompt")
    prompts = {text: cls or "" for text, cls, _ in columns.iter_rows()}
    classes = sorted({cls for cls in prompts.values() if cls})
    frames = {str(key[0]): frame for key, frame in rows.group_by(["program"], maintain_order=True)}
    names = [t for t in ranked if t in frames] + sorted((t for t in frames if t not in ranked), key=_natural)
    parsed = {text: _parse(text) for text in names}
    labels = program_labels([p for p in parsed.values() if p])
    entries = [
        _entry(frames[text], text, parsed[text], labels.get(text, text.replace("[", " (").replace("]", ")")), score)
        for text in names
    ]
    seeds = max(rows["seed"].n_unique() // len(prompts), 1)
    ordered = sorted(filter(None, entries), key=_rank)
    return Group(
        shards, family, family, workload, split, total, "", score, classes, prompts, seeds, ordered, [], NO_LINK
    )


def _natural(text: str) -> list[tuple[int, str]]:
    """`fewer-steps[5 of 28]` before `fewer-steps[10 of 28]`."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _rank(entry: Entry) -> tuple[int, int, int]:
    """Large and small alone, then relays by s and by falling n, then the rest; stable, so the config's order holds beyond."""
    kinds = ("full-cloud", "edge-only", "relay", "other")
    kind = kinds.index(entry.mode) if entry.mode in kinds else len(kinds)
    return kind, entry.handoff or 0, 0 if entry.parsed is None else -(entry.small_steps or 0)


def _entry(rows: pl.DataFrame, text: str, parsed: Program | None, label: str, score: str) -> Entry | None:
    scored = rows.drop_nulls(score).filter(pl.col(score).is_not_nan())
    if scored.is_empty():
        return None
    by_prompt = scored.group_by("prompt").agg(pl.col(score).mean(), pl.col("complexity").first()).sort("prompt")
    one = rows.row(0, named=True)
    first = scored.sort("seed").unique("prompt", keep="first", maintain_order=True)
    watched = rows.drop_nulls("deviation_mean")
    errors = (
        rows["codec_error"].drop_nulls() if "codec_error" in rows.columns else pl.Series([])
    )  # an older run has none
    return Entry(
        method=one["method"], program=text, mode=one["mode"] or "", label=label, parsed=parsed,
        handoff=one["handoff"], small_steps=one["small_steps"], latent_bytes=one["latent_bytes"],
        codec_error=_mean(errors) if len(errors) else None,
        score=interval(by_prompt[score].to_list()),
        scores={c: float(m) for c in rows.columns if c.startswith(SCORE)
                if isinstance(m := rows[c].drop_nulls().drop_nans().mean(), float)},
        values=dict(by_prompt.select("prompt", score).iter_rows()),
        by_class={str(cls[0]): interval(part[score].to_list()) for cls, part in by_prompt.group_by(["complexity"]) if cls[0]},
        images={text: (digest, value) for text, digest, value in first.select("prompt", "image", score).iter_rows() if digest},
        deviation=(_mean(watched["deviation_mean"]), _mean(watched["deviation_max"])) if watched.height else None,
        intensity=None if (relay := _trace(rows, "intensity")) is None or (large := _trace(rows, "intensity_reference")) is None
        else (relay, large),
        prefix=_trace(rows, "intensity_prefix"),
    )  # fmt: skip


def _trace(rows: pl.DataFrame, column: str) -> np.ndarray | None:
    """Intensities of the watched prompts, (prompts, steps); None where none was watched."""
    kept = rows[column].drop_nulls().to_list() if column in rows.columns else []  # an older run has no prefixes
    return np.array(kept, dtype=float) if kept else None


def _add_times(group: Group, times: pl.DataFrame) -> None:
    """Median seconds of every stage, per link."""
    order = [
        Path(e).stem if isinstance(e, str) else e.get("name", e.get("like", ""))
        for e in group.run.config.get("links", [])
    ]
    found_links = [link for link in dict.fromkeys(times["link"]) if link != NO_LINK] or [NO_LINK][: times.height]
    names = {link: link.partition(":")[0] for link in found_links}
    group.links = sorted(found_links, key=lambda link: order.index(names[link]) if names[link] in order else len(order))
    group.link = group.links[0] if group.links else NO_LINK
    columns = [*STAGES, "end_to_end_s"]
    medians = times.group_by("program", "link").agg(pl.col(c).median() for c in columns)
    found = {(row["program"], row["link"]): row for row in medians.iter_rows(named=True)}
    for entry in group.entries:
        for link in (NO_LINK, *group.links):
            if row := found.get((entry.program, link)):
                entry.stages[link] = {c: row[c] or 0.0 for c in columns}
        if group.link in entry.stages:
            entry.latency = entry.stages[group.link]["end_to_end_s"]


def _add_figures(group: Group) -> None:
    large, small = group.large, group.small
    for entry in group.entries:
        if large:
            entry.ratio = entry.score[0] / large.score[0] if large.score[0] else None
            if entry.latency and large.latency:
                entry.speedup = large.latency / entry.latency
        if large and small and entry not in (large, small):
            entry.gaps = {cls: _gap(entry, small, large, group, cls) for cls in (*group.classes, "all")}
            entry.gap = entry.gaps[HARD if HARD in group.classes else "all"]
    for entry in front([e for e in group.entries if e.latency is not None]):
        entry.on_front = True


def _gap(entry: Entry, small: Entry, large: Entry, group: Group, cls: str) -> Interval | None:
    paired = [
        text for text, own in group.prompts.items()
        if cls in ("all", own) and all(text in e.values for e in (entry, small, large))
    ]  # fmt: skip
    return gap_closed(*([e.values[text] for text in paired] for e in (entry, small, large))) if paired else None


def front(entries: Iterable[Entry]) -> list[Entry]:
    """Those that none other beats in both time and score, fastest first."""
    best, found = float("-inf"), []
    for entry in sorted(entries, key=lambda e: (e.latency, -e.score[0])):
        if entry.score[0] > best:
            best = entry.score[0]
            found.append(entry)
    return found


def _parse(text: str) -> Program | None:
    try:
        return Program.parse(text)
    except BadRequest:
        return None  # a baseline: NAME[SETTING]


def _mean(column: pl.Series) -> float:
    return float(column.drop_nulls().mean())  # type: ignore[arg-type]
