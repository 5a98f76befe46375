"""The figures of a comparison as Markdown, the paper's beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.routing import paper
from experiments.routing.baselines import ROUTERS
from experiments.routing.data import MODES
from experiments.routing.evaluate import OURS

NAMES = {
    "random": "Random", "noun-count": "Noun count", "routellm-bert": "RouteLLM-BERT, adapted",
    "routellm-mf": "RouteLLM-MF, adapted", "hybrid-llm": "Hybrid LLM, adapted", "zooter": "ZOOTER, adapted",
    "boosted-tree": "Boosted tree", OURS: "**Token-level router**", "oracle-prs": "Oracle: true PRS",
    "oracle-dp": "Oracle: true worth in dP", "oracle-seeds": "Oracle: mean worth over other seeds' pictures",
}  # fmt: skip
SETS = {"clip": "RouteT2I's ten qualities", "scene": "the scene judge's categories"}


def gap_table(found: dict[str, Any]) -> str:
    """Each metric's gap between the members, with its interval, on train and on test prompts."""
    on = found["on"]
    lines = [
        f"| metric | small | large | gap, {found['prompts']['train']} train prompts | outside noise |"
        f" large ahead | gap, {found['prompts'][on]} {on} prompts | prompts |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for train, test in zip(found["gaps"]["train"], found["gaps"][on], strict=True):
        lines.append(
            f"| {train['metric'].removeprefix('q_')} | {test['small']:.4f} | {test['large']:.4f} |"
            f" {_signed(train['gap'], train['low'], train['high'])} |"
            f" {'yes' if train['metric'] in found['clear'] else 'no'} | {train['wins']:.0%} |"
            f" {_signed(test['gap'], test['low'], test['high'])} | {test['prompts']} |"
        )
    return "\n".join(lines)


def quality_table(found: dict[str, Any]) -> str:
    """The ten metrics and dP of every router at the budget."""
    metrics = [m.removeprefix("q_") for m in found["metrics"]]
    with_paper = found["metric_set"] == "clip"
    head = ["router", *metrics, "dP, all", "dP, outside noise", "the same, gaps of all prompts", "token's lead"]
    head += ["paper's dP"] if with_paper else []
    lines = [_row(head), _row(["---"] * len(head))]
    ends = (
        ("Small member alone", found["small"], [0.0] * 3),
        ("Large member alone", found["large"], found["dp_large"]),
    )
    for name, means, dp in ends:
        lines.append(_row([name, *_means(means), *(f"{x:.1f}" for x in dp), "", *([""] if with_paper else [])]))
    for name, row in found["routers"].items():
        printed = f"{paper.TABLE[name][1]:.2f}" if name in paper.TABLE else ""
        lead = _signed(*row["lead"][:3], digits=1) if "lead" in row and name != OURS else ""
        lines.append(_row([
            NAMES.get(name, name), *_means(row["means"]), _interval(row["dp_all"]), _interval(row["dp_clear"]),
            f"{row['dp_steady'][0]:.1f}", lead, *([printed] if with_paper else []),
        ]))  # fmt: skip
    return "\n".join(lines)


def capped_table(found: dict[str, Any]) -> str:
    """What the paper's cap (never above alpha = 1/2) sends, ties, and what the search chose."""
    lines = [
        _row(["router", "sent with PRS < 1/2 only", "its dP", "tied at the threshold", "seconds a fit", "settings"])
    ]
    lines.append(_row(["---"] * 6))
    for name, row in found["routers"].items():
        capped = row["capped"]
        said = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["settings"].items())
        said = said or ("its defaults" if name in ROUTERS and hasattr(ROUTERS[name], "SPACE") else "")
        lines.append(_row([
            NAMES.get(name, name), f"{capped['share']:.1%}" if capped else "", f"{capped['dp']:.1f}" if capped else "",
            f"{row['tied']:.0%}" if row["tied"] else "", f"{row['seconds']:.1f}", said,
        ]))  # fmt: skip
    return "\n".join(lines)


def savings_table(found: dict[str, Any]) -> str:
    """Cost saving at given dP, the paper's in brackets."""
    first = next(iter(found["routers"].values()))["savings"]
    head = ["router", *(f"dP {each['target']:g} %" for each in first), "highest dP of any share"]
    lines = [_row(head), _row(["---"] * len(head))]
    for name, row in found["routers"].items():
        printed = paper.SAVINGS.get(name) if found["metric_set"] == "clip" else None
        cells = []
        for i, each in enumerate(row["savings"]):
            text = _saving(each)
            cells.append(f"{text} [{printed[i]:.2f}]" if printed and i < len(printed) else text)
        highest, share = row["peak"]
        lines.append(_row([NAMES.get(name, name), *cells, f"{highest:.1f} at {share:.0%} sent"]))
    return "\n".join(lines)


def three_way_table(found: dict[str, Any]) -> str:
    """dP at equal budgets of mean cost."""
    three = found["three_way"]
    budgets = sorted({row["budget"] for row in three["rows"]})
    costs = ", ".join(
        f"{mode} {cost:.3f} (dP {dp:.1f})" for mode, cost, dp in zip(MODES, three["costs"], three["modes"], strict=True)
    )
    lines = [f"Cost of a mode for every prompt, of full-cloud's: {costs}.", ""]
    head = ["router", "ways", *(f"{budget:.0%}" for budget in budgets)]
    lines += [_row(head), _row(["---"] * len(head))]
    keys = dict.fromkeys((row["router"], row["ways"]) for row in three["rows"])
    for router, ways in sorted(keys, key=lambda key: [k[0] for k in keys].index(key[0])):
        cells = []
        for budget in budgets:
            row = next(r for r in three["rows"] if (r["router"], r["ways"], r["budget"]) == (router, ways, budget))
            spread = f" ({row['low']:.1f} to {row['high']:.1f})" if row["low"] is not None else ""
            cells.append(f"{row['dp']:.1f}{spread} at {row['cost']:.2f}")
        lines.append(_row([NAMES.get(router, router), ways, *cells]))
    return "\n".join(lines)


def _saving(each: dict[str, Any]) -> str:
    if each["saving"] is None:
        return "never"
    spread = f" ({each['low']:.1f} to {each['high']:.1f})" if each["high"] > each["low"] else ""
    return f"{each['saving']:.1f}{spread}" + ("" if each["reached"] == 1 else f", {each['reached']:.0%} of seeds")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _means(values: Sequence[float]) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _interval(values: Sequence[float]) -> str:
    return f"{values[0]:.1f} ({values[1]:.1f} to {values[2]:.1f})"


def _signed(value: float, low: float, high: float, *, digits: int = 4) -> str:
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
