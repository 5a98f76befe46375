"""The goals of the comparison as one table: violations and throughput of ours beside the best of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from experiments.load.bound import least_violations, most_per_s
from experiments.load.case import TEST, Case, Cell
from experiments.load.service import stations_of
from experiments.load.systems import Agnostic, Ours, systems

SHARES = (1.0, 0.9, 0.8, 0.7)  # of the most that the nodes can do
KEPT = 0.95  # relative quality that counts as good
ALIKE = 0.01  # of relative quality: equal
VIOLATIONS, THEIRS, TENTH, MORE = 0.01, 0.05, 0.1, 1.4
Rows = dict[tuple[str, Cell], list[dict[str, Any]]]


def goals(case: Case, rows: Rows, who: Sequence[str], cells: Sequence[Cell]) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of Markdown, and their figures. `cells`: one a fleet and trace, at the goal's load and deadline."""
    kinds = {name: systems()[case.config.systems[name].system] for name in who}
    ours = [name for name in who if kinds[name] is Ours]
    rivals = {
        "other systems": [name for name in who if kinds[name] not in (Ours, Agnostic)],
        "ours, prompt-agnostic": [name for name in who if kinds[name] is Agnostic],
    }
    found = [
        _beside(rows, cell, name, against, [n for n in names if (n, cell) in rows])
        for name in ours
        for against, names in rivals.items()
        if names
        for cell in cells
    ]
    lines = [
        f"Goals: violations below {VIOLATIONS:.0%} at {KEPT:.0%} of full-cloud's quality or more, where the best of the others"
        f" has at least {THEIRS:.0%}; a tenth of its violations; {MORE - 1:.0%} more pictures in time than any of equal quality"
        f" (at least ours less {ALIKE:.0%}). The best of the others is that of least violations among those that keep"
        f" {KEPT:.0%}; the ratio is over the seeds that both have. Bold: the goal is kept.",
        "",
        "| system | beside | fleet, trace | violations | quality | best of the others | its violations | ratio | more pictures in"
        " time than those of equal quality |",
        "|" + " --- |" * 9,
    ]  # fmt: skip
    return lines + [_line(each) for each in found], found


def ablation(case: Case, rows: Rows, who: Sequence[str], cells: Sequence[Cell]) -> list[str]:
    """What predictions and cached starts bring: means over the goal's traces and the seeds that all forms have; nothing
    where one form of ours is there alone."""
    config = case.config
    forms = [name for name in who if systems()[config.systems[name].system] in (Ours, Agnostic)]
    if len(forms) < 2:
        return []
    fleets = list(config.fleets)
    count = min(len(rows[name, cell]) for name in forms for cell in cells)
    lines = [
        "| system | predicted quality of a prompt | cached starts |"
        + "".join(f" {fleet}: violations | quality |" for fleet in fleets),
        "|" + " --- |" * (3 + 2 * len(fleets)),
    ]  # fmt: skip
    for name in forms:
        contestant = config.systems[name]
        predicts = systems()[contestant.system] is Ours
        starts = bool((contestant.settings | case.tuned.get(name, {})).get("starts"))
        said = [name, "yes" if predicts else "", "yes" if starts else ""]
        for fleet in fleets:
            means = [_means(rows[name, cell][:count]) for cell in cells if cell.fleet == fleet]
            said += [f"{np.mean([each[key] for each in means]):.2%}" for key in ("violations", "quality")]
        lines.append(f"| {' | '.join(said)} |")
    return lines


