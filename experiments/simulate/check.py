"""Is the simulation right about time? The same requests through real processes and through the simulation.

Each request's program is fixed, so nothing is decided. One edge and one device, one compute thread each and no more nodes
than cores, on this machine. The simulation is given what was measured apart from these requests: the step-time curves,
encoding and decoding that the nodes registered, and what the service adds to a one-step request; and the moments at which
the requests came. Both nodes have a `pace`: cores of one machine share caches and memory, so that of two busy nodes each is
slower than it is alone, which two machines would not be; a paced step ends when the slow machine's would, whoever is beside.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.simulate.environment import Simulation
from experiments.simulate.registered import registered_costs
from experiments.simulate.scores import Cell, Scores
from experiments.simulate.world import Costs, World, WorldSpec
from experiments.workloads import TimedRequest
from experiments.workloads.prompts import Prompt
from relay.errors import BadRequest, RelayError
from relay.program import Program
from scheduler.drawing import certain
from scheduler.policy import Action, Context, Decision

EDGE, DEVICE = "edge", "phone"
PACE = 2.0
WARM, SHORT = 5, 30  # one-step requests: the first ones are not counted


class Pinned:
    """The program that each request names, on the first nodes on offer: `programs[i]` for request i."""

    name = "pinned"

    def __init__(self, programs: Sequence[str]):
        self.programs = programs

    def decide(self, context: Context, actions: Sequence[Action]) -> Decision:
        wanted = self.programs[int(context.job.removeprefix("job-"))]
        return certain(self.name, actions, next(i for i, a in enumerate(actions) if str(a.program) == wanted))

    def learn(self, decision: Decision, outcome: Any) -> None:
        """It does not."""


@dataclass(frozen=True)
class Asked:
    """One request of the check: when it was accepted (s from the first), what, and how long it took."""

    arrival_s: float
    prompt: str
    program: str
    seconds: float


def main(
    family: str = "mini-sd3", requests: int = 200, load: float = 0.5, link: str | None = None, seed: int = 0,
    batch: int = 8, pace: float = PACE,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Both, and a table of their mean times. `load`: share of its time that the edge is busy, had it no batches."""
    from nodes.session import quiet_libraries
    from relay.pipeline import RelayPipeline

    if (os.cpu_count() or 1) < 2:
        raise BadRequest("the check runs two busy nodes and needs two cores")
    quiet_libraries()
    programs = _programs(RelayPipeline.from_pretrained(family))
    fleet = nodes_of(family, link, batch, pace)
    real, costs, overhead = serve(family, programs, fleet, requests, load, seed)
    simulated = simulate(programs[0].family, costs, real, overhead, fleet)
    text, data = compare(real, simulated)
    large, small = (1000 * costs.curves[member][1] for member in ("large", "small"))
    ground = (
        f"{requests} requests of {family} through real processes and through the simulation: one edge (large), one device"
        f" (small), one thread each, pace {pace:g}, link {link or 'none'}, load {load:g}. The service adds"
        f" {1000 * overhead:.1f} ms to a one-step request; a step at pace 1 takes {large:.1f} ms (large) and {small:.1f} ms"
        " (small), as the nodes registered.\n\n"
    )
    return ground + text, data | {"overhead_s": overhead, "costs": msgspec.to_builtins(costs), "pace": pace}


def nodes_of(family: str, link: str | None, batch: int, pace: float) -> dict[str, dict[str, Any]]:
    """As in a deployment's YAML."""
    both: dict[str, Any] = {"batch": batch, "pace": pace, "threads": 1}
    return {
        EDGE: {"role": "edge", "families": {family: ["large"]}, **both},
        DEVICE: {"role": "device", "families": {family: ["small"]}, **both, **({"link": link} if link else {})},
    }


def arrivals(programs: Sequence[Program], costs: Costs, pace: float, count: int, load: float, seed: int) -> list[float]:
    """Poisson arrivals at which the edge is busy for `load` of the time."""
    work = statistics.mean(p.steps["large"] * pace * costs.curves["large"][1] + costs.encode_s for p in programs)
    return np.cumsum(np.random.default_rng(seed).exponential(work / load, size=count)).tolist()


