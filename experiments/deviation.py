"""Latent-intensity deviation after a handoff, beside controls that should fail it.

RISE reports that latent intensity hardly deviates after a handoff. That says something only if wrong handoffs deviate
more, so each control does one thing wrong: a sigma off by one index, the latent of another prompt, an untrained small
member. Where a control passes too, this measure does not tell it apart from a sound relay, and the table says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FAMILIES = ("mini-sd3", "mini-sdxl")
BOUND = 0.015  # the deviation below which RISE's handoffs stay (second-hand)


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/deviation.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out test prompts.")] = 60,
    threads: int = 2,
) -> None:
    """Measure the deviation of a relay at half of the steps, and of its controls."""
    import torch

    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    results = {name: measure(name, prompts) for name in family or FAMILIES}
    write_result(out, "Latent-intensity deviation", table(results, prompts), results)


def measure(name: str, count: int) -> dict[str, dict[str, Any]]:
    """Deviation per step, mean and maximum, of the relay at s = T/2 and of each control."""
    import numpy as np
    import torch

    from relay.deviation import IntensityTrace, deviation
    from relay.matching import walk
    from relay.pipeline import RelayPipeline
    from relay.sampling import walk_leg
    from relay.scenes.sampling import caption, held_out

    pipe = RelayPipeline.from_pretrained(name)
    family, size = pipe.family, pipe.family.spec.sizes.default
    steps = family.spec.members["large"].steps
    program = pipe.plan(handoff=round(steps / 2))
    (first, sigmas), (_, after) = walk(program, family.schedules(size))
    rng = np.random.default_rng(37)
    captions = [caption(scene, rng) for scene in held_out(count, "test")]

    def trace(member: Any, latent: Any, over: list[float], guidance: float) -> list[Any]:
        seen = IntensityTrace()
        walk_leg(member, latent, over, cond, guidance, member="control", on_step=seen.record)
        return seen.intensities

    with torch.inference_mode():
        cond = family.text.encode(captions, None, True, size)
        noise = family.initial_noise(count, size, [torch.Generator().manual_seed(i) for i in range(count)])
        start = noise * family.schedule(first.member, first.steps_total).init_noise_sigma
        large, small = family.denoiser("large"), family.denoiser("small")
        at_s = walk_leg(large, start, sigmas, cond, program.guidance[0], member="large")
        reference = trace(large, at_s, after, program.guidance[0])
        untrained = _untrained(family)
        g = program.guidance[1]
        return {
            "relay": deviation(trace(small, at_s, after, g), reference),
            "control: sigma off by one index": deviation(trace(small, at_s, after[1:], g), reference[1:]),
            "control: latent of another prompt": deviation(trace(small, at_s.roll(1, 0), after, g), reference),
            "control: untrained small member": deviation(trace(untrained, at_s, after, g), reference),
        }


def _untrained(family: Any) -> Any:
    """The small member's architecture with fresh weights."""
    import diffusers
    import torch

    torch.manual_seed(0)
    model = getattr(diffusers, family.architecture.model).from_config(family.denoiser_config("small")).eval()
    return family.wrap("small", model)


def table(results: dict[str, dict[str, Any]], count: int) -> str:
    lines = [
        f"Relay at half of the steps, {count} held-out prompts. Reference: the large member going on from the same latent",
        "over the same sigmas.",
        "",
        "| family | | mean over steps | maximum | mean below 1.5 % | maximum below 1.5 % |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    alike = []
    for name, rows in results.items():
        for label, found in rows.items():
            relay = rows["relay"]
            if label != "relay" and (found["mean"] < BOUND or found["max"] <= relay["max"]):
                alike.append(f"{name}, {label.removeprefix('control: ')}")
            below = ["yes" if found[kind] < BOUND else "no" for kind in ("mean", "max")]
            lines.append(f"| {name} | {label} | {found['mean']:.2%} | {found['max']:.2%} | {' | '.join(below)} |")
    verdict = "; ".join(alike) if alike else "none"
    lines += [
        "",
        "Controls whose mean stays below the bound too, or whose maximum is no larger than the relay's, so that this measure"
        f" does not tell them from a sound relay: {verdict}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
