"""The report's sections: what each shows, or the one line that says why it is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from experiments.report import figures, tables
from experiments.report.charts import Chart, seconds_text
from experiments.report.data import NO_LINK, Entry, Group
from experiments.report.front import pareto
from experiments.report.labels import short_link
from experiments.report.pictures import Grid, picture_grid
from experiments.report.sensitivity import KEEPS, NoMap, network_map


@dataclass
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    text_columns: int = 1  # from the left; the rest are figures, set to the right
    marked: list[bool] = field(default_factory=list)  # rows that stand out
    note: str = ""
    folded: bool = False


@dataclass
class Answer:
    """A card at the top: what a reader wants first."""

    title: str
    figure: str
    words: str


@dataclass
class Section:
    id: str
    title: str
    lead: str = ""
    answers: list[Answer] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    body: str = ""  # HTML that stands before all else
    missing: str = ""  # why it is left out


def all_sections(groups: list[Group]) -> list[Section]:
    makers: list[Callable[[list[Group]], Section]] = [
        _short, _front, _pictures, _intensity, _classes, _stages, _networks, _codecs, _expected, _baselines,
    ]  # fmt: skip
    return [make(groups) for make in makers]


def _short(groups: list[Group]) -> Section:
    section = Section("short", "In short")
    section.answers = [answer for group in groups for answer in _answers(group)]
    for group in groups:
        timed = bool(group.timed)
        head = ["program", group.score_name, "of large", f"gap closed, {tables.gap_name(group)}"]
        head += [f"latency, batch 1; {short_link(group.link)}", "speedup"] if timed else []
        rows = []
        for e in group.entries:
            row = [
                e.label,
                _score_text(e),
                _number(e.ratio),
                _gap_text(e, group),
            ]
            rows.append(row + ([_seconds(e.latency), _number(e.speedup, "{:.2f}x")] if timed else []))
        section.tables.append(
            Table(group.label, head, rows, marked=[e.on_front for e in group.entries],
                  note=f"{_asked(group)}. {f'Link: {group.link}.' if group.link != NO_LINK else ''}")
        )  # fmt: skip
        if len(group.entries[0].scores) > 1:
            names = sorted({name for e in group.entries for name in e.scores})
            section.tables.append(
                Table(f"{group.label}: every metric", ["program", *(n.removeprefix("score_") for n in names)],
                      [[e.label, *(_number(e.scores.get(n)) for n in names)] for e in group.entries], folded=True)
            )  # fmt: skip
    section.notes = [
        "± is half the width of the 95 % bootstrap interval over prompts. “Gap closed” is (relay − small) / (large − small),"
        " with its interval: the honest companion of a share of the large member's score. It is left open where the gap"
        " itself is not clear of zero.",
    ]
    if any(g.timed for g in groups):
        section.notes[0] += " Rows marked ● lie on the front: nothing measured here is both faster and better."
    return section


def _answers(group: Group) -> list[Answer]:
    """What the fastest relay is that keeps so much of the large member's score."""
    large = group.large
    relays = [e for e in group.entries if e.is_relay and e.ratio is not None]
    if not large or not relays:
        return []
    if not group.timed:
        best = max(relays, key=lambda e: e.ratio or 0)
        return [
            Answer(group.label, f"{best.ratio:.0%}", f"of the large member's score at {best.label}, the best relay")
        ]
    found = []
    for share in (0.98, KEEPS):
        keeping = [e for e in relays if (e.ratio or 0) >= share and e.speedup is not None]
        if keeping:
            best = max(keeping, key=lambda e: e.speedup or 0)
            gap = f", closes {best.gap[0]:.0%} of the gap on {tables.gap_name(group)}" if best.gap else ""
            found.append(
                Answer(group.label, f"{best.speedup:.2f}×", f"as fast as large alone, keeping {best.ratio:.3f} of its score"
                       f" (asked: {share}); {best.label}{gap}")
            )  # fmt: skip
        else:
            best = max(relays, key=lambda e: e.ratio or 0)
            found.append(
                Answer(group.label, _number(best.ratio), f"is the most that a relay keeps of large's score (asked: {share});"
                       f" {best.label}, {_number(best.speedup, '{:.2f}')} times as fast")
            )  # fmt: skip
    for answer in found:  # a line does not break inside "s = 9"
        answer.words = answer.words.replace(" = ", "\u00a0=\u00a0")
    return found if len({a.words.split("; ")[-1] for a in found}) > 1 else found[-1:]


