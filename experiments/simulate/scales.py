"""Scales of the reward, from what the random policy's answers are worth in a world (`scheduler.reward.calibrate`)."""

from __future__ import annotations

import msgspec

from experiments.simulate.environment import Simulation
from experiments.simulate.scheduling import Bench
from scheduler.baselines import load_policy
from scheduler.reward import COSTS, SCORES, calibrate, saturated


def propose(bench: Bench, requests: int, split: str, arms: str | None) -> str:
    """The scales as YAML, and how many rewards would lie where the tanh is flat."""
    simulation = Simulation(bench.world(arms), bench.scores, bench.reward)
    rows = simulation.run(load_policy("random", seed=0), bench.requests(split, requests, 0), 0)
    terms = []
    for row in rows:
        program = row.action.program
        costs = {
            "seconds": row.seconds, "memory_mb": bench.reward.memory_of(program), "device_steps": program.steps["small"],
        }  # fmt: skip
        scores = {ours: row.scores.get(theirs) for theirs, ours in SCORES.items() if ours in bench.reward.scales}
        terms.append({**scores, **costs})
    scales = calibrate(terms)
    new = msgspec.structs.replace(bench.reward, scales=bench.reward.scales | scales)
    sums = [sum(v * bench.reward.scales[k] / new.scales[k] for k, v in row.terms.items()) for row in rows if row.terms]
    lines = [f"# random policy, {requests} requests of {split} prompts, world {bench.spec.name}", "scales:"]
    lines += [f"  {name}: {value:g}" for name, value in scales.items()]
    lines.append(
        f"# with these {saturated(sums):.1%} of its rewards lie where the tanh is flat; costs: {', '.join(COSTS)}"
    )
    return "\n".join(lines)