def sustained(case: Case, rows: Rows, who: Sequence[str]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Throughput at good quality: the highest load of the table at which, as at all lower ones, a system keeps the goals of
    violations and quality; 0 where it keeps them at none. Lines of Markdown, and system -> "fleet, trace" -> load."""
    config, (_, deadline), loads = case.config, case.goal, sorted(case.config.loads)
    columns = list(product(config.fleets, config.traces))
    found: dict[str, dict[str, float]] = {name: {} for name in who}
    for name, (fleet, trace) in product(who, columns):
        highest = 0.0
        for load in loads:
            means = _means(rows[name, Cell(fleet=fleet, trace=trace, load=load, deadline=deadline)])
            if not _good(means):
                break
            highest = load
        found[name][f"{fleet}, {trace}"] = highest
    lines = [
        f"Throughput at good quality: the highest of the loads {', '.join(f'{load:g}' for load in loads)} (of"
        f" full-cloud capacity) up to which violations stay below {VIOLATIONS:.0%} at {KEPT:.0%} of full-cloud's quality or"
        f" more, deadline {deadline:g} x:",
        "",
        f"| system | {' | '.join(f'{fleet}, {trace}' for fleet, trace in columns)} |",
        "|" + " --- |" * (1 + len(columns)),
    ]
    for name, each in found.items():
        lines.append(f"| {name} | {' | '.join(f'{load:g}' if load else 'none' for load in each.values())} |")
    return lines, found


def left_to_any(case: Case, cells: Sequence[Cell]) -> list[str]:
    """Violations that any system from noise has which makes use of so much of what the nodes can do; nothing where none is
    left at the least share."""
    lines = []
    most = {
        fleet: most_per_s([work for work in case.works_of(fleet) if not work.skipped], stations_of(case.world(fleet)))
        for fleet in dict.fromkeys(cell.fleet for cell in cells)
    }
    for cell in cells:
        size = case.size(cell)
        asked = [case.demand(cell, seed, TEST, size.requests) for seed in range(size.seeds)]
        left = [
            np.mean([least_violations(each.arrival_s, each.deadline_s, share * most[cell.fleet]) for each in asked])
            for share in SHARES
        ]
        if max(left) > 0:
            said = " | ".join(f"{each:.2%}" for each in left)
            lines.append(f"| {cell.fleet}, {cell.trace} | {most[cell.fleet]:.1f} | {said} |")
    if not lines:
        return []
    return [
        "Violations that are left to any system (from noise) where nodes are used to a share of the most that they can do, at"
        " the levels that take least of them and the best batches, whatever the pictures; full use at once is nobody's:",
        "",
        "| fleet, trace | most a second |" + "".join(f" used to {share:.0%} |" for share in SHARES),
        "|" + " --- |" * (2 + len(SHARES)),
        *lines,
    ]


def _beside(rows: Rows, cell: Cell, name: str, against: str, others: Sequence[str]) -> dict[str, Any]:
    beside = {}  # over the seeds that both have: the same requests
    for each in others:
        both = min(len(rows[name, cell]), len(rows[each, cell]))
        beside[each] = _means(rows[name, cell][:both]), _means(rows[each, cell][:both])
    good = [each for each, (_, other) in beside.items() if other["quality"] >= KEPT]
    best = min(good, key=lambda each: beside[each][1]["violations"], default=None)
    more = [
        own["per_s"] / other["per_s"]
        for own, other in beside.values()
        if other["quality"] >= own["quality"] - ALIKE and other["per_s"] > 0
    ]
    return {
        "system": name, "beside": against, "fleet": cell.fleet, "trace": cell.trace, **_means(rows[name, cell]), "best": best,
        "violations_beside_it": beside[best][0]["violations"] if best else None,
        "their_violations": beside[best][1]["violations"] if best else None,
        "more": min(more, default=None),
    }  # fmt: skip


def _means(each: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.mean([found.get(key, 0.0) for found in each])) for key in ("violations", "quality", "per_s")}


def _good(each: Mapping[str, Any]) -> bool:
    return bool(each["violations"] < VIOLATIONS and each["quality"] >= KEPT)


def _line(each: dict[str, Any]) -> str:
    own, theirs = each["violations_beside_it"], each["their_violations"]
    kept = _good(each)
    said = [
        each["system"],
        each["beside"],
        f"{each['fleet']}, {each['trace']}",
        _bold(f"{each['violations']:.2%}", each["violations"] < VIOLATIONS),
    ]
    said.append(_bold(f"{each['quality']:.1%}", each["quality"] >= KEPT))
    if theirs is None:
        said += [f"none keeps {KEPT:.0%}", "", ""]
    else:
        said += [each["best"], _bold(f"{theirs:.2%}", kept and theirs >= THEIRS)]
        said.append(_bold(f"{own / theirs:.2f}", own <= TENTH * theirs) if theirs else "both none" if not own else "")
    said.append("" if each["more"] is None else _bold(f"{each['more'] - 1:+.0%}", each["more"] >= MORE))
    return f"| {' | '.join(said)} |"


def _bold(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text