def _asked(group: Group) -> str:
    seeds = f" × {group.seeds} seeds" if group.seeds > 1 else ""
    return f"{len(group.prompts)} {group.split} prompts of {group.workload}{seeds}, T = {group.steps_total}"


def _front(groups: list[Group]) -> Section:
    section = Section(
        "front", "Quality against time", "Each mark is a program; the line joins those that no other beats in both. "
        "Bars are 95 % intervals over prompts. The star is what RISE reports for its own models, set on this family's axes.",
    )  # fmt: skip
    section.charts = [pareto(g) for g in groups if len(g.timed) > 1]
    if any(e.method != "program" for g in groups for e in g.timed):
        section.notes.append(
            "Hollow marks are baselines. Over a link each pays for what it sends: the picture's way back where it ends on the"
            " large member, the latent where it changes members."
        )
    return _or_missing(section, "no times in this run (`times: null`, or its first shard is not here)")


def _pictures(groups: list[Group]) -> Section:
    section = Section(
        "pictures", "Pictures", "The first prompts of each class, through every s; under each picture its own score.",
        grids=[grid for g in groups if (grid := picture_grid(g))],
    )  # fmt: skip
    return _or_missing(section, "the run's folder holds no pictures")


def _intensity(groups: list[Group]) -> Section:
    watched = [g for g in groups if any(e.intensity is not None for e in g.main_line)]
    section = Section(
        "intensity", "Latent intensity", "Does a handoff push the latent off its way? Intensity is the mean absolute latent:"
        " dark over the large member's steps; from the marked handoff on, colour with the small member, grey with the large one"
        " going on from the same latent over the same sigmas.",
        charts=[chart for g in watched for chart in figures.intensity(g)],
    )  # fmt: skip
    for g in watched:
        rows = [[e.label, f"{e.deviation[0]:.2%}", f"{e.deviation[1]:.2%}"] for e in g.entries if e.deviation]
        section.tables.append(
            Table(f"{g.label}: deviation", ["program", "mean", "largest step"], rows, folded=len(watched) > 1,
                  note="Means over the watched prompts of each one's own mean and largest deviation.")
        )  # fmt: skip
    return _or_missing(section, "no latents were watched in this run (`deviation: 0`)")


def _classes(groups: list[Group]) -> Section:
    fitting = [g for g in groups if len(g.classes) > 1 and g.main_line]
    section = Section(
        "classes", "By prompt complexity", "Quality over s, a line a class, with 95 % intervals; beside it the share of the gap"
        " that a relay closes, where small and large differ clearly.",
        charts=[chart for g in fitting for chart in figures.by_class(g)],
    )  # fmt: skip
    return _or_missing(section, "fewer than two complexity classes, or no relay, in this run")


def _stages(groups: list[Group]) -> Section:
    section = Section(
        "stages", "Where the time goes", "Median seconds of each stage at batch 1; hatched: the network. Transfer and return are"
        " computed from the bytes sent and the link, not sent on a socket.",
        charts=[figures.stages(g, link) for g in _once_a_family(groups) for link in g.links if g.walk[0].stages.get(link)],
    )  # fmt: skip
    return _or_missing(section, "no times in this run")


def _networks(groups: list[Group]) -> Section:
    section = Section(
        "networks", "The best s per network", f"For each bandwidth and delay the fastest measured program that keeps {KEEPS} of"
        " the large member's score: steps large + small, and its speed against large alone on that network.",
    )  # fmt: skip
    why = "no times in this run"
    for group in groups:
        if not group.timed:
            continue
        try:
            section.charts.append(network_map(group))
        except NoMap as reason:
            why = str(reason)
            section.notes.append(f"{group.label}: {reason}.")
    return _or_missing(section, why)


