"""Times of a run, in passes of their own: each program as a user would run it, and each member's step-time curve.

Latency is at batch 1, programs and baselines interleaved so that a drifting machine drifts for all. A link's transfer
time is computed from the bytes that the program sends, drawn with the link's jitter; nothing was sent on a socket here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from experiments.links import link_for
from experiments.provenance import machine
from relay.errors import BadRequest
from relay.step_times import step_curve
from scheduler.links import LinkProfile
from scheduler.message_sizes import Message, MessageSizes, bytes_sent, sent_along

if TYPE_CHECKING:
    from experiments.baselines.points import Point
    from experiments.prepare import Prepared
    from relay.family import Family
    from relay.pipeline import RelayOutput, RelayPipeline
    from relay.program import Program

LATENCY = "latency, batch 1"
CURVE = "step time of a batch"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Timed:
    """What is timed alone: a program, or a baseline at one setting."""

    method: str
    program: str  # as rows name it
    sends: Callable[[MessageSizes], list[Message]]
    measure: Callable[[int], dict[str, float]]  # seed -> seconds of its stages, or of denoising and the whole


def time_family(prepared: Prepared, family: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time rows and curve rows of one family."""
    config, pipe = prepared.config, prepared.pipes[family]
    assert config.times is not None
    where = {
        "config_hash": prepared.hash, "family": pipe.family.name, "threads": torch.get_num_threads(),
        "machine": machine(prepared.facts["provenance"]), "dtype": prepared.facts["dtypes"][family],
    }  # fmt: skip
    measured = {member: step_curve(pipe.family, member, config.times.curve) for member in ("large", "small")}
    curves = [
        where | {"member": member, "batch": batch, "measure": CURVE, "step_s": seconds}
        for member, curve in measured.items()
        for batch, seconds in curve.items()
    ]
    links = [link_for(entry, pipe.family.spec, measured["large"].get(1)) for entry in config.links]
    rows = []
    for r in range(config.times.repeats + 1):
        for timed in _all_timed(prepared, family):
            stages = timed.measure(r)
            if r == 0:
                continue  # warms up, and lets a cache measure what it needs once
            compute = stages.get("end_to_end_s", sum(stages.values()))
            rows += [
                where | {"method": timed.method, "program": timed.program, "measure": LATENCY, "round": r - 1}
                | stages | sent
                for sent in _over_links(timed.sends, links, compute, r - 1)
            ]  # fmt: skip
    return rows, curves


def _all_timed(prepared: Prepared, family: str) -> list[Timed]:
    """Every program and every setting of a baseline, on the first workload's last prompt."""
    pipe, prompt = prepared.pipes[family], prepared.prompts[0][-1].text
    codec = pipe.family.spec.codec
    return [
        *(Timed("program", str(program), partial(bytes_sent, program), partial(_program_stages, pipe, prompt, program))
          for program in prepared.programs[family]),
        *(Timed(point.baseline.name, point.text, partial(sent_along, point.setting.members, codec),
                partial(_point_stages, point, pipe.family, prompt))
          for point in prepared.points[family]),
    ]  # fmt: skip


def _program_stages(pipe: RelayPipeline, prompt: str, program: Program, seed: int) -> dict[str, float]:
    return _stages(pipe(prompt, program=program, seed=seed))


def _point_stages(point: Point, family: Family, prompt: str, seed: int) -> dict[str, float]:
    """Denoising (of both members, as `large_s`) and whole time of a baseline at batch 1."""
    started = time.perf_counter()
    result = point.baseline.run(family, [prompt], [seed], point.setting)
    return {"large_s": result.denoising_s, "end_to_end_s": time.perf_counter() - started}


def timed_rounds(
    pipe: RelayPipeline, prompt: str, programs: Sequence[Program], repeats: int, progress: Progress | None = None
) -> Iterator[tuple[Program, RelayOutput, float]]:
    """Each program at batch 1 with its whole seconds, interleaved over `repeats` rounds after one that warms up."""
    for r in range(repeats + 1):
        for program in programs:
            started = time.perf_counter()
            result = pipe(prompt, program=program, seed=r)
            if r:
                yield program, result, time.perf_counter() - started
        if progress:
            progress(r, repeats)


def time_programs(
    pipe: RelayPipeline, prompt: str, programs: Sequence[Program], repeats: int = 5, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """Median latency of each program (its text form) in seconds: denoising and end to end."""
    denoising: dict[str, list[float]] = {str(p): [] for p in programs}
    whole: dict[str, list[float]] = {str(p): [] for p in programs}
    for program, result, seconds in timed_rounds(pipe, prompt, programs, repeats, progress):
        denoising[str(program)].append(sum(result.denoising_s.values()))
        whole[str(program)].append(seconds)
    return {
        text: {"denoising_s": statistics.median(denoising[text]), "end_to_end_s": statistics.median(whole[text])}
        for text in denoising
    }


def stage_times(
    pipe: RelayPipeline, prompt: str, programs: Sequence[Program], repeats: int
) -> dict[Program, list[dict[str, float]]]:
    """For each program, seconds of each stage in each round."""
    found: dict[Program, list[dict[str, float]]] = {program: [] for program in programs}
    for program, result, _ in timed_rounds(pipe, prompt, programs, repeats):
        found[program].append(_stages(result))
    return found


def _stages(result: RelayOutput) -> dict[str, float]:
    timings, denoise = result.timings, result.denoising_s
    return {
        "encode_s": timings["encode"], "large_s": denoise["large"], "small_s": denoise["small"],
        "handoff_s": timings.get("handoff", 0.0), "decode_s": timings["decode"],
    }  # fmt: skip


def batch_sizes(text: str) -> list[int]:
    """The sizes that `--batches` asks for, rising, 1 always among them."""
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise BadRequest(f"--batches {text!r} is not a list of whole numbers from 1, such as 1,2,4,8,16")
    return sorted({1, *numbers})


def _over_links(
    sends: Callable[[MessageSizes], list[Message]],
    links: list[tuple[LinkProfile, MessageSizes]],
    compute: float,
    r: int,
) -> list[dict[str, Any]]:
    """The row's network columns: one entry without a network, then one a link, for the messages that are sent.

    `compute`: seconds of everything but the network.
    """
    rows: list[dict[str, Any]] = [
        {"link": "none", "link_kind": "none", "transfer_s": 0.0, "return_s": 0.0, "end_to_end_s": compute}
    ]
    for link, sizes in links:
        # The same draws for every program of a round: programs are compared on one state of the network.
        rng = np.random.default_rng((r, 71))
        spent = {"image": 0.0, "other": 0.0}
        for message in sends(sizes):
            spent["image" if message.kind == "image" else "other"] += link.sample(message.bytes, rng)
        rows.append(
            {"link": link.describe(), "link_kind": link.kind, "transfer_s": spent["other"], "return_s": spent["image"],
             "end_to_end_s": compute + sum(spent.values())}
        )  # fmt: skip
    return rows
