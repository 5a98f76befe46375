"""Throughput and latency of the step engine under concurrent requests, against one after the other and static batches.

In one process, the denoising of the large member alone, everything encoded before and nothing decoded. N askers each
send their next request as soon as the last is answered; requests differ in s. Three ways to serve them, taken in turns
in one run, with the batch curve measured again in each turn:

    engine               `relay.engine.StepEngine`
    one after the other  first come, first served, each alone through `walk_leg`: a stand-in for diffusers pipelines
                         of prefixes behind a queue, whose loop costs the same within a few per cent (see bench.md)
    static batches       all that waits is a batch, which runs until its longest is done; all are answered at its end

The share of the curve is the engine's images x steps a second over max B / t(B), B up to N: what perfect batching of
this machine would make.

The command then asks the same of real HTTP servers, with whole programs, encoding and decoding: `experiments.served_bench`;
and how far company moves a picture: `experiments.company`.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experiments.served_bench import MIXES

if TYPE_CHECKING:
    import torch

    from relay.conditioning import Conditioning
    from relay.denoisers import Denoiser

FAMILIES = ("mini-sd3", "mini-sdxl")
CONCURRENCY = (1, 2, 4, 8, 16, 32)
MEMBER = "large"


@dataclass(frozen=True)
class Request:
    """One image: s steps from its own noise."""

    latent: torch.Tensor  # (1, C, h, w)
    steps: int


@dataclass(frozen=True)
class Served:
    """A request that was answered; seconds by time.monotonic()."""

    asked: float
    answered: float
    image_steps: int  # done for all requests by then, those under way included


@dataclass(frozen=True)
class Bench:
    """What the three ways share."""

    denoiser: Denoiser
    sigmas: Sequence[float]
    cond: Conditioning  # of one image
    guidance: float
    curve: dict[int, float]  # as a node measures it once, before it serves
    max_batch: int


Way = Callable[[Bench, Iterator[Request], int, int], list[Served]]


def engine_bench(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/engine.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    concurrency: Annotated[str, typer.Option(help="Askers at once, with commas between.")] = ",".join(
        map(str, CONCURRENCY)
    ),
    steps: Annotated[int, typer.Option(help="T, the length of the schedule.")] = 10,
    repeats: Annotated[int, typer.Option(help="Turns; medians over them are shown.")] = 3,
    threads: int = 2,
    device: str | None = None,
    dtype: str | None = None,
    served: Annotated[bool, typer.Option(help="Behind HTTP as well, in fp32 on the CPU.")] = True,
    service: Annotated[bool, typer.Option(help="And behind our gateway.")] = True,
) -> None:
    """Requests per second and median latency of the step engine, as ratios to two other ways of serving."""
    import torch

    from experiments import company, served_bench
    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    askers = [int(part) for part in concurrency.split(",")]
    results, text = {}, []
    for name in family or FAMILIES:
        results[name] = measure(name, askers, steps, repeats, device, dtype)
        text.append(table(name, results[name]))
        if served:
            results[name]["served"] = served_bench.measure_served(name, askers, steps, repeats, threads, service)
            text.append(served_bench.table(name, results[name]["served"]))
        results[name]["company"] = {kind: company.measure_company(name, kind, steps) for kind in ("fp32", "bf16")}
    text.append(company.table({name: result["company"] for name, result in results.items()}))
    write_result(out, "Step engine", "\n".join(text), results)


def measure(
    name: str, askers: list[int], steps: int, repeats: int, device: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """All figures of one family: per turn the curve, per mix and number of askers each way's throughput and latency."""
    import torch

    from relay.pipeline import RelayPipeline
    from relay.step_times import PROMPT, step_curve

    pipe = RelayPipeline.from_pretrained(name, device=device, torch_dtype=dtype)
    family, size = pipe.family, pipe.family.spec.sizes.default
    sizes = [b for b in CONCURRENCY if b <= max(askers)]
    with torch.inference_mode():
        bench = Bench(
            denoiser=family.denoiser(MEMBER),
            sigmas=family.schedules(size)[MEMBER](steps).sigmas,
            cond=family.text.encode([PROMPT], None, True, size),
            guidance=family.spec.members[MEMBER].guidance,
            curve=step_curve(family, MEMBER, sizes),
            max_batch=max(askers),
        )
        noise = family.initial_noise(8, size, torch.Generator().manual_seed(0)) * bench.sigmas[0]
        turns = []
        for _ in range(repeats):
            turn: dict[str, Any] = {"curve": step_curve(family, MEMBER, sizes, 3), "mixes": {}}
            for mix, shares in MIXES.items():
                turn["mixes"][mix] = {
                    count: {
                        way.__name__: serve(
                            way, bench, noise, [max(round(share * steps), 1) for share in shares], count
                        )
                        for way in WAYS
                    }
                    for count in askers
                }
            turns.append(turn)
    return {"T": steps, "turns": turns, "summary": summary(turns)}


def serve(way: Way, bench: Bench, noise: torch.Tensor, steps: list[int], askers: int) -> dict[str, float]:
    """A way's throughput and median latency once it runs: the first answers, one an asker, are not counted."""
    counted = max(2 * askers, 16)
    served = way(bench, requests(noise, steps, seed=askers), askers, askers + counted)
    since, measured = served[askers - 1], served[askers : askers + counted]
    made = measured[-1].image_steps - since.image_steps
    rate = made / (measured[-1].answered - since.answered)
    return {
        "requests_per_s": rate / statistics.mean(steps),
        "image_steps_per_s": rate,
        "median_latency_s": statistics.median(each.answered - each.asked for each in measured),
    }


