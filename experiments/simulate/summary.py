"""Figures of a scheduling table: means with intervals over seeds, shares of the way to the oracle, recovery."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.simulate.cells import Cells
from experiments.simulate.scheduling import PLAIN, Bench

if TYPE_CHECKING:
    import polars as pl

ROUNDS = 2000
WINDOW = 100  # requests of a moving mean
TOLERANCE = 0.1  # of the random policy's regret: so near to where it was counts as recovered
Floats = NDArray[np.float64]
Interval = tuple[float, float, float]


def per_request(frames: list[pl.DataFrame], column: str, phase: str = "test") -> Floats:
    """(seeds, requests); a reward that is missing counts as none."""
    import polars as pl

    return np.stack([
        frame.filter(pl.col("phase") == phase)[column].fill_null(0.0).to_numpy().astype(float) for frame in frames
    ])  # fmt: skip


def over_seeds(values: Floats, rounds: int = ROUNDS) -> Interval:
    """Mean and 95 % percentile-bootstrap interval of a number a seed."""
    draws = np.random.default_rng(0).integers(len(values), size=(rounds, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def ratio(above: Floats, below: Floats, rounds: int = ROUNDS) -> Interval:
    """mean(above) / mean(below) with its interval, seeds drawn together."""
    draws = np.random.default_rng(0).integers(len(above), size=(rounds, len(above)))
    low, high = np.quantile(above[draws].mean(1) / below[draws].mean(1), [0.025, 0.975])
    return float(above.mean() / below.mean()), float(low), float(high)


def yardsticks(bench: Bench, arms: str | None) -> tuple[str | None, str | None]:
    """Names of random and oracle, neither with options, over the same arms."""

    def of(policy: str) -> str | None:
        return next(
            (
                n
                for n, c in bench.config.contenders.items()
                if c.policy == policy and not c.options and bench.arms_of(n) == arms and c.of is None
            ),
            None,
        )

    return of("random"), of("oracle")


def rows_of(bench: Bench, cells: Cells, scenario: str) -> list[dict[str, Any]]:
    """One row a contender: rewards and their parts, seconds, and where it lies between random and oracle."""
    found = []
    for name, contender in bench.config.contenders.items():
        frames = cells.get((scenario, name), [])
        if not frames:
            continue
        mean = {
            column: per_request(frames, column).mean(1) for column in ("reward", "quality", "time", "seconds", "scene")
        }
        row: dict[str, Any] = {
            "contender": name, "says": contender.says, "arms": bench.arms_of(name), "of": contender.of, "seeds": len(frames),
            "learns": bench.learns(name), "decide_us": float(np.median([frame["decide_us"][0] for frame in frames])),
            **{column: over_seeds(values) for column, values in mean.items()},
            "modes": _shares(frames),
        }  # fmt: skip
        lowest, highest = yardsticks(bench, bench.arms_of(name))
        if lowest and highest and min(len(cells[scenario, n]) for n in (lowest, highest)) >= len(frames):
            base = per_request(cells[scenario, lowest][: len(frames)], "reward").mean(1)
            best = per_request(cells[scenario, highest][: len(frames)], "reward").mean(1)
            row["way"] = ratio(mean["reward"] - base, best - base)
            row["of_oracle"] = ratio(mean["reward"], best)
        against = cells.get((scenario, "ppo"), [])
        if len(against) >= len(frames) and bench.arms_of(name) == bench.arms_of("ppo"):
            other = per_request(against[: len(frames)], "reward").mean(1)
            row["over_ppo"] = ratio(mean["reward"] - other, np.abs(other))
        found.append(row)
    return found


def _shares(frames: list[pl.DataFrame]) -> dict[str, float]:
    import polars as pl

    modes = pl.concat(frames).filter(pl.col("phase") == "test")["mode"]
    return {mode: float((modes == mode).mean() or 0.0) for mode in sorted(modes.unique().to_list())}


def moving(values: Floats, window: int = WINDOW) -> Floats:
    """Means of `window` requests along the last axis; as many fewer."""
    sums = np.cumsum(np.concatenate([np.zeros((*values.shape[:-1], 1)), values], axis=-1), axis=-1)
    return (sums[..., window:] - sums[..., :-window]) / window


def recovery(bench: Bench, cells: Cells, scenario: str, name: str) -> dict[str, Any] | None:
    """Requests after a shift until a contender is as near to the oracle as it was before, seeds together.

    Its regret is the oracle's reward less its own, request by request, as a share of the random policy's in the same time,
    for a shift changes how much there is to lose. It has recovered at the first request from which the next `WINDOW` have a
    mean regret of at most that of the 500 before the shift plus `TOLERANCE`. None: not within the run. The interval: seeds
    drawn anew, 0 to the end of the run.
    """
    lowest, highest = yardsticks(bench, bench.arms_of(name))
    if scenario == PLAIN or not lowest or not highest:
        return None
    several = [cells.get((scenario, n), []) for n in (name, highest, lowest)]
    count = min(len(frames) for frames in several)
    if not count:
        return None
    mine, best, base = (per_request(frames[:count], "reward") for frames in several)
    at = round(bench.config.shifts[scenario].at * mine.shape[1])
    if mine.shape[1] - at < WINDOW:
        return None

    def after(seeds: NDArray[np.int64]) -> tuple[float | None, float, float]:
        regret, gap = (best - mine)[seeds].mean(0), (best - base)[seeds].mean(0)
        earlier = slice(max(0, at - 500), at)
        before = regret[earlier].mean() / gap[earlier].mean()
        shares = moving(regret[at:]) / gap[at:].mean()
        good = np.flatnonzero(shares <= before + TOLERANCE)
        return (float(good[0]) if len(good) else None), float(before), float(shares[0])

    took, before, first = after(np.arange(count))
    rng = np.random.default_rng(0)
    drawn = [after(rng.integers(count, size=count))[0] for _ in range(300)]
    never = float(mine.shape[1] - at)
    low, high = np.quantile([never if value is None else value for value in drawn], [0.025, 0.975])
    return {
        "requests": took, "low": float(low), "high": float(high), "never": never, "regret_before": before,
        "regret_first": first,
    }  # fmt: skip
