"""The best s per network: every measured program over a grid of bandwidth and delay.

Compute stages are the run's measured medians without any network; transfer and return are the link profile's mean time
for the bytes that each program sends. Where the run's links are scaled, so is this grid: its axes are the real link's
bandwidth and delay, the messages have the real family's sizes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.report import charts
from experiments.report.charts import Chart, Tips
from experiments.report.data import NO_LINK, Entry, Group
from relay.errors import RelayError
from scheduler.links import LinkProfile, Scaling
from scheduler.message_sizes import MessageSizes, bytes_sent, computed_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEEPS = 0.95  # of the large member's score
BANDWIDTHS = (1e6, 3e6, 10e6, 30e6, 100e6, 300e6, 1e9)
DELAYS = (0.0, 0.005, 0.02, 0.05, 0.1, 0.2)
_COMPUTE = ("encode_s", "large_s", "handoff_s", "small_s", "decode_s")


class NoMap(Exception):
    """Why there is no such chart for a group, in one line."""


def network_map(group: Group) -> Chart:
    """The fastest program that keeps 0.95 of the large member's score, for every bandwidth and delay."""
    scaling, sizes = charged(group)
    usable = [
        e for e in group.entries
        if e.parsed and NO_LINK in e.stages and e.ratio is not None and e.ratio >= KEEPS
    ]  # fmt: skip
    if not usable or not group.large or NO_LINK not in group.large.stages:
        raise NoMap("no timed program keeps 0.95 of the large member's score, or large alone was not timed")
    cells = [
        [_best(usable, group.large, _link(bandwidth, delay, scaling), sizes) for bandwidth in BANDWIDTHS]
        for delay in DELAYS
    ]

    def draw(figure: Figure, ink: str, tips: Tips) -> None:
        from matplotlib.patches import Rectangle

        ax = figure.subplots()
        for i, row in enumerate(cells):
            for j, (entry, speedup) in enumerate(row):
                colour = charts.over_s(group.place(entry) / group.steps_total)
                patch = ax.add_patch(Rectangle((j + 0.02, i + 0.03), 0.96, 0.94, color=colour, linewidth=0))
                where = f"{_rate(BANDWIDTHS[j])} Mbit/s, {DELAYS[i] * 1e3:g} ms"
                tips(patch, f"{where}: {entry.label}, {speedup:.2f}x as fast as large alone")
                ax.text(
                    j + 0.5,
                    i + 0.64,
                    _cell(entry),
                    ha="center",
                    va="center",
                    fontsize=8.5,
                    color="white",
                    weight="bold",
                )
                ax.text(j + 0.5, i + 0.32, f"{speedup:.2f}x", ha="center", va="center", fontsize=8, color="white")
        ax.set(xlim=(0, len(BANDWIDTHS)), ylim=(0, len(DELAYS)), xlabel="bandwidth, Mbit/s", ylabel="delay, one way")
        ax.set_xticks([j + 0.5 for j in range(len(BANDWIDTHS))], [_rate(b) for b in BANDWIDTHS])
        ax.set_yticks([i + 0.5 for i in range(len(DELAYS))], [f"{d * 1e3:g} ms" for d in DELAYS])
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)

    rows = [
        {"bandwidth_bit_s": b, "delay_s": d, "best": cells[i][j][0].program, "label": cells[i][j][0].label,
         "speedup": cells[i][j][1]}
        for i, d in enumerate(DELAYS) for j, b in enumerate(BANDWIDTHS)
    ]  # fmt: skip
    kind = (
        f"scaled, lambda = {scaling.factor:.3g}, axes are the real link's; {scaling.source}" if scaling else "as given"
    )
    winners = ", ".join(dict.fromkeys(cell[0].label for row in cells for cell in row))
    return charts.make_chart(
        f"networks-{group.slug}", group.label, f"The fastest program that keeps {KEEPS} of the large member's score, over"
        f" bandwidth and delay, {group.label}. Somewhere the best: {winners}.", draw, rows, size=(5.3, 3.5),
        note=f"Links {kind}; messages: {sizes.source}.",
    )  # fmt: skip


def charged(group: Group) -> tuple[Scaling | None, MessageSizes]:
    """How this run scales its links for this family (None: as given), and the sizes that its messages are charged."""
    from experiments.links import link_for
    from relay.family_spec import find_family

    curves = group.run.curves.filter(family=group.family, member="large", batch=1)
    step = float(curves["step_s"][0]) if curves.height else None
    try:
        spec = find_family(group.source)
        links = [link_for(entry, spec, step) for entry in group.run.config.get("links", [])]
        scaled = next(((link.scaling, sizes) for link, sizes in links if link.scaling), None)
        return scaled or (None, computed_sizes(spec))
    except (RelayError, OSError) as error:
        raise NoMap(f"its links or the sizes of its messages are not known here: {error}") from None


def _link(bandwidth: float, delay: float, scaling: Scaling | None) -> LinkProfile:
    link = LinkProfile(name="map", bandwidth_bit_s=bandwidth, delay_s=delay)
    return link.scaled(scaling.real_step_s, scaling.mini_step_s, scaling.source) if scaling else link


def _best(usable: list[Entry], large: Entry, link: LinkProfile, sizes: MessageSizes) -> tuple[Entry, float]:
    def whole(entry: Entry) -> float:
        assert entry.parsed
        network = sum(link.transfer_time(message.bytes) for message in bytes_sent(entry.parsed, sizes))
        return sum(entry.stages[NO_LINK][c] for c in _COMPUTE) + network

    best = min(usable, key=whole)
    return best, whole(large) / whole(best)


def _cell(entry: Entry) -> str:
    return {"edge-only": "small", "full-cloud": "large"}.get(entry.mode, f"{entry.handoff} + {entry.small_steps}")


def _rate(bit_s: float) -> str:
    return f"{bit_s / 1e6:g}"
