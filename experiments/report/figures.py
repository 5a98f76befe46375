"""The charts of a group besides its front: intensity, complexity, stages, codecs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.report import charts
from experiments.report.charts import LARGE, NETWORK, PAPERS, RELAY, RETURN, SMALL, Chart, Tips
from experiments.report.data import STAGES, Entry, Group
from experiments.report.labels import class_name, short_link

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RISE_DEVIATION = 0.015  # "minimal deviation after a handoff"; the number is second-hand
STAGE_NAMES = dict(
    zip(STAGES, ("encode", "large steps", "handoff", "transfer", "small steps", "decode", "return"), strict=True)
)
STAGE_COLOURS = dict(zip(STAGES, ("#9aa0aa", LARGE, "#5c6270", NETWORK, SMALL, "#6f9c3d", RETURN), strict=True))
_CLASS_COLOURS = (RELAY, LARGE, "#bf5b8e", SMALL, "#7a6fd0", "#6f9c3d", "#9aa0aa")


def intensity(group: Group) -> list[Chart]:
    """The latent's intensity over the whole way, with and without handoff, and how far they lie apart."""
    watched = [e for e in group.main_line if e.intensity is not None]
    total = group.steps_total
    rows: list[dict[str, Any]] = []
    lines = []
    for entry in watched:
        assert entry.intensity is not None
        relay, reference = entry.intensity
        s = entry.handoff or 0
        # Legs of any length end together: a small leg of n steps covers what is left of T.
        n = relay.shape[1]
        at = s + (total - s) * np.arange(1, n + 1) / n
        away = 100 * (np.abs(relay - reference) / reference).mean(0)
        lines.append((entry, at, relay.mean(0), reference.mean(0), away))
        named = {"program": entry.program, "label": entry.label}
        before = np.empty(0) if entry.prefix is None else entry.prefix.mean(0)
        rows += [
            named | {"position": float(i), "large_before": float(b)} for i, b in enumerate(before, 1)
        ] + [
            named | {"position": float(x), "relay": float(a), "large_goes_on": float(b), "deviation_percent": float(d)}
            for x, a, b, d in zip(at, relay.mean(0), reference.mean(0), away, strict=True)
        ]  # fmt: skip
    shared = _shared(watched)

    def levels(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink)
        for before in shared:
            line = ax.plot(range(1, len(before) + 1), before, color=ink, linewidth=1.6, alpha=0.55, zorder=1)[0]
            tips(line, f"the large member's first {len(before)} steps, shared by the relays that begin with them")
        points = []
        for entry, at, relay, reference, _ in lines:
            colour = charts.over_s((entry.handoff or 0) / total)
            x, legs = at, [reference, relay]
            if entry.prefix is not None:  # both go on from the point of handoff
                handed = entry.prefix.mean(0)[-1]
                x, legs = np.array([entry.handoff or 0, *at]), [np.array([handed, *leg]) for leg in legs]
            ax.plot(x, legs[0], color=ink, linewidth=3.2, alpha=0.18, zorder=1)
            tips(
                ax.plot(x, legs[1], color=colour, linewidth=1.4, zorder=2)[0],
                f"{entry.label}: intensity after the handoff",
            )
            points.append((x[0], legs[1][0]))
            ax.plot(*points[-1], "o", color=colour, markersize=4.5, zorder=3)
        levels_seen = [v for line in (*shared, *(leg for _, _, *legs, _ in lines for leg in legs)) for v in line]
        if max(levels_seen) > 4 * min(levels_seen):  # noise of the epsilon kind is many times the picture
            charts.log_axis(ax, "y", min(levels_seen), max(levels_seen))
        ax.set(xlabel=f"position on the way from 0 to T = {total}", ylabel="mean |latent|", xlim=(0, total))
        charts.place_labels(ax, points, [f"s = {e.handoff}" for e, *_ in lines])

    def apart(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink)
        ends = []
        for entry, at, _, _, away in lines:
            colour = charts.over_s((entry.handoff or 0) / total)
            tips(
                ax.plot(at, away, "o-", color=colour, linewidth=1.6, markersize=2.5)[0],
                f"{entry.label}: up to {away.max():.2f} %",
            )
            ends.append((at[-1], away[-1], f"s = {entry.handoff}", colour))
        ax.axhline(100 * RISE_DEVIATION, color=PAPERS, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            "RISE: below 1.5 %", (0.01, 100 * RISE_DEVIATION), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", fontsize=8.5, color=PAPERS,
        )  # fmt: skip
        ax.set(
            xlabel=f"position on the way from 0 to T = {total}",
            ylabel="deviation, %, mean over prompts",
            xlim=(0, total),
        )
        ax.set_ylim(0, max(ax.get_ylim()[1], 1.8))
        charts.end_labels(ax, ends)

    largest = ", ".join(f"{e.label}: {away.max():.2f} %" for e, *_, away in lines)
    title = group.label
    return [
        charts.make_chart(
            f"intensity-{group.slug}", f"{title}: intensity", f"Mean absolute latent along the whole way, {title}: dark"
            f" before a handoff, marked where it happens, then colour with it and grey where the large member goes on.", levels,
            rows,
        ),
        charts.make_chart(
            f"deviation-{group.slug}", f"{title}: deviation", f"Deviation of the mean intensity from the large member's"
            f" going on, {title}. Largest: {largest}.", apart, [],
        ),
    ]  # fmt: skip


