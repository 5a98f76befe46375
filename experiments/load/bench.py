"""What decisions under load cost: the solver, a control period, a request; by fleet size. CPU seconds of one thread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from relay.program import Program
from scheduler.load.controller import Controller
from scheduler.load.expected import Station, Work, level_load, pools
from scheduler.load.planning import best_plan
from scheduler.load.settings import LoadSettings
from scheduler.load.solver import Problem, solve

OPTIONS = "match=exact/codec=fp16/guidance=3,3/conditioning=encode"
CURVE = {1: 0.02, 2: 0.03, 4: 0.05, 8: 0.09}
KINDS = 3  # speeds of edges and of devices
PERIODS, REQUESTS = 60, 300


def fleet(nodes: int, kinds: int | None = KINDS) -> list[Station]:
    """Half edges, half devices, of `kinds` speeds each; None: every node of its own."""
    found = []
    for i in range(nodes):
        edge = i % 2 == 0
        pace = 1 + 0.5 * (i // 2 % kinds) if kinds else 1 + 2 * i / nodes
        curve = {size: seconds * pace * (1.0 if edge else 0.2) for size, seconds in CURVE.items()}
        member = "large" if edge else "small"
        found.append(
            Station(f"n{i}", "edge" if edge else "device", {"f": {member: curve}}, 8, 0.002, 0.002, 0.005, 1e7)
        )
    return found


def levels(count: int) -> list[Work]:
    """Relays of 1 to `count` large steps of 50."""
    return [
        Work(Program.parse(f"f/large:60:0-{s}/small:60:{s}-60/{OPTIONS}"), 0, 1e5, 1e5) for s in range(count, 0, -1)
    ]


def timed(act: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median and most CPU seconds."""
    taken = []
    for _ in range(rounds):
        started = time.thread_time()
        act()
        taken.append(time.thread_time() - started)
    return statistics.median(taken), max(taken)


def main() -> tuple[str, dict[str, Any]]:
    """A table, and the data behind it."""
    import scipy.optimize  # noqa: F401  # its import is no part of a solution

    rng, data = np.random.default_rng(0), {}
    lines = [
        "`one program`: batch and share of the deadline for work given; `plan`: all of these tried out, as a gateway plans.", "",
        "| nodes | kinds of nodes | levels | one program | longest | plan, little load | plan, too much |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for nodes, kinds, count in ((8, 3, 8), (64, 3, 20), (64, None, 20), (1000, 3, 20), (1000, 20, 20)):
        stations, works = fleet(nodes, kinds), levels(count)
        quality = np.sort(rng.random((8, count)), axis=1)[:, ::-1]
        loads = tuple(level_load(work, stations, 4) for work in works)
        rate = 0.4 * nodes * 4 / CURVE[4] / count  # about what is left at half of the largest level's work
        problem = Problem(pools(stations, 4), loads, quality, np.full(8, rate / 8), 10.0)
        median, most = timed(partial(solve, problem), 5)
        settings = LoadSettings(deadline_s=10.0)
        plans = [
            timed(partial(best_plan, stations, works, quality, np.full(8, share * rate / 8), settings), 5)[0]
            for share in (0.1, 2.0)
        ]
        data[f"solve/{nodes}/{kinds}/{count}"] = {"median_s": median, "most_s": most, "plan_s": plans}
        said = "each its own" if kinds is None else f"{2 * kinds}"
        lines.append(
            f"| {nodes} | {said} | {count} | {1000 * median:.1f} ms | {1000 * most:.1f} ms | {1000 * plans[0]:.0f} ms |"
            f" {1000 * plans[1]:.0f} ms |"
        )
    stations, works = fleet(8), levels(8)
    sample = np.sort(rng.random((200, 8)), axis=1)[:, ::-1]
    control = Controller(LoadSettings(deadline_s=10.0), works, sample, rng)

    def period() -> None:
        for quality in sample[rng.integers(200, size=rng.poisson(30))]:
            control.arrived(quality)
        control.control(stations)

    first, most = timed(period, PERIODS)
    solved = control.solved
    mean = _mean(period, PERIODS)
    allow, _ = timed(lambda: control.allow(sample[0], 10.0, stations), REQUESTS)
    data["control"] = {
        "first_median_s": first, "most_s": most, "solved_first": solved, "then_mean_s": mean,
        "solved_then": control.solved - solved, "allow_s": allow,
    }  # fmt: skip
    lines += [
        "",
        f"Control with 8 nodes, 8 levels, 8 classes, Poisson arrivals at 30/s: of the first {PERIODS} periods the median takes"
        f" {1000 * first:.2f} ms and the longest {1000 * most:.0f} ms ({solved} plans made); the next {PERIODS} take"
        f" {1000 * mean:.2f} ms on average ({control.solved - solved} made), {mean:.2%} of a core at a period of a second."
        f" A request's allowed levels take {1e6 * allow:.0f} us.",
    ]
    return "\n".join(lines) + "\n", data


def _mean(act: Callable[[], Any], rounds: int) -> float:
    started = time.thread_time()
    for _ in range(rounds):
        act()
    return (time.thread_time() - started) / rounds
