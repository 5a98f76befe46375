"""Pictures of a comparison: dP against the share sent, and dP against mean cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.report.charts import LARGE, NETWORK, PAPERS, RELAY, SMALL, Tips, make_chart, plain_axes
from experiments.routing.evaluate import ORACLES, OURS
from experiments.routing.tables import NAMES, SETS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (LARGE, SMALL, NETWORK, PAPERS, "#7a6fd0", "#6f9c3d", "#bf5b8e")
ABLATED = "token, "


def dp_against_share(families: Sequence[dict[str, Any]]) -> bytes:
    """PNG: a panel per family and metric set, a line per router (mean over seeds, metrics outside noise)."""

    def panel(ax: Axes, found: dict[str, Any], ink: str) -> None:
        shown = {name: row for name, row in found["routers"].items() if not name.startswith(ABLATED)}
        colours = iter(_COLOURS)
        for name, row in shown.items():
            share = np.linspace(0, 100, len(row["curve"]))
            label = NAMES.get(name, name).replace("**", "")
            if name == OURS:
                ax.plot(share, row["curve"], color=RELAY, linewidth=2.4, label=label, zorder=5)
            elif name in ORACLES:
                ax.plot(share, row["curve"], color=ink, linewidth=1.2, alpha=0.7, label=label,
                        linestyle={"oracle-dp": ":", "oracle-seeds": "-."}.get(name, "--"))  # fmt: skip
            elif name == "random":
                ax.plot(share, row["curve"], color=ink, linewidth=1.2, alpha=0.4, label=label)
            else:
                ax.plot(share, row["curve"], color=next(colours), linewidth=1.3, label=label)
        learned = [max(row["curve"]) for name, row in shown.items() if name not in ORACLES]
        highest = max(max(row["curve"]) for row in shown.values())
        ax.set_ylim(
            top=min(1.05 * highest, max(2.2 * max(learned), 110))
        )  # a seed's luck may lift oracles out of sight
        ax.set_ylabel("dP, % (metrics outside noise)")
        ax.set_xlabel("share sent to the large member, %")

    return _grid(families, panel, "routing-dp", "dP against the share sent to the large member")


def dp_against_cost(families: Sequence[dict[str, Any]]) -> bytes:
    """PNG: dP over mean cost, two-way against three-way."""

    def panel(ax: Axes, found: dict[str, Any], ink: str) -> None:
        three = found["three_way"]
        routers = dict.fromkeys(row["router"] for row in three["rows"] if row["router"] != "oracle-dp")
        colours = iter((LARGE, SMALL, NETWORK, PAPERS))
        for name in routers:
            colour = ink if name == "no router" else RELAY if name == OURS else next(colours)
            for ways, style in (("two-way", ":"), ("three-way", "-")):
                rows = [r for r in three["rows"] if r["router"] == name and r["ways"] == ways]
                label = f"{NAMES.get(name, name).replace('**', '')}, {ways}"
                ax.plot([100 * r["budget"] for r in rows], [r["dp"] for r in rows], style, color=colour, marker="o",
                        markersize=3, linewidth=1.4, label=label)  # fmt: skip
        for mode, cost, dp in zip(("full-cloud", "relay", "edge-only"), three["costs"], three["modes"], strict=True):
            ax.plot([100 * cost], [dp], "s", color=ink, markersize=4)
            ax.annotate(mode, (100 * cost, dp), textcoords="offset points", xytext=(4, -10), color=ink, fontsize=8)
        ax.set_xlabel("budget of mean cost, % of full-cloud's")
        ax.set_ylabel("dP, % (metrics outside noise)")

    return _grid(families, panel, "routing-cost", "dP against mean cost")


def _grid(families: Sequence[dict[str, Any]], panel: Any, name: str, title: str) -> bytes:
    columns = 2 if len(families) > 1 else 1
    rows = -(-len(families) // columns)

    def draw(figure: Figure, ink: str, tips: Tips) -> None:
        axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
        for ax, found in zip(axes, families, strict=False):
            plain_axes(ax, ink)
            panel(ax, found, ink)
            ax.set_title(f"{found['family']}, {SETS[found['metric_set']]}")
        for ax in axes[len(families) :]:
            ax.set_visible(False)
        axes[0].legend(fontsize=7.5)

    return make_chart(name, title, title, draw, [], (5.4 * columns, 4.2 * rows)).png
