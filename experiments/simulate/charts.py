"""Learning curves of a scheduling table as PNGs: the way that is left to the oracle over requests, band over seeds.

Differences, since rewards themselves rise and fall with queues, weather and prompts, for all alike.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.pictures import save_png
from experiments.simulate.cells import Cells
from experiments.simulate.scheduling import PLAIN, Bench
from experiments.simulate.summary import ROUNDS, WINDOW, Floats, moving, per_request, yardsticks

# Okabe and Ito; the oracle is ink, what does not learn grey
COLOURS = ("#0a9a6f", "#2f7fc4", "#d27d00", "#d1495b", "#b0589b", "#6b5fc7", "#8a6d3b")


def draw_charts(bench: Bench, cells: Cells, folder: Path, stem: str) -> list[Path]:
    """A PNG a scenario, and one of the ablations; the plain ones with the requests of learning before those of test."""
    import matplotlib as mpl

    mpl.use("Agg")
    contenders = bench.config.contenders
    ablations = [name for name, contender in contenders.items() if contender.of is not None]
    whole = {contenders[name].of for name in ablations}
    made = []
    for scenario in (PLAIN, *bench.config.shifts):
        names = [n for n in contenders if n not in ablations or scenario != PLAIN]
        made.append(_chart(bench, cells, scenario, names, folder / f"{stem}-{scenario}.png"))
    if ablations:
        names = [n for n in contenders if n in ablations or n in whole]
        made.append(_chart(bench, cells, PLAIN, names, folder / f"{stem}-ablations.png"))
    return [path for path in made if path is not None]


def _chart(bench: Bench, cells: Cells, scenario: str, names: list[str], path: Path) -> Path | None:
    """Each contender's reward less that of the oracle over the same arms, request by request, smoothed."""
    from matplotlib import pyplot as plt

    config = bench.config
    figure, axes = plt.subplots(figsize=(9.5, 4.8), layout="constrained")
    colours, start, drawn = iter(COLOURS * 4), 0, 0
    for name in names:
        _, best = yardsticks(bench, bench.arms_of(name))
        frames, ideal = cells.get((scenario, name), []), cells.get((scenario, best or ""), [])
        if not frames or len(ideal) < len(frames) or name == best or _plain(bench, name):
            continue
        values = per_request(frames, "reward") - per_request(ideal[: len(frames)], "reward")
        if scenario == PLAIN and config.learn:
            first = per_request(frames, "reward", "learn") - per_request(ideal[: len(frames)], "reward", "learn")
            values, start = np.concatenate([first, values], axis=1), -config.learn
        curve = moving(values)
        x, learns = start + WINDOW / 2 + np.arange(curve.shape[1]), bench.learns(name)
        colour = next(colours) if learns else "#8b8d98"
        style = "--" if config.contenders[name].of else "-" if learns else ":"
        axes.plot(x, curve.mean(0), color=colour, lw=1.4, ls=style, label=name)
        if len(curve) > 1:
            low, high = _band(curve)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
        drawn += 1
    if drawn:
        at = 0 if scenario == PLAIN else round(config.shifts[scenario].at * config.requests)
        said = "train prompts before 0, test prompts after" if scenario == PLAIN else config.shifts[scenario].says
        axes.axvline(at, color="#8b8d98", lw=0.8)
        axes.axhline(0, color="#16181d", lw=0.8)
        axes.set(
            xlabel="request", ylabel=f"reward less the oracle's, mean of {WINDOW} requests", title=f"{scenario}: {said}"
        )
        figure.legend(fontsize=7, frameon=False, loc="outside right upper")
        save_png(figure, path)
    plt.close(figure)
    return path if drawn else None


def _plain(bench: Bench, name: str) -> bool:
    """What is left out of charts: of those that do not learn, only random, greedy and oracles are drawn."""
    return not bench.learns(name) and bench.config.contenders[name].policy not in ("random", "greedy", "oracle")


def _band(curve: Floats) -> tuple[Floats, Floats]:
    """95 % bootstrap interval of the mean over seeds, at every point."""
    draws = np.random.default_rng(0).integers(len(curve), size=(ROUNDS // 10, len(curve)))
    low, high = np.quantile(curve[draws].mean(1), [0.025, 0.975], axis=0)
    return low, high
