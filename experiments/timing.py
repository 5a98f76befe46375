"""Times of a run, in passes of their own: each program as a user would run it, and each member's step-time curve.

Latency is at batch 1, programs interleaved so that a drifting machine drifts for all. A link's transfer time is
computed from the bytes that the program sends, drawn with the link's jitter; nothing was sent on a socket here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from relay.errors import BadRequest
from scheduler.links import LinkProfile, find_link
from scheduler.message_sizes import MessageSizes, bytes_sent, computed_sizes, real_sizes

if TYPE_CHECKING:
    from experiments.run import Prepared
    from relay.family_spec import FamilySpec
    from relay.pipeline import RelayPipeline
    from relay.program import Program

LATENCY = "latency, batch 1"
CURVE = "step time of a batch"


def time_family(prepared: Prepared, family: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time rows and curve rows of one family."""
    config, pipe = prepared.config, prepared.pipes[family]
    assert config.times is not None
    facts = prepared.facts["provenance"]
    where = {
        "config_hash": prepared.hash, "family": pipe.family.name, "threads": torch.get_num_threads(),
        "machine": facts["processor"] if facts["accelerator"] == "none" else facts["accelerator"],
    }  # fmt: skip
    curves = [
        where | {"member": member, "batch": batch, "measure": CURVE, "step_s": seconds}
        for member in ("large", "small")
        for batch, seconds in step_curve(pipe, member, config.times.curve).items()
    ]
    mini = next((row["step_s"] for row in curves if row["member"] == "large" and row["batch"] == 1), None)
    links = [link_for(entry, pipe.family.spec, mini) for entry in config.links]
    prompt = prepared.prompts[0][-1].text
    rows = []
    for program, rounds in stage_times(pipe, prompt, prepared.programs[family], config.times.repeats).items():
        for r, stages in enumerate(rounds):
            rows += [
                where | {"method": "program", "program": str(program), "measure": LATENCY, "round": r} | stages | sent
                for sent in _over_links(program, links, stages, r)
            ]
    rows += _baseline_times(prepared, pipe, prompt, where)
    return rows, curves


def stage_times(
    pipe: RelayPipeline, prompt: str, programs: list[Program], repeats: int
) -> dict[Program, list[dict[str, float]]]:
    """For each program, seconds of each stage in each round, after one warm-up round."""
    found: dict[Program, list[dict[str, float]]] = {program: [] for program in programs}
    for r in range(repeats + 1):
        for program in programs:
            timings = pipe(prompt, program=program, seed=r, output_type="np").timings
            denoise = {"large": 0.0, "small": 0.0}
            for stage, seconds in timings.items():
                if stage.startswith("denoise"):
                    denoise[stage.split()[-1]] += seconds
            if r:
                found[program].append(
                    {"encode_s": timings["encode"], "large_s": denoise["large"], "small_s": denoise["small"],
                     "handoff_s": timings.get("handoff", 0.0), "decode_s": timings["decode"]}
                )  # fmt: skip
    return found


@torch.inference_mode()
def step_curve(pipe: RelayPipeline, member: str, batches: Sequence[int], repeats: int = 5) -> dict[int, float]:
    """Median seconds of one guided step at each batch size, after one that warms up."""
    family = pipe.family
    size, spec = family.spec.sizes.default, family.spec.members[member]
    schedule = family.schedule(member, spec.steps)
    denoiser, found = family.denoiser(member), {}
    for batch in batches:
        cond = family.text.encode(["a red circle"] * batch, None, True, size).to(denoiser.device, denoiser.dtype)
        x = family.initial_noise(batch, size, [torch.Generator().manual_seed(i) for i in range(batch)])
        x = (x * float(schedule.init_noise_sigma)).to(denoiser.device)
        sigma = torch.full((batch,), float(schedule.sigmas[0]))
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            denoiser(x, sigma, cond, spec.guidance).sum().item()  # an accelerator has finished when its result is read
            times.append(time.perf_counter() - started)
        found[batch] = statistics.median(times[1:])
    return found


def link_for(entry: Any, spec: FamilySpec, mini_step_s: float | None) -> tuple[LinkProfile, MessageSizes]:
    """A config's link, and the sizes that its messages are charged. In `scaled: {real_step_s: ..., source: ...}` the mini
    step is left to what this run measured; `real_step_s` may be one number, or one a family; `stands_for` names the real
    family whose sizes count where this one's name does not say it.
    """
    if not isinstance(entry, dict) or "scaled" not in entry:
        return find_link(entry), computed_sizes(spec)
    scaled = dict(entry["scaled"])
    stands_for = scaled.pop("stands_for", spec.name)
    if isinstance(real := scaled.get("real_step_s"), dict):
        if spec.name not in real:
            raise BadRequest(f"link {entry.get('name', entry.get('like'))}: scaled.real_step_s has no {spec.name}")
        scaled["real_step_s"] = real[spec.name]
    if "mini_step_s" not in scaled:
        if mini_step_s is None:
            raise BadRequest("a scaled link needs the step time at batch 1: put 1 into times.curve")
        scaled["mini_step_s"] = mini_step_s
    return find_link(entry | {"scaled": scaled}), real_sizes(stands_for)


def _over_links(
    program: Program, links: list[tuple[LinkProfile, MessageSizes]], stages: dict[str, float], r: int
) -> list[dict[str, Any]]:
    """The row's network columns: one entry without a network, then one a link."""
    compute = sum(stages.values())
    rows: list[dict[str, Any]] = [
        {"link": "none", "link_kind": "none", "transfer_s": 0.0, "return_s": 0.0, "end_to_end_s": compute}
    ]
    for link, sizes in links:
        # The same draws for every program of a round: programs are compared on one state of the network.
        rng = np.random.default_rng((r, 71))
        spent = {"image": 0.0, "other": 0.0}
        for message in bytes_sent(program, sizes):
            spent["image" if message.kind == "image" else "other"] += link.sample(message.bytes, rng)
        rows.append(
            {"link": link.describe(), "link_kind": link.kind, "transfer_s": spent["other"], "return_s": spent["image"],
             "end_to_end_s": compute + sum(spent.values())}
        )  # fmt: skip
    return rows


def _baseline_times(
    prepared: Prepared, pipe: RelayPipeline, prompt: str, where: dict[str, Any]
) -> list[dict[str, Any]]:
    """Denoising and whole time of each baseline at batch 1; no network, since each runs where the large member is."""
    assert prepared.config.times is not None
    rows = []
    for baseline in prepared.baselines:
        if baseline.applies(pipe.family) is not None:
            continue
        for setting in baseline.settings(pipe.family):
            for r in range(prepared.config.times.repeats + 1):
                started = time.perf_counter()
                result = baseline.run(pipe.family, [prompt], [r], setting)
                whole = time.perf_counter() - started
                if r:
                    rows.append(
                        where
                        | {"method": baseline.name, "program": f"{baseline.name}[{setting.label}]", "measure": LATENCY,
                           "link": "none", "link_kind": "none", "round": r - 1, "large_s": result.denoising_s,
                           "end_to_end_s": whole}
                    )  # fmt: skip
    return rows
