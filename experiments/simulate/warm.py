"""The start that the learned policy ships with, and what it is worth where the nodes are others.

learn   router and bandit with the gateway's own defaults, on train prompts in a config's world -> a bandit's file
check   in another deployment's nodes, on validation prompts: warm, cold, and policies that learn nothing
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.simulate.environment import Simulation
from experiments.simulate.scheduling import Bench
from experiments.simulate.world import World
from experiments.statistics import standard_error
from scheduler.baselines import load_policy
from scheduler.learned import Learned
from scheduler.policy import Policy

SPANS = ((0, 100), (100, 200), (200, 500), (500, 1000))  # requests since the start
STREAM = 2001  # seeds of requests that neither the search (1001 ..) nor the table (0 ..) has met


def learn(bench: Bench, out: Path, requests: int, options: dict[str, Any]) -> int:
    """Write what a bandit has learned after so many requests; how many of them taught it. `options`: of the policy."""
    learned, seed = bench.learned(options, STREAM), STREAM
    simulation = Simulation(bench.world(None), bench.scores, bench.reward)
    simulation.run(learned, bench.requests(bench.config.splits[0], requests, seed), seed)
    learned.bandit.save(out)  # type: ignore[attr-defined]
    return learned.bandit.learned  # type: ignore[attr-defined]


def check(
    bench: Bench, model: Path, deployment: Path, seeds: int, options: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Mean reward over each of SPANS, policy -> (seeds, spans)."""
    from nodes.deployment import read_deployment

    nodes = read_deployment(deployment).nodes
    spec = msgspec.structs.replace(bench.spec, name=deployment.stem, nodes=nodes, weather={})
    simulation = Simulation(World(spec, bench.scores.programs), bench.scores, bench.reward)

    def warm(seed: int) -> Learned:
        return bench.learned(options, seed, model)

    made: dict[str, Callable[[int], Policy]] = {
        "warm": warm, "cold": lambda seed: bench.learned(options, seed),
        "least-finish-time": lambda _: load_policy("least-finish-time"),
        "random": lambda seed: load_policy("random", seed=seed),
    }  # fmt: skip
    found: dict[str, list[list[float]]] = {name: [] for name in made}
    for seed in range(STREAM + 1, STREAM + 1 + seeds):
        asked = bench.requests(bench.config.splits[1], SPANS[-1][1], seed)
        for name, make in made.items():
            rewards = np.array([row.reward for row in simulation.run(make(seed), asked, seed)], float)
            found[name].append([float(np.nanmean(rewards[first:last])) for first, last in SPANS])
        say(f"seed {seed}: " + ", ".join(f"{name} {found[name][-1][0]:.3f}" for name in made))
    return found


def table(found: dict[str, Any], learned: int, deployment: Path) -> str:
    """Markdown: mean reward a span, with the standard error over seeds."""
    lines = [
        f"Learned from {learned} requests of train prompts in the world of configs/experiments/scheduling.yaml; judged on"
        f" validation prompts on the nodes of {deployment}, which it has not met. Mean reward, and standard error over"
        f" {len(next(iter(found.values())))} streams of requests:",
        "",
        "| policy | " + " | ".join(f"requests {first} to {last}" for first, last in SPANS) + " |",
        "| --- |" + " --- |" * len(SPANS),
    ]
    for name, rows in found.items():
        values = np.array(rows)
        cells = [f"{of_span.mean():.3f} ± {standard_error(of_span):.3f}" for of_span in values.T]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
