"""What a step costs, what our loop adds to it, how batches scale, and what a handoff weighs.

Everything that is compared is measured side by side in one run, interleaved; ratios are the figures to quote.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

FAMILIES = ("mini-sd3", "mini-sdxl")
BATCHES = (1, 2, 4, 8, 16, 32)


def bench(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/bench.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    repeats: int = 9,
    threads: int = 2,
    batches: Annotated[str, typer.Option(help="Batch sizes of the step times; 1 is always among them.")] = ",".join(
        map(str, BATCHES)
    ),
) -> None:
    """Step costs, own loop against diffusers' pipeline, batch scaling, handoff cost and size, peak memory."""
    import torch

    from experiments.provenance import write_result
    from experiments.timing import batch_sizes
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    sizes = batch_sizes(batches)
    results = {name: measure(name, repeats, sizes) | router_cost(name) for name in family or FAMILIES}
    write_result(out, "Benchmark", "\n".join(table(name, result) for name, result in results.items()), results)


def measure(name: str, repeats: int, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """All figures of one family."""
    import torch

    from relay.pipeline import RelayPipeline
    from relay.step_times import step_curve

    pipe = RelayPipeline.from_pretrained(name)
    with torch.inference_mode():
        steps = {member: step_curve(pipe.family, member, batches, repeats) for member in ("large", "small")}
        return {
            "step_s": steps,
            "step_ratio": steps["large"][1] / steps["small"][1],
            "loop": own_loop_against_diffusers(pipe, repeats),
            "handoff": {codec: handoff_cost(pipe, codec, repeats) for codec in ("fp32", "fp16", "bf16", "int8")},
            "peak_memory_MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def router_cost(name: str) -> dict[str, Any]:
    """What a decision of the shipped token-level router costs; nothing where none is shipped for this family."""
    from experiments.routing.router_latency import decision_times
    from scheduler.router.settings import read_settings
    from scheduler.router.store import shipped

    metrics = read_settings().metrics
    return {"router": decision_times(name, metrics)} if shipped(name, metrics).exists() else {}


def own_loop_against_diffusers(pipe: Any, repeats: int) -> dict[str, float]:
    """End-to-end seconds of full-cloud: our pipeline and diffusers' own, same weights, tokens, steps and guidance."""
    import torch

    from relay.step_times import PROMPT, interleaved

    family = pipe.family
    member = family.spec.members["large"]
    theirs = diffusers_pipeline(family, family.spec.text.omit)  # the same tokens on both sides
    extra = {"max_sequence_length": family.text.t5_tokens} if family.spec.architecture == "sd3" else {}
    width, height = family.spec.sizes.default
    program = pipe.plan(handoff=member.steps)

    def ours() -> Any:
        return pipe(PROMPT, program=program, seed=0)

    def reference() -> Any:
        return theirs(
            PROMPT, num_inference_steps=member.steps, guidance_scale=member.guidance, width=width, height=height,
            generator=torch.Generator().manual_seed(0), **extra,
        )  # fmt: skip

    own, other = interleaved([ours, reference], repeats)
    return {"own_s": own, "diffusers_s": other, "ratio": own / other}


def diffusers_pipeline(family: Any, omit: tuple[str, ...] = ()) -> Any:
    """diffusers' own pipeline over the very folder and dtype of the large member, without the components in `omit`."""
    import diffusers
    import torch

    cls = getattr(diffusers, family.architecture.pipeline)
    theirs = cls.from_pretrained(family.spec.members["large"].repo, torch_dtype=torch.float32, **dict.fromkeys(omit))
    theirs.set_progress_bar_config(disable=True)
    if family.spec.architecture == "sdxl":
        theirs.unet.to(memory_format=torch.channels_last)
    return theirs


def handoff_cost(pipe: Any, codec: str, repeats: int) -> dict[str, float]:
    """Milliseconds to write and to check and read a handoff of one image, and its bytes, prompt inside."""
    from relay.handoff import Handoff
    from relay.step_times import PROMPT, interleaved

    steps = pipe.family.spec.members["large"].steps
    made = pipe.start(PROMPT, handoff=steps // 2, codec=codec, seed=0)
    data = made.to_bytes()
    write, read = interleaved([made.to_bytes, lambda: Handoff.from_bytes(data)], max(repeats, 30))
    return {"bytes": len(data), "write_ms": write * 1000, "read_ms": read * 1000}


def table(name: str, result: dict[str, Any]) -> str:
    step = result["step_s"]
    batches = list(step["large"])
    lines = [
        f"## {name}",
        "",
        "One guided step (ms) over batch size, throughput in images x steps per second below it:",
        "",
    ]
    lines += ["| member | " + " | ".join(f"batch {b}" for b in batches) + " |", "| --- " * (len(batches) + 1) + "|"]
    for member, times in step.items():
        lines.append(f"| {member} | " + " | ".join(f"{times[b] * 1000:.1f}" for b in batches) + " |")
        lines.append("| | " + " | ".join(f"{b / times[b]:.0f}/s" for b in batches) + " |")
    loop = result["loop"]
    lines += [
        "",
        f"- A step of the large member costs **{result['step_ratio']:.2f}x** the small one's (batch 1, guidance, fp32).",
        f"- Full-cloud end to end: {loop['own_s'] * 1000:.0f} ms, diffusers' own pipeline {loop['diffusers_s'] * 1000:.0f} ms, "
        f"ratio **{loop['ratio']:.3f}**.",
        "- Handoff of one image, prompt inside: "
        + "; ".join(
            f"{codec} {c['bytes']:.0f} B, {c['write_ms']:.2f} ms to write, {c['read_ms']:.2f} ms to check and read"
            for codec, c in result["handoff"].items()
        )
        + ".",
        f"- Peak memory of the process: {result['peak_memory_MB']} MB.",
        *router_line(result.get("router")),
        "",
    ]
    return "\n".join(lines)


def router_line(times: dict[str, float] | None) -> list[str]:
    if times is None:
        return []
    return [
        f"- A decision of the token-level router, one prompt, text encoding included: **{times['decision_median_ms']:.1f} ms**"
        f" (95th per cent {times['decision_p95_ms']:.1f} ms), of which text encoding {times['text_encoding_median_ms']:.1f} ms."
    ]


if __name__ == "__main__":
    typer.run(bench)