def _codecs(groups: list[Group]) -> Section:
    section = Section(
        "codecs", "Codecs", "What fewer bytes on the wire cost: one relay in every codec. The latent's error is what the wire"
        " did to it, |sent − latent| / |latent|; picture and score are set against the finest codec, the score's difference"
        " paired by prompt, with its 95 % interval.",
    )  # fmt: skip
    for group in groups:
        if rows := tables.codec_rows(group):
            section.charts += figures.codec_charts(group, rows)
            texts = [
                [r["codec"], str(r["bytes"]), _number(r["latent_error"], "{:.2e}"), f"{r['picture_error']:.5f}",
                 f"{r['difference']:+.4f} [{r['difference_low']:+.4f}, {r['difference_high']:+.4f}]"]
                for r in rows
            ]  # fmt: skip
            head = [
                "codec",
                "bytes a latent",
                "latent error, relative",
                "picture error, RMS",
                f"{group.score_name}, difference",
            ]
            section.tables.append(Table(f"{group.label}, {rows[0]['steps']}", head, texts))
    return _or_missing(section, "no relay was drawn with more than one codec")


def _expected(groups: list[Group]) -> Section:
    rows = tables.expected_rows(groups)
    texts = [[r["claim"], r["source"], str(r["value"]), r["measured"] or "not measured here", r["group"]] for r in rows]
    section = Section(
        "expected", "Expected against measured",
        "What was claimed elsewhere, on other models and other machines, beside this run.",
    )  # fmt: skip
    if texts:
        section.tables = [Table("", ["claim", "source", "expected", "measured", "on"], texts, text_columns=5)]
    return _or_missing(section, "the config names no expectations (`expected`)")


def _baselines(groups: list[Group]) -> Section:
    families, verdicts = tables.baseline_rows(groups)
    section = Section(
        "baselines",
        "Baselines",
        "Other ways to spend less of the large member, in the same run; why one does not apply.",
    )
    if verdicts:
        section.tables = [
            Table("", ["baseline", *families], [[name, *said] for name, said in verdicts], text_columns=9)
        ]
    for g in groups:
        found = [e for e in g.entries if e.method != "program"]
        if found:
            rows = [[e.label, _score_text(e), _number(e.ratio), _seconds(e.latency), _number(e.speedup, "{:.2f}x"),
                     *_at_equal_time(e, g)] for e in found]  # fmt: skip
            head = ["baseline", g.score_name, "of large", "latency, batch 1", "speedup", "best relay in that time",
                    "relay less baseline"]  # fmt: skip
            section.tables.append(Table(g.label, head, rows))
    if len(section.tables) > 1:
        section.notes = [
            "“Relay less baseline” is the paired difference of their scores with its 95 % bootstrap interval over prompts. A"
            " relay combined with a cache counts as a relay, but where it is itself what is held against the relays.",
        ]
    return _or_missing(section, "no baselines in this run")


def _at_equal_time(entry: Entry, group: Group) -> tuple[str, str]:
    """The best relay that takes no longer, what a baseline is to be held against, and the paired difference of their scores.

    A relay combined with a cache is a relay too, unless it is what is held against the relays.
    """
    if entry.latency is None:
        return "", ""
    relays = [
        e for e in group.timed
        if (e.is_relay or (e.is_cached_relay and not entry.is_cached_relay)) and e.seconds <= entry.seconds
    ]  # fmt: skip
    best = max(relays, key=lambda e: e.score[0], default=None)
    if best is None:
        return "none is as fast", ""
    mean, low, high = best.less(entry)
    return f"{best.score[0]:.3f}: {best.label}", f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _or_missing(section: Section, why: str) -> Section:
    if not (section.charts or section.tables or section.grids):
        section.missing = f"Left out: {why}."
    return section


def _once_a_family(groups: list[Group]) -> list[Group]:
    """Times do not depend on the workload: the first group of each run, family and T."""
    found: dict[Any, Group] = {}
    for group in groups:
        if group.timed and group.walk:
            found.setdefault((group.run.config_hash, group.run.dtype, group.family, group.steps_total), group)
    return list(found.values())


def _score_text(entry: Entry) -> str:
    return f"{entry.score[0]:.3f} ± {(entry.score[2] - entry.score[1]) / 2:.3f}"


def _gap_text(entry: Entry, group: Group) -> str:
    if entry in (group.large, group.small):
        return ""
    return f"{entry.gap[0]:.2f} [{entry.gap[1]:.2f}, {entry.gap[2]:.2f}]" if entry.gap else "–"


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None else form.format(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else seconds_text(value)