def _shared(watched: list[Entry]) -> list[np.ndarray]:
    """The trajectories before the handoffs, means over prompts, each once: relays that begin alike share the longest."""
    found: list[np.ndarray] = []
    for before in sorted((e.prefix.mean(0) for e in watched if e.prefix is not None), key=len, reverse=True):
        if not any(np.allclose(before, longer[: len(before)], rtol=1e-5) for longer in found):
            found.append(before)
    return found


def by_class(group: Group) -> list[Chart]:
    """Score and share of the gap closed over s, a line a complexity class."""
    walk, line = group.walk, group.main_line
    colours = {cls: _CLASS_COLOURS[i % len(_CLASS_COLOURS)] for i, cls in enumerate(group.classes)}

    def draw_lines(figure: Figure, ink: str, tips: Tips, share: bool) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink)
        ends = []
        for cls in group.classes:
            found = [
                (group.place(e), v)
                for e in (line if share else walk)
                if (v := (e.gaps if share else e.by_class).get(cls))
            ]
            if not found:
                continue
            at, mean, low, high = (np.array(x) for x in zip(*((x, *v) for x, v in found), strict=True))
            ax.fill_between(at, low, high, color=colours[cls], alpha=0.12, linewidth=0)
            what = "gap closed" if share else group.score_name
            said = ", ".join(f"s = {x:g}: {y:.2f}" for x, y in zip(at, mean, strict=True))
            tips(
                ax.plot(at, mean, "o-", color=colours[cls], markersize=4, linewidth=1.5)[0],
                f"{class_name(cls)}, {what}: {said}",
            )
            ends.append((at[-1], mean[-1], class_name(cls), colours[cls]))
        ax.set(
            xlabel=f"s, steps of the large member (T = {group.steps_total})",
            ylabel="share of the gap closed" if share else group.score_name,
        )
        if share:
            for level in (0, 1):
                ax.axhline(level, color=ink, linewidth=0.8, alpha=0.4)
            bottom, top = ax.get_ylim()
            ax.set_ylim(max(bottom, -1.0), min(top, 2.0))  # an interval over a narrow gap would flatten all others
        ax.set_xlim(0, group.steps_total)
        charts.end_labels(ax, ends)

    rows = [
        {"program": e.program, "label": e.label, "s": group.place(e), "class": cls, "score": v[0], "low": v[1], "high": v[2]}
        | dict(zip(("gap_closed", "gap_low", "gap_high"), e.gaps.get(cls) or (None,) * 3, strict=True))
        for e in group.entries for cls, v in sorted(e.by_class.items())
    ]  # fmt: skip
    title = group.label
    found = [
        charts.make_chart(
            f"classes-{group.slug}", f"{title}: quality", f"{group.score_name} over s for each complexity class, {title}.",
            lambda f, ink, tips: draw_lines(f, ink, tips, share=False), rows,
        )
    ]  # fmt: skip
    if any(gap for e in line for cls, gap in e.gaps.items() if cls in group.classes):
        found.append(
            charts.make_chart(
                f"gaps-{group.slug}", f"{title}: share of the gap closed", f"Share of the gap between small and large"
                f" member that a relay closes, over s, for each complexity class, {title}.",
                lambda f, ink, tips: draw_lines(f, ink, tips, share=True), [],
            )
        )  # fmt: skip
    return found


def stages(group: Group, link: str) -> Chart:
    """Where the time goes over one link: stacked bars."""
    shown = [e for e in group.walk if link in e.stages]

    def draw(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink, "x")
        ends = [0.0] * len(shown)
        for stage, name in STAGE_NAMES.items():
            hatch = "///" if stage in ("transfer_s", "return_s") else None  # the network, also without colours
            for i, entry in enumerate(shown):
                seconds = entry.stages[link][stage]
                if seconds > 0:
                    bar = ax.barh(
                        i,
                        seconds,
                        0.68,
                        ends[i],
                        color=STAGE_COLOURS[stage],
                        hatch=hatch,
                        edgecolor="white",
                        linewidth=0,
                    )
                    tips(bar[0], f"{entry.label}, {name}: {charts.seconds_text(seconds)}")
                    ends[i] += seconds
        for i, entry in enumerate(shown):
            ax.annotate(
                charts.seconds_text(entry.stages[link]["end_to_end_s"]), (ends[i], i), (4, 0), textcoords="offset points",
                va="center", fontsize=8.5,
            )  # fmt: skip
        ax.set_yticks(range(len(shown)), [e.label for e in shown])
        ax.invert_yaxis()
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_xlim(0, max(ends) * 1.14)
        ax.set_xlabel("seconds (latency, batch 1; median of each stage)")
        _stage_legend(figure, link, shown)

    rows = [
        {"program": e.program, "label": e.label, "link": link}
        | {k: e.stages[link][k] for k in (*STAGES, "end_to_end_s")}
        for e in shown
    ]
    name = f"{group.family}, T = {group.steps_total}"
    which = f"-{group.links.index(link) + 1}" if len(group.links) > 1 else ""
    words = "; ".join(f"{e.label} {charts.seconds_text(e.stages[link]['end_to_end_s'])}" for e in shown)
    return charts.make_chart(
        f"stages-{group.slug}{which}", f"{name}, {short_link(link)}", f"Time of each stage, {name}, {short_link(link)}: {words}.",
        draw, rows, size=(5.3, 1.35 + 0.32 * len(shown)), note=link,
    )  # fmt: skip


