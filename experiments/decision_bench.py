"""What a decision costs: features, Vowpal Wabbit, the draw, the log, and learning afterwards; by actions on offer.

Nodes' states change at every decision, as they do in a gateway; programs and nodes on offer stay, as they mostly do, and
"first" is the decision after they changed. Nothing is drawn, so no family is needed.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPTS = (
    "a red circle",
    'the word "CAT" in red on a white background',
    "a large red heart at the top left, two small blue dotted circles and a green star at the bottom, on a yellow background",
)
CURVES = {"large": {1: 0.02, 8: 0.09}, "small": {1: 0.006, 8: 0.02}}

app = typer.Typer(add_completion=False)


@app.command()
def decision_bench(
    counts: Annotated[str, typer.Option(help="Actions on offer.")] = "4,16,64,256",
    decisions: Annotated[int, typer.Option(min=100, help="Timed ones, each.")] = 1000,
    out: Annotated[Path, typer.Option(help="A .json lies beside it.")] = Path("docs/results/decision-latency.md"),
) -> None:
    """Time the bandit's decisions, what surrounds them, and the policies that it is compared with."""
    from experiments.provenance import write_result

    rows = [measure(int(count), decisions) for count in counts.split(",")]
    write_result(out, "What a decision costs", table(rows), {"rows": rows})


def measure(count: int, decisions: int) -> dict[str, Any]:
    """Milliseconds, median and 95th percentile, of each part and of each policy."""
    import numpy as np

    from relay.errors import BadRequest
    from scheduler.action_table import ActionTable
    from scheduler.baselines import load_policy
    from scheduler.decision_log import DecisionLog
    from scheduler.features import featurise

    contexts, actions = world(count, 200)
    at = iter(range(10**9))

    def told() -> Any:
        return contexts[next(at) % len(contexts)]

    bandit: Any = load_policy("bandit", seed=0)
    rng = np.random.default_rng(0)
    for _ in range(300):  # weights that are not zero
        bandit.learn(bandit.decide(told(), actions), {"reward": float(np.tanh(rng.normal() / 3))})
    found: dict[str, Any] = {"actions": count, "load": os.getloadavg()[0]}
    found["bandit"] = timed(lambda: bandit.decide(told(), actions), decisions)
    found["features"] = timed(lambda: featurise(told(), actions), decisions)
    found["first"] = timed(lambda: ActionTable(actions).labels, 50)
    waiting = [bandit.decide(told(), actions) for _ in range(decisions)]
    found["learn"] = timed(lambda: bandit.learn(waiting.pop(), {"reward": 0.2}), decisions)
    with tempfile.TemporaryDirectory() as folder:
        log = DecisionLog(Path(folder) / "decisions.db")
        made = [bandit.decide(told(), actions) for _ in range(decisions)]
        found["log"] = timed(lambda: log.write(told(), actions, made.pop()), decisions)
        log.close()
    for name in ("random", "greedy", "linucb", "thompson", "ppo", "sac"):
        try:
            options: dict[str, Any] = {} if name == "greedy" else {"seed": 0}
            policy = load_policy(name, **options | ({"arms": 64} if name in ("ppo", "sac") else {}))
        except BadRequest:
            continue
        found[name] = timed(lambda policy=policy: policy.decide(told(), actions), decisions // 4)  # type: ignore[misc]
    return found


def world(count: int, many: int) -> tuple[list[Any], list[Any]]:
    """Contexts whose nodes are busy in ever new ways, and `count` actions: programs x two edges x up to three devices."""
    import numpy as np

    from relay.program import Leg, Program
    from scheduler.policy import Action, Context, NodeState

    edges, phones = ("edge-1", "edge-2"), ("phone-1", "phone-2", "phone-3")
    actions = []
    for s, family in product(range(1, 28), ("mini-sd3", "mini-sdxl")):
        relay = Program(family, (Leg("large", 28, 0, s), Leg("small", 28, s, 28)), "exact", (4.5, 4.5))
        actions += [Action(relay, nodes) for nodes in product(edges, phones)]
    rng, contexts = np.random.default_rng(1), []
    for i in range(many):
        nodes = {
            name: NodeState(
                name=name, role="device" if name in phones else "edge", batch=8, running=int(rng.integers(9)),
                queued=int(rng.integers(5)), backlog_s=float(rng.exponential(0.5)), round_trip_s=0.02, bytes_per_s=2e6,
                battery=float(rng.random()) if name in phones else None,
                curves=dict.fromkeys(("mini-sd3", "mini-sdxl"), CURVES),
            )
            for name in (*edges, *phones)
        }  # fmt: skip
        sizes = {"mini-sd3": 16_000, "mini-sdxl": 4_000}
        contexts.append(
            Context(
                job=f"job-{i}", prompt=PROMPTS[i % 3], nodes=nodes, preference=float(rng.random()), latent_bytes=sizes,
                image_bytes=sizes,
            )
        )  # fmt: skip
    return contexts, actions[:count]


def timed(act: Callable[[], object], times: int) -> dict[str, float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        taken.append(1e3 * (time.perf_counter() - start))
    taken.sort()
    return {"median": taken[times // 2], "p95": taken[int(times * 0.95)]}


def table(rows: list[dict[str, Any]]) -> str:
    parts = {
        "bandit": "**bandit, a decision**", "features": "of it: features", "first": "more, the first after nodes changed",
        "learn": "bandit, a reward learned", "log": "decision log, a row",
    }  # fmt: skip
    parts |= {name: name for name in ("random", "greedy", "linucb", "thompson", "ppo", "sac") if name in rows[0]}
    lines = [
        "Milliseconds on one core, median (95th percentile), with this many actions on offer; the machine's load average "
        f"was {min(row['load'] for row in rows):.1f} to {max(row['load'] for row in rows):.1f}, which the 95th percentile shows.",
        "", "| | " + " | ".join(str(row["actions"]) for row in rows) + " |", "| --- |" + " --- |" * len(rows),
    ]  # fmt: skip
    for key, name in parts.items():
        cells = [f"{row[key]['median']:.3f} ({row[key]['p95']:.3f})" for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from nodes.cli import run

    run(app)