def requests(noise: torch.Tensor, steps: list[int], seed: int) -> Iterator[Request]:
    """Without end: every s as often as the others, in a random order that the seed fixes."""
    import random

    rng, i = random.Random(seed), 0
    while True:
        for s in rng.sample(steps, len(steps)):
            yield Request(noise[i % len(noise) : i % len(noise) + 1], s)
            i += 1


# --- three ways to serve ---


def engine(bench: Bench, coming: Iterator[Request], askers: int, total: int) -> list[Served]:
    """Continuous batching at step granularity."""
    from relay.engine import StepEngine, Walk

    engine = StepEngine(bench.denoiser, MEMBER, bench.curve, bench.max_batch, askers)
    served: list[Served] = []

    def ask(i: int) -> None:
        request = next(coming)
        sigmas = bench.sigmas[: request.steps + 1]
        engine.submit(Walk(str(i), request.latent, sigmas, bench.cond, bench.guidance))

    for i in range(askers):
        ask(i)
    while len(served) < total:
        for ended in engine.step():
            if ended.error is not None:
                raise ended.error
            served.append(Served(ended.walk.arrived, time.monotonic(), engine.load.steps_done))
            ask(askers + len(served))
    return served


def one_after_the_other(bench: Bench, coming: Iterator[Request], askers: int, total: int) -> list[Served]:
    """First come, first served, alone."""
    from relay.sampling import walk_leg

    waiting = deque((next(coming), time.monotonic()) for _ in range(askers))
    served: list[Served] = []
    made = 0
    while len(served) < total:
        request, asked = waiting.popleft()
        walk_leg(
            bench.denoiser, request.latent, bench.sigmas[: request.steps + 1], bench.cond, bench.guidance, member=MEMBER
        )
        made += request.steps
        served.append(Served(asked, time.monotonic(), made))
        waiting.append((next(coming), time.monotonic()))
    return served


def static_batches(bench: Bench, coming: Iterator[Request], askers: int, total: int) -> list[Served]:
    """What waits, together, until the longest is done."""
    import torch

    from relay.sampling import walk_leg

    waiting = deque((next(coming), time.monotonic()) for _ in range(askers))
    served: list[Served] = []
    made = 0
    while len(served) < total:
        batch = [waiting.popleft() for _ in range(min(len(waiting), bench.max_batch))]
        longest = max(request.steps for request, _ in batch)
        walk_leg(
            bench.denoiser, torch.cat([request.latent for request, _ in batch]), bench.sigmas[: longest + 1],
            bench.cond.select([0] * len(batch)), bench.guidance, member=MEMBER,
        )  # fmt: skip
        now = time.monotonic()
        made += sum(request.steps for request, _ in batch)
        served += [Served(asked, now, made) for _, asked in batch]
        waiting.extend((next(coming), now) for _ in batch)
    return served


WAYS: tuple[Way, ...] = (engine, one_after_the_other, static_batches)


# --- what is shown ---


def summary(turns: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """mix -> askers -> medians over turns; what is a ratio is one of each turn."""

    def row(turn: dict[str, Any], mix: str, askers: int) -> dict[str, float]:
        ways, throughput = turn["mixes"][mix][askers], {b: b / t for b, t in turn["curve"].items()}
        most = max(value for b, value in throughput.items() if b <= askers)
        own, one, static = (ways[way.__name__] for way in WAYS)
        return {
            "requests_per_s": own["requests_per_s"],
            "over_one": own["image_steps_per_s"] / one["image_steps_per_s"],
            "over_static": own["image_steps_per_s"] / static["image_steps_per_s"],
            "latency_s": own["median_latency_s"],
            "one_latency_s": one["median_latency_s"],
            "static_latency_s": static["median_latency_s"],
            "share_of_curve": own["image_steps_per_s"] / most,
            "curve_allows": most / throughput[1],
        }

    shown: dict[str, dict[int, dict[str, float]]] = {}
    for mix, counts in turns[0]["mixes"].items():
        shown[mix] = {}
        for askers in counts:
            rows = [row(turn, mix, askers) for turn in turns]
            shown[mix][askers] = {key: statistics.median(each[key] for each in rows) for key in rows[0]}
    return shown


def table(name: str, result: dict[str, Any]) -> str:
    lines = [f"## {name} in one process, large member alone, T = {result['T']}, guided", ""]
    curves = [turn["curve"] for turn in result["turns"]]
    curve = {b: statistics.median(each[b] for each in curves) for b in curves[0]}
    lines += [
        "Batch curve, images x steps a second: " + ", ".join(f"{b / t:.0f} at {b}" for b, t in curve.items()) + ".",
        "",
    ]
    for mix, rows in result["summary"].items():
        lines += [
            f"**{mix}** ({', '.join(f'{share:g} T' for share in MIXES[mix])}):",
            "",
            "| askers | engine, requests/s | over one after the other | the curve allows | over static batches "
            "| share of the curve | median latency (ms): engine | one after the other | static batches |",
            "| --- " * 9 + "|",
        ]
        lines += [
            f"| {askers} | {row['requests_per_s']:.2f} | **{row['over_one']:.2f}x** | {row['curve_allows']:.2f}x "
            f"| **{row['over_static']:.2f}x** | {row['share_of_curve']:.2f} | {row['latency_s'] * 1000:.0f} "
            f"| {row['one_latency_s'] * 1000:.0f} | {row['static_latency_s'] * 1000:.0f} |"
            for askers, row in rows.items()
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(engine_bench)