def _stage_legend(figure: Figure, link: str, shown: list[Entry]) -> None:
    from matplotlib.patches import Patch

    used = [s for s in STAGES if any(e.stages[link][s] > 0 for e in shown)]
    network = ("transfer_s", "return_s")
    patches = [
        Patch(
            facecolor=STAGE_COLOURS[s],
            hatch="///" if s in network else None,
            edgecolor="white",
            linewidth=0,
            label=STAGE_NAMES[s],
        )
        for s in used
    ]
    figure.legend(
        handles=patches, loc="outside upper left", ncols=4, handlelength=1.1, handleheight=0.9, columnspacing=1.1
    )


def codec_charts(group: Group, rows: list[dict[str, Any]]) -> list[Chart]:
    """The latent's error on the wire against bytes, and the judged score against that error.

    `rows` as tables.codec_rows makes them. A run that did not store the latent's error shows the picture's instead.
    """
    known = all(row["latent_error"] is not None for row in rows)
    key = "latent_error" if known else "picture_error"
    finest, title = rows[0]["codec"], f"{group.label}, {rows[0]['steps']}"
    named = "error of the latent, relative" if known else f"RMS error of the picture against {finest}"

    def error_axis(ax: Axes, which: str) -> None:
        """Codecs lie decades apart, and fp32 at no error at all: linear up to the smallest, then logarithmic."""
        smallest = min((row[key] for row in rows if row[key]), default=0.0)
        if not known or not smallest:
            return
        ticks = [
            0.0,
            *(t for t in (10.0**-k for k in range(8, -1, -1)) if smallest / 10 < t < 10 * max(r[key] for r in rows)),
        ]
        set_scale, set_ticks = getattr(ax, f"set_{which}scale"), getattr(ax, f"set_{which}ticks")
        set_scale("symlog", linthresh=10.0 ** np.floor(np.log10(smallest)))
        set_ticks(ticks, [f"{t:g}" for t in ticks], minor=False)

    def scatter(ax: Axes, tips: Tips, x: str, y: str) -> None:
        for row in rows:
            if f"{y}_low" in row:
                ax.plot([row[x]] * 2, [row[f"{y}_low"], row[f"{y}_high"]], color=RELAY, linewidth=1, alpha=0.5)
            said = f"{row['codec']}: {row['bytes']} B, error {row[key]:.2g}, score {row['difference']:+.4f}"
            tips(ax.plot(row[x], row[y], "o", color=RELAY, markersize=7)[0], said)
        ax.margins(x=0.18, y=0.22)

    def errors(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink, "both")
        error_axis(ax, "y")
        scatter(ax, tips, "bytes", key)
        ax.set(xlabel="bytes of a latent on the wire", ylabel=named)
        charts.place_labels(ax, [(r["bytes"], r[key]) for r in rows], [r["codec"] for r in rows], fontsize=9.5)

    def judged(figure: Figure, ink: str, tips: Tips) -> None:
        ax = figure.subplots()
        charts.plain_axes(ax, ink, "both")
        error_axis(ax, "x")
        ax.axhline(0, color=ink, linewidth=0.8, alpha=0.5)
        scatter(ax, tips, key, "difference")
        ax.set(xlabel=named, ylabel=f"{group.score_name}, against {finest}")
        charts.place_labels(ax, [(r[key], r["difference"]) for r in rows], [r["codec"] for r in rows], fontsize=9.5)

    said = "; ".join(f"{r['codec']} {r['bytes']} B, error {r[key]:.2g}, score {r['difference']:+.4f}" for r in rows)
    return [
        charts.make_chart(f"codec-error-{group.slug}", f"{title}: error", f"Codecs, {title}: {said}.", errors, rows),
        charts.make_chart(
            f"codec-score-{group.slug}", f"{title}: judged score", f"Codecs, {title}: {said}.", judged, []
        ),
    ]
