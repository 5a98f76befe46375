"""Is the simulation right about time? The same requests through real processes and through the simulation.

Each request's program is fixed, so nothing is decided. One edge and one device, one compute thread each and no more nodes
than cores, on this machine. The simulation is given what was measured apart from these requests: each member's step-time
curve, encoding and decoding, and what the service adds to a one-step request; and the moments at which the requests came.
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
from experiments.simulate.scores import Cell, Scores
from experiments.simulate.world import Costs, World, WorldSpec
from experiments.workloads import TimedRequest
from experiments.workloads.prompts import Prompt
from relay.errors import BadRequest, RelayError
from relay.program import Program
from scheduler.drawing import certain
from scheduler.policy import Action, Context, Decision

EDGE, DEVICE = "edge", "phone"
CURVE = (1, 2, 4, 8)


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
    batch: int = 8,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """Both, and a table of their mean times. `load`: share of its time that the edge is busy, had it no batches."""
    import torch

    from nodes.session import quiet_libraries
    from relay.pipeline import RelayPipeline

    if (os.cpu_count() or 1) < 2:
        raise BadRequest("the check runs two busy nodes and needs two cores")
    quiet_libraries()
    torch.set_num_threads(1)
    pipe = RelayPipeline.from_pretrained(family)
    programs = _programs(pipe)
    before = measure(pipe.family)
    times = arrivals(programs, before, requests, load, seed)
    real, overhead = serve(family, programs, times, before, link, seed, batch)
    after = measure(pipe.family)
    costs = _mean_costs(before, after)
    simulated = simulate(pipe.family.name, costs, real, overhead, link, batch)
    drift = after.curves["large"][1] / before.curves["large"][1] - 1
    text, data = compare(real, simulated)
    ground = (
        f"{requests} requests of {family} through real processes and through the simulation: one edge (large), one device"
        f" (small), one thread each, link {link or 'none'}, load {load:g}. The service adds {1000 * overhead:.1f} ms to a"
        f" one-step request; a step of the large member takes {1000 * costs.curves['large'][1]:.1f} ms, and {drift:+.1%} after"
        " the run against before it (the simulation is given the mean of both).\n\n"
    )
    return ground + text, data | {"overhead_s": overhead, "drift": drift, "costs": msgspec.to_builtins(costs)}


def measure(family: Any) -> Costs:
    """What a family's work takes in one thread of this process."""
    from relay.step_times import ends, step_curve

    curves = {member: step_curve(family, member, CURVE, repeats=5) for member in ("large", "small")}
    encode_s, decode_s = ends(family)
    from scheduler.message_sizes import computed_sizes

    sizes = computed_sizes(family.spec)
    return Costs(
        curves=curves, encode_s=encode_s, decode_s=decode_s, handoff_s=0.0005, latent_bytes=sizes.latent,
        image_bytes=sizes.image,
    )  # fmt: skip


def arrivals(programs: Sequence[Program], costs: Costs, count: int, load: float, seed: int) -> list[float]:
    """Poisson arrivals at which the edge is busy for `load` of the time."""
    work = statistics.mean(p.steps["large"] * costs.curves["large"][1] + costs.encode_s for p in programs)
    return np.cumsum(np.random.default_rng(seed).exponential(work / load, size=count)).tolist()


def serve(
    family: str,
    programs: Sequence[Program],
    times: Sequence[float],
    costs: Costs,
    link: str | None,
    seed: int,
    batch: int,
) -> tuple[list[Asked], float]:
    """The requests through a gateway and two nodes, and the seconds that the service adds to a one-step request."""
    from experiments.workloads import load_workload
    from nodes.fleet import fleet

    prompts = [p.text for p in load_workload("scenes").prompts("validation", len(times) + 30, seed)]
    nodes = {
        EDGE: {"role": "edge", "families": {family: ["large"]}, "batch": batch},
        DEVICE: {"role": "device", "families": {family: ["small"]}, "batch": batch} | ({"link": link} if link else {}),
    }
    short = _one_step(programs)
    texts = [str(programs[i % len(programs)]) for i in range(len(times))]

    async def one(asker: Any, prompt: str, program: str, number: int) -> dict[str, Any]:
        job = (await asker.submit({"prompt": prompt, "program": program, "seed": number})).jobs[0]
        told = await asker.wait(job, 600.0)
        if told["stage"] != "done":
            raise RelayError(f"request {number} ended as {told['stage']}: {told['error']}")
        return told

    async def work(asker: Any) -> tuple[list[Asked], float]:
        added = []
        for i in range(30):
            told = await one(asker, prompts[len(times) + i], str(short), i)
            added.append(told["report"]["seconds"] - costs.encode_s - costs.curves["small"][1] - costs.decode_s)
        began = time.perf_counter()
        came = [0.0] * len(times)

        async def timed(i: int) -> dict[str, Any]:
            await asyncio.sleep(max(0.0, began + times[i] - time.perf_counter()))
            came[i] = time.perf_counter() - began
            return await one(asker, prompts[i], texts[i], i)

        ends = await asyncio.gather(*(timed(i) for i in range(len(times))))
        asked = [Asked(came[i], prompts[i], texts[i], ends[i]["report"]["seconds"]) for i in range(len(times))]
        return asked, statistics.median(added[5:])

    with tempfile.TemporaryDirectory() as folder:
        gateway = {"offer": [{"family": family}], "checkpoint_every": 0}
        with fleet(Path(folder) / "check", nodes, gateway) as running:
            return running.ask(work, times[-1] * 3 + 600.0)


def simulate(
    family: str, costs: Costs, asked: Sequence[Asked], overhead_s: float, link: str | None, batch: int
) -> list[float]:
    """Seconds of each request, simulated."""
    nodes = {
        EDGE: {"role": "edge", "families": {family: ["large"]}, "batch": batch},
        DEVICE: {"role": "device", "families": {family: ["small"]}, "batch": batch} | ({"link": link} if link else {}),
    }
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


def _mean_costs(a: Costs, b: Costs) -> Costs:
    curves = {
        member: {batch: (seconds + b.curves[member][batch]) / 2 for batch, seconds in curve.items()}
        for member, curve in a.curves.items()
    }
    return msgspec.structs.replace(
        a, curves=curves, encode_s=(a.encode_s + b.encode_s) / 2, decode_s=(a.decode_s + b.decode_s) / 2
    )
