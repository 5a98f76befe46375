"""Learning curves of a scheduling table as PNGs: mean reward of a moving window over requests, band over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.simulate.cells import Cells
from experiments.simulate.scheduling import PLAIN, Bench
from experiments.simulate.summary import ROUNDS, WINDOW, Floats, moving, per_request
from relay.files import replacing

# Okabe and Ito; the oracle is ink, what does not learn grey
COLOURS = ("#0a9a6f", "#2f7fc4", "#d27d00", "#d1495b", "#b0589b", "#6b5fc7", "#8a6d3b")


def draw_charts(bench: Bench, cells: Cells, folder: Path, stem: str) -> list[Path]:
    """One PNG a scenario; the plain one with the requests of learning before those of test."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    made = []
    for scenario in (PLAIN, *bench.config.shifts):
        names = [n for n in bench.config.contenders if cells.get((scenario, n))]
        if not names:
            continue
        figure, axes = plt.subplots(figsize=(8.5, 4.8), dpi=130, layout="constrained")
        colours = iter(COLOURS * 4)
        for name in names:
            learns = bench.learns(name)
            if not learns and bench.config.contenders[name].policy not in ("oracle", "random"):
                continue
            values = per_request(cells[scenario, name], "reward")
            start = 0
            if scenario == PLAIN and bench.config.learn:
                values = np.concatenate([per_request(cells[scenario, name], "reward", "learn"), values], axis=1)
                start = -bench.config.learn
            curve = moving(values)
            x = start + WINDOW / 2 + np.arange(curve.shape[1])
            colour = next(colours) if learns else "#16181d" if "oracle" in name else "#8b8d98"
            style = "--" if bench.config.contenders[name].of else "-" if learns else ":"
            axes.plot(x, curve.mean(0), color=colour, lw=1.4, ls=style, label=name)
            if len(curve) > 1:
                low, high = _band(curve)
                axes.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)
        at = 0 if scenario == PLAIN else round(bench.config.shifts[scenario].at * bench.config.requests)
        axes.axvline(at, color="#8b8d98", lw=0.8)
        said = "train prompts before 0, test prompts after" if scenario == PLAIN else bench.config.shifts[scenario].says
        axes.set(xlabel="request", ylabel=f"reward, mean of {WINDOW} requests", title=f"{scenario}: {said}")
        axes.legend(fontsize=7, ncols=2, frameon=False)
        path = folder / f"{stem}-{scenario}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            figure.savefig(partial, format="png")
        plt.close(figure)
        made.append(path)
    return made


def _band(curve: Floats) -> tuple[Floats, Floats]:
    """95 % bootstrap interval of the mean over seeds, at every point."""
    draws = np.random.default_rng(0).integers(len(curve), size=(ROUNDS // 10, len(curve)))
    low, high = np.quantile(curve[draws].mean(1), [0.025, 0.975], axis=0)
    return low, high
