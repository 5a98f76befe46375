"""The scheduling table as Markdown and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.pictures import shown
from experiments.simulate.cells import Cells
from experiments.simulate.scheduling import PLAIN, Bench
from experiments.simulate.summary import TOLERANCE, WINDOW, Interval, recovery, rows_of


def report(bench: Bench, cells: Cells, charts: list[Path]) -> tuple[str, dict[str, Any]]:
    """Text without its title, and the data behind it."""
    config = bench.config
    plain = rows_of(bench, cells, PLAIN)
    data: dict[str, Any] = {"plain": plain, "tuned": bench.tuned, "facts": bench.facts, "shifts": {}}
    lines = [*_ground(bench, plain), "", *_table([row for row in plain if row["of"] is None])]
    ablations = [row for row in plain if row["of"] is not None]
    if ablations:
        full = [row for row in plain if row["contender"] in {each["of"] for each in ablations}]
        lines += ["", "## Ablations", "", "The settings are those tuned for the whole; one thing is taken away.", ""]
        lines += _table([*full, *ablations])
    for scenario, change in config.shifts.items():
        rows = rows_of(bench, cells, scenario)
        if not rows:
            continue
        back = {row["contender"]: recovery(bench, cells, scenario, row["contender"]) for row in rows}
        data["shifts"][scenario] = {"rows": rows, "recovery": back}
        at = round(change.at * config.requests)
        lines += ["", f"## Shift: {scenario}", "", f"From test request {at} on: {change.says or _said(change)}.", ""]
        lines += _shift_table(rows, back)
    if config.shifts:
        lines += [
            "",
            "Regret: the oracle's reward less the policy's, as a share of the random policy's in the same time. Recovered:"
            f" the next {WINDOW} requests' is at most that of the 500 before the shift plus {TOLERANCE:.0%}. A policy that the"
            " shift did not hurt recovers at 0, even one that learns nothing.",
        ]
    lines += ["", *map(shown, charts)]
    return "\n".join(lines) + "\n", data


def _ground(bench: Bench, plain: list[dict[str, Any]]) -> list[str]:
    config, store = bench.config, bench.facts["store"]
    seeds = [row["seeds"] for row in plain] or [0]
    prompts = store["prompts"]
    said = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else str(max(seeds))
    lines = [
        config.description,
        "",
        f"Simulated: world `{bench.spec.name}`, {len(bench.spec.nodes)} nodes, requests by {config.asking.arrivals}. Each policy"
        f" met {config.requests} requests of {config.splits[2]} prompts with each of {said} seeds; those that learn had met"
        f" {config.learn} of {config.splits[0]} prompts before and went on learning. Intervals: 95 %, bootstrap over seeds.",
        f"Scores: {', '.join(config.store)}, {store['programs']} programs x"
        f" {', '.join(f'{n} {split}' for split, n in prompts.items())} prompts x"
        f" {'/'.join(map(str, store['seeds']))} seed(s). Step times are measured (the world's `timing`); queues, batches and"
        " links are simulated on top. The way to the oracle: (policy - random) / (oracle - random), over the same arms.",
    ]
    if store["seeds"] == [1]:
        lines.append(
            "**One seed a prompt is stored, so the oracle knows each picture's luck, which nothing that is told to a policy"
            " says: the way to it cannot be gone to its end.** `oracle-class` knows a prompt's class only."
        )
    return lines


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| policy | arms | reward | quality part | time part | seconds | scene | way to the oracle | of the oracle's | over PPO"
        " | CPU a decision |",
        "|" + " --- |" * 11,
    ]
    for row in rows:
        name = f"{row['contender']}{': ' + row['says'] if row['says'] else ''}"
        shares = [_percent(row.get(key)) for key in ("way", "of_oracle", "over_ppo")]
        lines.append(
            f"| {name} | {row['arms'] or 'all'} | {_interval(row['reward'], 4)} | {row['quality'][0]:.3f} |"
            f" {row['time'][0]:.3f} | {row['seconds'][0]:.3f} | {row['scene'][0]:.3f} | {' | '.join(shares)} |"
            f" {row['decide_us']:.0f} us |"
        )
    return lines


def _shift_table(rows: list[dict[str, Any]], back: dict[str, Any]) -> list[str]:
    lines = [
        "| policy | reward | way to the oracle | regret before | regret right after | recovered after |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        found = back[row["contender"]]
        said = ("", "", "")
        if found is not None:
            took = "not within the run" if found["requests"] is None else f"{found['requests']:.0f} requests"
            high = "never" if found["high"] >= found["never"] else f"{found['high']:.0f}"
            said = (
                f"{found['regret_before']:.0%}",
                f"{found['regret_first']:.0%}",
                f"{took} [{found['low']:.0f}, {high}]",
            )
        lines.append(
            f"| {row['contender']} | {_interval(row['reward'], 4)} | {_percent(row.get('way'))} | {' | '.join(said)} |"
        )
    return lines


def _said(change: Any) -> str:
    if change.classes is not None:
        return f"prompts of class {', '.join(change.classes)} only"
    what = (
        f"its link has {change.link:g} times its bandwidth"
        if change.link
        else f"its steps take {change.pace:g} times as long"
    )
    return f"{change.node}: {what}"


def _interval(value: Interval, digits: int) -> str:
    return f"{value[0]:.{digits}f} [{value[1]:.{digits}f}, {value[2]:.{digits}f}]"


def _percent(value: Interval | None) -> str:
    return "" if value is None else f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"
