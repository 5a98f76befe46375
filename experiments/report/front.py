"""Quality against time: every timed program and baseline of a group, its front, and what the papers report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.report import charts
from experiments.report.charts import LARGE, MARKERS, OTHER, PAPERS, RELAY, SMALL, Chart, Tips
from experiments.report.data import Entry, Group, front
from experiments.report.labels import short_link

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RISE_SPEEDUP = 2.1  # at the full model's quality: arXiv 2606.17378, its own words
_MANY = "#7a6fd0"  # programs of other legs, and the baselines that grey has no markers left for
_PROGRAMS = {"full-cloud": (LARGE, "s"), "edge-only": (SMALL, "^"), "relay": (RELAY, "o"), "other": (_MANY, "d")}


def pareto(group: Group) -> Chart:
    """Quality against time; what nothing else beats in both is joined by the front."""
    timed, best = group.timed, front(group.timed)
    rise = (group.large.seconds / RISE_SPEEDUP, group.large.score[0]) if group.large in timed and group.large else None

    def draw(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink, "both")
        ax.plot([e.seconds for e in best], [e.score[0] for e in best], color=ink, linewidth=1, alpha=0.45, zorder=1)
        _mark(ax, timed, group, tips)
        ax.set(xlabel=f"seconds a picture ({short_link(group.link)}; latency, batch 1)", ylabel=group.score_name)
        bottom, top = ax.get_ylim()
        ax.set_ylim(bottom - 0.04 * (top - bottom), top + 0.05 * (top - bottom))
        ax.set_xlim(0, ax.get_xlim()[1] * 1.04)
        if rise:
            for share, said in ((1.0, "large's score"), (0.95, "0.95 of it")):
                _level(ax, share * rise[1], said)
            star = ax.plot(*rise, "*", color=PAPERS, markersize=12, zorder=4)[0]
            tips(star, f"RISE (SDXL to Vega, SD3.5): up to {RISE_SPEEDUP}x at the full model's quality")
        _legend(figure, timed)
        _name(ax, group, rise)

    rows = [
        {"program": e.program, "label": e.label, "latency_s": e.latency, "score": e.score[0], "low": e.score[1],
         "high": e.score[2], "on_front": e.on_front, "link": group.link}
        for e in timed
    ]  # fmt: skip
    words = "; ".join(f"{e.label} {e.score[0]:.3f} at {charts.seconds_text(e.seconds)}" for e in best)
    alt = f"Quality against time, {group.label}. On the front: {words}."
    return charts.make_chart(f"front-{group.slug}", group.label, alt, draw, rows, size=(5.3, 4.1))


def _mark(ax: Axes, timed: list[Entry], group: Group, tips: Tips) -> None:
    of_baseline = _baseline_marks(timed)
    for method, (colour, _) in of_baseline.items():  # a baseline's settings are a trade-off of their own
        settings = sorted((e for e in timed if e.method == method), key=lambda e: e.seconds)
        ax.plot(
            [e.seconds for e in settings], [e.score[0] for e in settings], ":", color=colour, linewidth=0.9, alpha=0.6
        )
    for entry in timed:
        mean, low, high = entry.score
        own = of_baseline.get(entry.method)
        colour, marker = own or _PROGRAMS.get(entry.mode, (OTHER, "x"))
        fill, size = ("none", 5.5) if own else (colour, 7)
        ax.plot([entry.seconds] * 2, [low, high], color=colour, linewidth=1, alpha=0.3, zorder=2)
        dot = ax.plot(entry.seconds, mean, marker, color=colour, markersize=size, markerfacecolor=fill, zorder=3)[0]
        tips(dot, f"{entry.label}: {group.score_name} {mean:.3f}, {charts.seconds_text(entry.seconds)}")


def _baseline_marks(timed: list[Entry]) -> dict[str, tuple[str, str]]:
    methods = sorted({e.method for e in timed if e.method != "program"})
    return {m: (_MANY if i >= len(MARKERS) else OTHER, MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}


def _legend(figure: Figure, timed: list[Entry]) -> None:
    """Baselines by their markers; programs are named where they stand."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], color=colour, marker=marker, markerfacecolor="none", linestyle=":", linewidth=0.9, label=method)
        for method, (colour, marker) in _baseline_marks(timed).items()
    ]
    if marks:
        figure.legend(handles=marks, loc="outside lower left", ncols=3, fontsize=8.5, handlelength=2, columnspacing=1.2)


def _level(ax: Axes, y: float, said: str) -> None:
    bottom, top = ax.get_ylim()
    if bottom < y < top:
        ax.axhline(y, color=LARGE, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7, zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate(said, (0.005, y), (0, 2), fontsize=8, color=LARGE, **place)  # type: ignore[arg-type]


def _name(ax: Axes, group: Group, rise: tuple[float, float] | None) -> None:
    """Names beside marks, the important ones first; of baselines only those on the front."""
    first = [e for e in group.timed if e in (group.large, group.small)]
    on_front = [e for e in group.timed if e.on_front and e not in first]
    rest = [e for e in group.timed if e not in first and e not in on_front]
    points = [(e.seconds, e.score[0]) for e in first]
    names = [e.label for e in first]
    if rise:
        points.append(rise)
        names.append(f"RISE: {RISE_SPEEDUP}x at full quality")
    points += [(e.seconds, e.score[0]) for e in (*on_front, *rest)]
    names += [e.label for e in on_front] + [e.label if e in group.main_line else "" for e in rest]
    charts.place_labels(ax, points, names)
