"""What off-policy evaluation is worth here: intervals against the truth, and the bias where actions change later queues.

logs     the random policy in a world, many short logs of it -> `scheduler.replay` says what a target would have earned
truth    the target itself in the same world, on many more requests
rare     requests so far apart that nothing of one is there when the next comes: contexts are exogenous, and a 95 %
         interval has to hold the truth in 95 % of the logs
loaded   the config's own arrivals: the logging policy's queues are not the target's, which no log can tell. The
         difference is the bias of such an evaluation, and why policies are compared in the environment
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from experiments.simulate.environment import Row, Simulation
from experiments.simulate.scheduling import Bench
from experiments.simulate.stream import stream
from experiments.simulate.views import Frozen
from experiments.simulate.world import World
from experiments.statistics import standard_error
from relay.errors import BadRequest
from scheduler.bandit import Bandit
from scheduler.baselines import load_policy
from scheduler.decision_log import Entry
from scheduler.features import VERSION
from scheduler.policy import Policy
from scheduler.replay import Estimate, replay

RARE_PER_S = 1 / 300  # beside links that change within a minute or so
ESTIMATORS = ("ips", "snips", "dr")


def measure(
    bench: Bench, arms: str, family: str, logs: int, rows: int, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """World and policy -> truth with its standard error, mean estimate, coverage and effective size of each estimator."""
    programs = [p for p in bench.world(arms).programs if p.family == family]
    if len(programs) < 2:
        raise BadRequest(f"arms {arms!r} have {len(programs)} programs of {family}; an evaluation needs a choice")
    scale = bench.reward.scales["seconds"]
    bandit, config = Bandit(time_scale_s=scale, seed=0), bench.config
    learnt = Simulation(World(bench.spec, programs), bench.scores, bench.reward)
    learnt.run(bandit, stream(config.asking, bench.scores, config.splits[0], rows, 0), 0)
    targets: dict[str, Any] = {"greedy": load_policy("greedy", handoff=0.3), "bandit, frozen": bandit}
    found: dict[str, dict[str, Any]] = {}
    rare = msgspec.structs.replace(config.asking, arrivals={"arrivals": "poisson", "rate_per_s": RARE_PER_S})
    idle = msgspec.structs.replace(bench.spec, heartbeat_s=1 / RARE_PER_S)  # nobody listens for minutes
    for name, asking, spec in (("rare", rare, idle), ("loaded", config.asking, bench.spec)):
        world = World(spec, programs)
        simulation = Simulation(world, bench.scores, bench.reward, keep_contexts=True)

        def run(policy: Policy, seed: int, on: Simulation = simulation, asking: Any = asking) -> list[Row]:
            return on.run(policy, stream(asking, bench.scores, config.splits[1], rows, seed), seed)

        written = [entries(run(load_policy("random", seed=seed), seed), world) for seed in range(logs)]
        for policy, target in targets.items():
            truths = [_mean(run(Frozen(target), 10_000 + seed)) for seed in range(logs)]
            reports = [replay(log, target, time_scale_s=scale, least_ess=1, least_support=0) for log in written]
            row = found[f"{name}, {policy}"] = {
                "rows": rows, "logs": logs, "actions": len(world.actions()), "truth": float(np.mean(truths)),
                "truth_error": standard_error(truths), "logged": float(np.mean([report.logged.value for report in reports])),
                "effective": float(np.mean([report.effective for report in reports])),
            }  # fmt: skip
            row |= {e: _summary([getattr(report, e) for report in reports], row["truth"]) for e in ESTIMATORS}
            means = ", ".join(f"{e} {row[e]['mean']:.4f}" for e in ESTIMATORS)
            say(f"{name}, {policy}: truth {row['truth']:.4f}, {means}")
    return found


def _summary(found: Sequence[Estimate], truth: float) -> dict[str, float]:
    values = [each.value for each in found]
    return {
        "mean": float(np.mean(values)), "error": standard_error(values),
        "coverage": float(np.mean([each.low <= truth <= each.high for each in found])),
        "width": float(np.mean([each.high - each.low for each in found])),
    }  # fmt: skip


def entries(rows: Sequence[Row], world: World) -> list[Entry]:
    """Simulated decisions as the gateway's log holds them."""
    made = []
    for row in rows:
        assert row.context is not None
        assert row.decision is not None
        actions = world.actions(row.device)
        made.append(
            Entry(
                id=row.decision.id, at=row.arrival_s, policy=row.decision.policy, context=row.context, actions=actions,
                chosen=actions.index(row.action), probability=row.probability, distribution=row.decision.distribution,
                notes={}, marks=(), router=None, bandit=None, features=VERSION, stage=row.stage, seconds=row.seconds,
                error=None, terms={}, missing=(), reward=row.reward,
            )
        )  # fmt: skip
    return made


def table(found: dict[str, dict[str, Any]]) -> str:
    first = next(iter(found.values()))
    lines = [
        f"{first['logs']} logs of {first['rows']} requests that the random policy decided among {first['actions']} actions;"
        " truth: the mean reward of the policy itself on as many other requests. *rare*: requests minutes apart, so that"
        " nothing is left of one when the next comes; *loaded*: the arrivals of the config. *off*: mean estimate less"
        " truth, with its standard error; *held*: logs whose 95 % interval has the truth in it.",
        "",
        "| world, policy | truth | logging policy | effective rows | "
        + " | ".join(f"{e.upper()} off | held" for e in ESTIMATORS) + " |",
        "| --- | --- | --- | --- |" + " --- | --- |" * len(ESTIMATORS),
    ]  # fmt: skip
    for name, row in found.items():
        cells = [f"{row['truth']:.4f} ± {row['truth_error']:.4f}", f"{row['logged']:.4f}", f"{row['effective']:.0f}"]
        for e in ESTIMATORS:
            off = row[e]["mean"] - row["truth"]
            error = (row[e]["error"] ** 2 + row["truth_error"] ** 2) ** 0.5
            cells += [f"{off:+.4f} ± {error:.4f}", f"{row[e]['coverage']:.0%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(rows: Sequence[Row]) -> float:
    return float(np.mean([row.reward for row in rows if row.reward is not None]))
