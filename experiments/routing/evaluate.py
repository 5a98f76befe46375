"""The measures of a comparison, from what the routers scored and what was drawn: test outcomes are read here only.

    figures = evaluate(bench, {"hybrid-llm": cells, ...}, config)

Every dP is a mean over seeds, with an interval redrawn over seeds and prompts together. The metrics outside noise are
those whose gap is so on the train and validation prompts (which settings are chosen by) and on the prompts measured: a
gap near zero in a denominator would drown the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.routing.baselines.base import pair
from experiments.routing.cells import Bench, Cell
from experiments.routing.config import Comparison
from experiments.routing.data import EDGE, MODES, RoutingData, Split
from experiments.routing.delta_p import (
    column_means,
    curve,
    delta_p,
    gaps,
    interval,
    redraw,
    savings,
    send,
    tied,
    worth,
)
from experiments.routing.three_way import WAYS, blend, mode_costs, spend

Floats = NDArray[np.float64]
OURS = "token"
ORACLES = ("oracle-prs", "oracle-dp", "oracle-seeds")
SHARES = 50  # points of a drawn curve


def evaluate(bench: Bench, cells: Mapping[str, Sequence[Cell]], config: Comparison, on: str = "test") -> dict[str, Any]:
    """All figures of one family and metric set. `on` validation: to look at while developing, test stays unseen."""
    data = bench.data
    split: Split = getattr(data, on)
    small, large = pair(split)
    there = {gap.metric for gap in gaps(data.metrics, small, large) if gap.clear}
    named = [metric for metric in bench.clear if metric in there] or list(data.metrics)
    clear = data.only(named)
    split_clear: Split = getattr(clear, on)
    small_clear, large_clear = pair(split_clear)
    everything = [np.concatenate([pair(s)[i] for s in (clear.train, clear.validation, clear.test)]) for i in (0, 1)]
    steady = np.abs(column_means(everything[1]) - column_means(everything[0]))
    value, value_clear = worth(large, small, large), worth(large_clear, small_clear, large_clear)
    value_steady = worth(large_clear, small_clear, large_clear, steady)
    routed: dict[str, list[Floats]] = {}
    found: dict[str, Any] = {}
    for name, seeds in cells.items():
        scores = [np.asarray(getattr(cell, on)) for cell in seeds]
        sent = [send(s, config.share, cell.seed) for s, cell in zip(scores, seeds, strict=True)]
        if name == "oracle-dp":  # it is the best there is for the metrics that are counted, so over fewer another one
            scores = [-value_clear for _ in seeds]
        sent_clear = [send(s, config.share, cell.seed) for s, cell in zip(scores, seeds, strict=True)]
        routed[name] = [np.where(m[:, None], large_clear, small_clear) for m in sent_clear]
        curves = [curve(s, value_clear, cell.seed) for s, cell in zip(scores, seeds, strict=True)]
        found[name] = {
            "settings": seeds[0].settings,
            "seconds": float(np.mean([cell.seconds for cell in seeds])),
            "objective": float(np.mean([cell.objective for cell in seeds])),
            "means": np.mean([column_means(np.where(m[:, None], large, small)) for m in sent], 0).tolist(),
            "dp_all": _with_interval(
                [value[m].sum() for m in sent], redraw([np.where(m[:, None], large, small) for m in sent], small, large)
            ),
            "dp_clear": _with_interval(
                [value_clear[m].sum() for m in sent_clear], redraw(routed[name], small_clear, large_clear)
            ),
            "dp_steady": _mean_and_spread([value_steady[m].sum() for m in sent_clear]),
            "sent": float(np.mean([m.mean() for m in sent])),
            "tied": float(np.mean([tied(s, config.share) for s in scores])),
            "capped": _capped(scores, sent_clear, value_clear) if seeds[0].capped else None,
            "savings": _savings(curves, config.targets),
            "peak": _peak(np.mean(curves, 0)),
            "curve": _thinned(np.mean(curves, 0)),
        }  # fmt: skip
    if OURS in routed:
        for name, theirs in routed.items():
            lead = redraw(routed[OURS], small_clear, large_clear, theirs)
            found[name]["lead"] = [found[OURS]["dp_clear"][0] - found[name]["dp_clear"][0], *interval(lead)]
    return {
        "family": data.family, "metric_set": data.metric_set, "metrics": list(data.metrics), "clear": named,
        "on": on, "prompts": {name: len(getattr(data, name)) for name in ("train", "validation", "test")},
        "programs": data.programs, "data": data.digest,
        "gaps": {name: [asdict(g) | {"clear": g.clear} for g in gaps(data.metrics, *pair(getattr(data, name)))]
                 for name in ("train", on)},
        "small": column_means(small).tolist(), "large": column_means(large).tolist(),
        "dp_large": [float(value.sum()), float(value_clear.sum()), float(value_steady.sum())],
        "routers": found,
        "three_way": three_way(bench, cells, config, split_clear, clear) if on == "test" else None,
    }  # fmt: skip


def three_way(
    bench: Bench, cells: Mapping[str, Sequence[Cell]], config: Comparison, split: Split, clear: RoutingData
) -> dict[str, Any]:
    """dP over the metrics outside noise at equal budgets of mean cost, two-way and three-way."""
    costs = mode_costs(clear.programs, Path(config.curves))
    small, large = pair(split)
    each = np.stack([worth(split.quality[:, mode], small, large) for mode in range(len(MODES))], axis=1)
    known = np.nanmean((clear.mu - clear.mu[EDGE]) / clear.gap(), axis=1)  # what the train prompts say, mode by mode
    rows = []
    affordable = [budget for budget in config.budgets if budget >= costs[EDGE]]
    for budget in affordable:
        for ways, modes in WAYS.items():
            shares = blend(known, costs, budget, modes)
            rows.append(
                {
                    "router": "no router",
                    "ways": ways,
                    "budget": budget,
                    "cost": float(shares @ costs),
                    "dp": float(each.sum(0) @ shares),
                    "low": None,
                    "high": None,
                    "shares": shares.tolist(),
                }
            )
            oracle = spend(each, costs, budget, modes)
            rows.append(_spent("oracle-dp", ways, budget, costs, [oracle], split))
            for name in config.three_way:
                if not (name in cells and cells[name][0].values):
                    continue
                chosen = [spend(np.asarray(cell.values), costs, budget, modes) for cell in cells[name]]
                rows.append(_spent(name, ways, budget, costs, chosen, split))
    return {"costs": costs.tolist(), "modes": each.sum(0).tolist(), "rows": rows}


def _spent(
    name: str, ways: str, budget: float, costs: Floats, chosen: Sequence[NDArray[np.int64]], split: Split
) -> dict[str, Any]:
    small, large = pair(split)
    drawn = [split.quality[np.arange(len(split)), modes] for modes in chosen]
    low, high = interval(redraw(drawn, small, large))
    return {
        "router": name, "ways": ways, "budget": budget, "cost": float(np.mean([costs[modes].mean() for modes in chosen])),
        "dp": float(np.mean([delta_p(q, small, large) for q in drawn])), "low": low, "high": high,
        "shares": np.mean([np.bincount(m, minlength=len(MODES)) / len(m) for m in chosen], 0).tolist(),
    }  # fmt: skip


def _with_interval(seeds: Sequence[float], draws: Floats) -> list[float]:
    return [float(np.mean(seeds)), *interval(draws)]


def _mean_and_spread(seeds: Sequence[float]) -> list[float]:
    """Mean over seeds, smallest, largest."""
    return [float(np.mean(seeds)), float(min(seeds)), float(max(seeds))]


def _capped(scores: Sequence[Floats], sent: Sequence[NDArray[np.bool_]], value: Floats) -> dict[str, float]:
    """The paper's own decision: of the budget's prompts only those with PRS < 1/2."""
    kept = [m & (s < 0.5) for s, m in zip(scores, sent, strict=True)]
    return {"share": float(np.mean([m.mean() for m in kept])), "dp": float(np.mean([value[m].sum() for m in kept]))}


def _savings(curves: Sequence[Floats], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Per target: mean, smallest and largest over the seeds that reach it, and how many do."""
    found = []
    for i, target in enumerate(targets):
        reached = [s for c in curves if (s := savings(c, targets)[i]) is not None]
        found.append({
            "target": target, "reached": len(reached) / len(curves),
            "saving": float(np.mean(reached)) if reached else None,
            "low": min(reached, default=None), "high": max(reached, default=None),
        })  # fmt: skip
    return found


def _peak(line: Floats) -> list[float]:
    """The highest dP of any share, and that share."""
    at = int(line.argmax())
    return [float(line[at]), at / (len(line) - 1)]


def _thinned(line: Floats) -> list[float]:
    """dP at shares 0, 1/SHARES, ... 1."""
    return np.interp(np.linspace(0, 1, SHARES + 1), np.linspace(0, 1, len(line)), line).round(2).tolist()
