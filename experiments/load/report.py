"""The table of systems under load as Markdown, JSON and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.load.case import Case, Cell
from experiments.load.cells import all_cells, level_names, run_cell
from experiments.load.systems import systems
from experiments.pictures import save_png
from experiments.simulate.summary import over_seeds

GOAL_LOAD, GOAL_DEADLINE = 1.3, 2.0  # issue: below 1 % violations at 95 % relative quality
COLOURS = ("#0a9a6f", "#2f7fc4", "#d27d00", "#d1495b", "#b0589b", "#6b5fc7", "#8a6d3b", "#888888")
Rows = dict[tuple[str, Cell], list[dict[str, Any]]]


def collect(case: Case, folder: Path, who: Sequence[str], seeds: int, requests: int, say: Any) -> Rows:
    """Figures of every cell and system, a list over seeds; what is missing is run."""
    found: Rows = {}
    for seed in range(seeds):  # seed by seed, so that a table over few seeds stands early
        for cell in all_cells(case):
            for name in who:
                found.setdefault((name, cell), []).append(run_cell(case, folder, name, cell, seed, requests))
            say(f"seed {seed} {cell.fleet} {cell.trace} load {cell.load:g} deadline {cell.deadline:g}")
    return found


def report(case: Case, rows: Rows, who: Sequence[str], left_out: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """Text without its title, and the data behind it."""
    config = case.config
    seeds, requests = len(next(iter(rows.values()))), next(iter(rows.values()))[0]["requests"]
    lines = [config.description, ""] if config.description else []
    lines += [
        f"Simulated with measured step times; {requests} requests x {seeds} seed(s) a cell, test prompts; quality is what the"
        f" outcome store measured ({config.metric}), never predicted. A violation is a request that was late or refused."
        " Intervals: 95 %, bootstrap over seeds.",
        "",
        f"Settings are the best of at most {max([len(t) for t in case.tries.values()], default=0)} configurations a system, drawn"
        f" at random from its own space and tried on validation prompts ({', '.join(config.search.traces)}; load"
        f" {', '.join(map(str, config.search.loads))}, deadline {', '.join(map(str, config.search.deadlines))} x), the given one"
        " first: with so few, differences between systems are also those of the draw.",
        "",
        "| fleet | nodes | full-cloud capacity | full-cloud latency |",
        "| --- | --- | --- | --- |",
    ]
    capacities = {}
    for fleet, spec in config.fleets.items():
        per_s, latency = case.capacity(fleet)
        capacities[fleet] = {"per_s": per_s, "latency_s": latency}
        lines.append(f"| {fleet} | {_nodes(spec)} | {per_s:.2f} pictures/s | {latency:.3f} s |")
    lines += ["", "| system | its rule | tuned on validation |", "| --- | --- | --- |"]
    for name in who:
        kind = systems()[config.systems[name].system]
        chosen = config.systems[name].settings | case.tuned.get(name, {})
        said = ", ".join(f"{key} {value}" for key, value in chosen.items())
        if not said:
            searched = name in case.tuned
            said = "nothing to tune" if not kind.space else "its defaults" if searched else "**not tuned**: defaults"  # type: ignore[attr-defined]
        lines.append(f"| {name} | {kind.rule} | {said} |")  # type: ignore[attr-defined]
    if config.starts is not None:
        pairs = sum(each["pairs"] for each in case.levels.provenance["starts"])
        lines += [
            "",
            "Levels that begin from cached latents are those of the systems that say so. Who finds a latent is simulated by the"
            f" similarity of the stored prompts, each edge keeping those of its last {config.starts.prompts} and never a"
            " request's own prompt; what is kept of quality is what cached starts measured at that similarity and K (fitted"
            f" on {pairs} starts of validation pairs, played on those of test pairs).",
        ]
    lines += [f"\nLeft out: {name}: {why}." for name, why in left_out.items()]
    goal_loads = (
        min(config.loads, key=lambda x: abs(x - GOAL_LOAD)),
        min(config.deadlines, key=lambda x: abs(x - GOAL_DEADLINE)),
    )
    for fleet in config.fleets:
        for trace in config.traces:
            cells = [cell for cell in all_cells(case) if (cell.fleet, cell.trace) == (fleet, trace)]
            lines += ["", f"## {fleet} fleet, {trace}", "", *_goal(case, rows, who, cells, goal_loads)]
            lines += ["", "Violations, relative quality of what came in time:", "", *_grid(rows, who, cells)]
    data = {
        "capacity": capacities, "levels": level_names(case), "left_out": left_out, "tuned": case.tuned,
        "cells": [
            {"system": name, "fleet": cell.fleet, "trace": cell.trace, "load": cell.load, "deadline": cell.deadline,
             "seeds": each}
            for (name, cell), each in rows.items()
        ],
    }  # fmt: skip
    return "\n".join(lines) + "\n", data


def _nodes(spec: Any) -> str:
    said = []
    for name, node in spec.nodes.items():
        facts = [f"{node.pace:g} x slower"] if node.pace > 1 else []
        facts += [str(node.link)] if node.link else []
        said.append(name + (f" ({', '.join(facts)})" if facts else ""))
    return ", ".join(said)


def _goal(case: Case, rows: Rows, who: Sequence[str], cells: Sequence[Cell], at: tuple[float, float]) -> list[str]:
    (cell,) = [c for c in cells if (c.load, c.deadline) == at]
    lines = [
        f"Load {cell.load:g}, deadline {cell.deadline:g} x:", "",
        "| system | violations | of them refused | relative quality | share of the gap kept | pictures/s in time |"
        " edge seconds a picture | device seconds | p50 | p99 |",
        "|" + " --- |" * 10,
    ]  # fmt: skip
    for name in who:
        each = rows[name, cell]

        def mean(key: str, percent: bool = True, each: list[dict[str, Any]] = each) -> str:
            values = [found[key] for found in each if key in found]
            if not values:
                return ""
            value, low, high = over_seeds(np.array(values))
            if percent:
                return f"{value:.1%}" + (f" [{low:.1%}, {high:.1%}]" if len(values) > 1 else "")
            return f"{value:.3f}"

        lines.append(
            f"| {name} | {mean('violations')} | {mean('refused')} | {mean('quality')} | {mean('gap')} |"
            f" {mean('per_s', False)} | {mean('edge_s', False)} | {mean('device_s', False)} | {mean('p50_s', False)} |"
            f" {mean('p99_s', False)} |"
        )
    return lines


def _grid(rows: Rows, who: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    head = [f"{cell.load:g}, {cell.deadline:g} x" for cell in cells]
    lines = [f"| load, deadline | {' | '.join(head)} |", "|" + " --- |" * (len(cells) + 1)]
    for name in who:
        said = []
        for cell in cells:
            each = rows[name, cell]
            late = np.mean([found["violations"] for found in each])
            quality = [found["quality"] for found in each if "quality" in found]
            said.append(f"{late:.1%}, {np.mean(quality):.1%}" if quality else f"{late:.1%}, none")
        lines.append(f"| {name} | {' | '.join(said)} |")
    return lines


def draw(case: Case, rows: Rows, who: Sequence[str], folder: Path, stem: str) -> list[Path]:
    """A PNG a fleet: violations and relative quality over load, a column a trace, at the goal's deadline."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    config, made = case.config, []
    deadline = min(config.deadlines, key=lambda x: abs(x - GOAL_DEADLINE))
    for fleet in config.fleets:
        figure, axes = plt.subplots(
            2, len(config.traces), figsize=(3.2 * len(config.traces), 5), squeeze=False, sharex=True
        )
        for column, trace in enumerate(config.traces):
            for name, colour in zip(who, COLOURS * 2, strict=False):
                for row, key in enumerate(("violations", "quality")):
                    values = [
                        np.mean([each[key] for each in found if key in each] or [np.nan])
                        for found in (
                            rows[name, Cell(fleet=fleet, trace=trace, load=load, deadline=deadline)]
                            for load in config.loads
                        )
                    ]
                    axes[row, column].plot(
                        config.loads, 100 * np.array(values), color=colour, marker="o", ms=3, label=name
                    )
            axes[0, column].set_title(trace)
            axes[1, column].set_xlabel("load / full-cloud capacity")
        axes[0, 0].set_ylabel("late or refused, %")
        axes[1, 0].set_ylabel("quality of full-cloud's, %")
        axes[0, -1].legend(fontsize=6)
        figure.suptitle(f"{config.family}, {fleet} fleet, deadline {deadline:g} x full-cloud latency (simulated)")
        figure.tight_layout()
        path = folder / f"{stem}-{fleet}.png"
        save_png(figure, path)
        plt.close(figure)
        made.append(path)
    return made
