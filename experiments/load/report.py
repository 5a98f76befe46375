"""The table of systems under load as Markdown, JSON and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.load.case import Case, Cell
from experiments.load.cells import all_cells, goal_cells, level_names, run_cell
from experiments.load.goals import Rows, ablation, goals, left_to_any, sustained
from experiments.load.systems import systems
from experiments.pictures import save_png
from experiments.simulate.summary import over_seeds

COLOURS = (
    "#0a9a6f", "#2f7fc4", "#d27d00", "#d1495b", "#b0589b", "#6b5fc7", "#8a6d3b", "#888888", "#3fb8c4", "#222222", "#9acd32",
)  # fmt: skip


def collect(
    case: Case, folder: Path, who: Sequence[str], say: Any, seeds: int | None = None, requests: int | None = None
) -> tuple[Rows, Rows]:
    """Figures of every cell and system, a list over seeds, and of the long runs; what is missing is run. `seeds`, `requests`:
    at most so many."""
    found: Rows = {}
    cells = {cell: case.size(cell) for cell in all_cells(case)}
    for seed in range(max(size.seeds for size in cells.values())):  # so that a table over few seeds stands early
        for cell, size in cells.items():
            most = min(size.seeds, seeds or size.seeds)
            mine = [name for name in who if seed < min(most, case.config.systems[name].seeds or most)]
            for name in mine:
                each = run_cell(case, folder, name, cell, seed, min(size.requests, requests or size.requests))
                found.setdefault((name, cell), []).append(each)
            if mine:
                say(f"seed {seed} {cell.fleet} {cell.trace} load {cell.load:g} deadline {cell.deadline:g}")
    long: Rows = {}
    for name in [name for name in case.config.long if name in who]:
        for cell in goal_cells(case):
            count = case.config.long[name]
            long[name, cell] = [run_cell(case, folder, name, cell, 0, min(count, requests or count))]
            say(f"{count} requests {name} {cell.fleet} {cell.trace}")
    return found, long


def report(
    case: Case, rows: Rows, long: Rows, who: Sequence[str], left_out: dict[str, str]
) -> tuple[str, dict[str, Any]]:
    """Text without its title, and the data behind it."""
    config, (load, deadline) = case.config, case.goal
    at_goal = goal_cells(case)
    elsewhere = [cell for cell in all_cells(case) if cell not in at_goal]
    seeds = {name: len(rows[name, at_goal[0]]) for name in who}
    most = max(seeds, key=lambda name: seeds[name])
    counts = _counted(rows[most, at_goal[0]]) + f" a cell at load {load:g} and deadline {deadline:g} x"
    counts += "".join(f", {count} of {name}" for name, count in seeds.items() if count < seeds[most])
    if elsewhere:
        counts += f"; {_counted(rows[most, elsewhere[0]])} at the others"
    lines = [config.description, ""] if config.description else []
    lines += [
        f"Simulated with measured step times; {counts}; test prompts; quality is what the"
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
    told, compared = goals(case, rows, who, at_goal)
    lines += ["", "## Goals", "", *told]
    sustains, loads = sustained(case, rows, who)
    lines += ["", *sustains]
    if left := left_to_any(case, at_goal):
        lines += ["", *left]
    if parts := ablation(case, rows, who, at_goal):
        lines += [
            "",
            "What predictions and cached starts bring, means over the traces and the seeds that all have:",
            "",
            *parts,
        ]
    if long:
        lines += ["", "Long runs at the same load and deadline:", "", *_long(long)]
    for fleet in config.fleets:
        for trace in config.traces:
            cells = [cell for cell in all_cells(case) if (cell.fleet, cell.trace) == (fleet, trace)]
            lines += [
                "",
                f"## {fleet} fleet, {trace}",
                "",
                *_goal(rows, who, next(cell for cell in cells if cell in at_goal)),
            ]
            lines += ["", "Violations, relative quality of what came in time:", "", *_grid(rows, who, cells)]
    data = {
        "capacity": capacities, "levels": level_names(case), "left_out": left_out, "tuned": case.tuned,
        "goals": compared,
        "sustained": loads,
        "long": [{"system": name, **msgspec.to_builtins(cell), **each[0]} for (name, cell), each in long.items()],
        "cells": [
            {"system": name, **msgspec.to_builtins(cell), "seeds": [_in_short(found) for found in each]}
            for (name, cell), each in rows.items()
        ],
    }  # fmt: skip
    return "\n".join(lines) + "\n", data


def _in_short(found: dict[str, Any]) -> dict[str, Any]:
    """To the millionth; how often each level was used stays in the run's folder: it would be half of the file."""
    return {
        key: round(value, 6) if isinstance(value, float) else value for key, value in found.items() if key != "levels"
    }


def _nodes(spec: Any) -> str:
    said = []
    for name, node in spec.nodes.items():
        facts = [f"{node.pace:g} x slower"] if node.pace > 1 else []
        facts += [str(node.link)] if node.link else []
        said.append(name + (f" ({', '.join(facts)})" if facts else ""))
    return ", ".join(said)


def _counted(each: Sequence[dict[str, Any]]) -> str:
    return f"{each[0]['requests']:,} requests x {len(each)} seed(s)"


def _long(long: Rows) -> list[str]:
    lines = ["| system | requests | fleet, trace | violations | relative quality | p50 | p99 |", "|" + " --- |" * 7]
    for (name, cell), (each,) in long.items():
        lines.append(
            f"| {name} | {each['requests']:,} | {cell.fleet}, {cell.trace} | {each['violations']:.2%} |"
            f" {each.get('quality', 0.0):.1%} | {each.get('p50_s', 0.0):.3f} | {each.get('p99_s', 0.0):.3f} |"
        )
    return lines


def _goal(rows: Rows, who: Sequence[str], cell: Cell) -> list[str]:
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
    _, deadline = case.goal
    for fleet in config.fleets:
        figure, axes = plt.subplots(
            2, len(config.traces), figsize=(3.2 * len(config.traces), 5.6), squeeze=False, sharex=True
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
        figure.suptitle(f"{config.family}, {fleet} fleet, deadline {deadline:g} x full-cloud latency (simulated)")
        columns = min(len(who), 6)
        rows_below = -(-len(who) // columns)
        figure.tight_layout(rect=(0, 0.01 + 0.04 * rows_below, 1, 1))
        figure.legend(
            *axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=columns, fontsize=8, frameon=False
        )
        path = folder / f"{stem}-{fleet}.png"
        save_png(figure, path)
        plt.close(figure)
        made.append(path)
    return made