def serve(
    family: str, programs: Sequence[Program], nodes: dict[str, dict[str, Any]], count: int, load: float, seed: int
) -> tuple[list[Asked], Costs, float]:
    """The requests through a gateway and its nodes, what these registered, and the seconds that the service adds to a
    one-step request."""
    from experiments.workloads import load_workload
    from nodes.fleet import fleet

    prompts = [p.text for p in load_workload("scenes").prompts("validation", count + SHORT, seed)]
    short, texts = str(_one_step(programs)), [str(programs[i % len(programs)]) for i in range(count)]

    async def one(asker: Any, prompt: str, program: str, number: int) -> float:
        """Seconds of its report."""
        job = (await asker.submit({"prompt": prompt, "program": program, "seed": number})).jobs[0]
        told = await asker.wait(job, 600.0)
        if told["stage"] != "done":
            raise RelayError(f"request {number} ended as {told['stage']}: {told['error']}")
        return float(told["report"]["seconds"])

    async def alone(asker: Any) -> list[float]:
        return [await one(asker, prompts[count + i], short, i) for i in range(SHORT)]

    async def asked(asker: Any, times: Sequence[float]) -> list[Asked]:
        began = time.perf_counter()

        async def timed(i: int) -> Asked:
            await asyncio.sleep(max(0.0, began + times[i] - time.perf_counter()))
            came = time.perf_counter() - began
            return Asked(came, prompts[i], texts[i], await one(asker, prompts[i], texts[i], i))

        return await asyncio.gather(*(timed(i) for i in range(count)))

    with tempfile.TemporaryDirectory() as folder:
        gateway = {"offer": [{"family": family}], "checkpoint_every": 0}
        with fleet(Path(folder) / "check", nodes, gateway) as running:
            took = running.ask(alone, 600.0)
            costs = registered_costs(running, family, {name: node["pace"] for name, node in nodes.items()})
            step = nodes[DEVICE]["pace"] * costs.curves["small"][1]
            added = statistics.median(took[WARM:]) - costs.encode_s - step - costs.decode_s
            times = arrivals(programs, costs, nodes[EDGE]["pace"], count, load, seed)
            real = running.ask(lambda asker: asked(asker, times), times[-1] * 3 + 600.0)
    return real, costs, max(0.0, added)


def simulate(
    family: str, costs: Costs, asked: Sequence[Asked], overhead_s: float, nodes: dict[str, dict[str, Any]]
) -> list[float]:
    """Seconds of each request, simulated."""
    timing = {family: msgspec.to_builtins(costs)}
    spec = msgspec.convert({"nodes": nodes, "timing": timing, "overhead_s": overhead_s}, WorldSpec)
    texts = list(dict.fromkeys(each.program for each in asked))
    prompts = {each.prompt: Prompt(each.prompt, "?", None, each.prompt) for each in asked}
    cells: dict[str, dict[str, tuple[Cell, ...]]] = {text: {prompt: ({},) for prompt in prompts} for text in texts}
    programs = [Program.parse(text) for text in texts]
    scores = Scores(tuple(programs), {"check": tuple(prompts.values())}, cells, ())
    requests = [TimedRequest(i, each.arrival_s, prompts[each.prompt], 0.5, None, i) for i, each in enumerate(asked)]
    order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
    simulation = Simulation(World(spec, programs), scores, lambda known: -known["seconds"])
    rows = simulation.run(Pinned([each.program for each in asked]), [requests[i] for i in order])
    seconds = {row.index: row.seconds for row in rows}
    return [seconds[i] for i in range(len(asked))]


def compare(real: Sequence[Asked], simulated: Sequence[float]) -> tuple[str, dict[str, Any]]:
    """A table of mean and median seconds by program, and of all."""
    groups: dict[str, list[int]] = {}
    for i, each in enumerate(real):
        groups.setdefault(each.program.split("/match")[0], []).append(i)
    groups["all"] = list(range(len(real)))
    lines = [
        "| program | requests | real, mean | simulated, mean | off by | real, median | simulated, median |",
        "|" + " --- |" * 7,
    ]
    data = {}
    for name, indices in groups.items():
        a, b = [real[i].seconds for i in indices], [simulated[i] for i in indices]
        off = statistics.mean(b) / statistics.mean(a) - 1
        data[name] = {"requests": len(a), "real_s": statistics.mean(a), "simulated_s": statistics.mean(b), "off": off}
        lines.append(
            f"| {name} | {len(a)} | {statistics.mean(a):.3f} s | {statistics.mean(b):.3f} s | {off:+.1%} |"
            f" {statistics.median(a):.3f} s | {statistics.median(b):.3f} s |"
        )
    return "\n".join(lines) + "\n", {
        "programs": data,
        "rows": [(*_plain(a), b) for a, b in zip(real, simulated, strict=True)],
    }


def _plain(each: Asked) -> tuple[float, str, float]:
    return each.arrival_s, each.program, each.seconds


def _programs(pipe: Any) -> list[Program]:
    """Full-cloud, two relays and edge-only, in turn."""
    total = pipe.family.spec.members["large"].steps
    return [
        pipe.plan(handoff=total), pipe.plan(handoff=round(0.3 * total), matching="exact"),
        pipe.plan(handoff=round(0.5 * total), matching="exact"), pipe.plan(handoff=0),
    ]  # fmt: skip


def _one_step(programs: Sequence[Program]) -> Program:
    """Edge-only with a single step."""
    family, guidance = programs[-1].family, programs[-1].guidance[0]
    return Program.parse(f"{family}/small:1:0-1/match=exact/codec=fp16/guidance={guidance:g}/conditioning=encode")
