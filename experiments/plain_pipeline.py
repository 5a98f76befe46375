"""Is the checkpoint an ordinary one? diffusers' own pipeline against our call, judged, pair by pair.

`plain`: `pipe(prompt)` with only our steps and guidance. `nothing given`: `pipe(prompt)` alone, with whatever steps and
guidance diffusers takes by default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

FAMILIES = ("mini-sd3", "mini-sdxl")


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/plain_pipeline.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out test prompts.")] = 200,
    threads: int = 2,
) -> None:
    """Compare diffusers' own call with ours on the same prompts and seeds."""
    import torch

    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    results = {name: measure(name, prompts) for name in family or FAMILIES}
    lines = [
        f"{prompts} held-out prompts, paired by prompt and seed: attributes right, and the difference to our call with its",
        "95 % bootstrap interval.",
        "",
        "| family | call | attributes right | difference to ours |",
        "| --- | --- | --- | --- |",
    ]
    for name, rows in results.items():
        for label, row in rows.items():
            apart = "" if row["difference"] is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*row["difference"])
            lines.append(f"| {name} | {label} | {row['mean']:.4f} | {apart} |")
    write_result(out, "Plain diffusers pipelines", "\n".join(lines) + "\n", results)


def measure(name: str, count: int, batch: int = 20) -> dict[str, dict[str, Any]]:
    """Mean attributes right of each call, and its paired difference to ours."""
    import numpy as np
    import torch

    from experiments.bench import diffusers_pipeline
    from experiments.statistics import interval
    from relay.pipeline import RelayPipeline
    from relay.scenes.judge import judge
    from relay.scenes.sampling import caption, held_out

    ours = RelayPipeline.from_pretrained(name)
    member = ours.family.spec.members["large"]
    theirs = diffusers_pipeline(ours.family)
    scenes = held_out(count, "test")
    rng = np.random.default_rng(41)
    captions = [caption(scene, rng) for scene in scenes]
    program = ours.plan(handoff=member.steps)
    settings = {"num_inference_steps": member.steps, "guidance_scale": member.guidance}
    calls = {
        "ours": lambda texts, noise: ours(texts, program=program, generator=noise, output_type="pt").images,
        "plain, our steps and guidance": lambda texts, noise: (
            theirs(texts, generator=noise, output_type="pt", **settings).images
        ),
        "plain, nothing given": lambda texts, noise: theirs(texts, generator=noise, output_type="pt").images,
    }
    scores: dict[str, list[float]] = {}
    for label, call in calls.items():
        scores[label] = []
        for at in track(range(0, count, batch), f"{name}: {label}", console=Console(stderr=True), transient=True):
            texts = captions[at : at + batch]
            noise = [torch.Generator().manual_seed(at + i) for i in range(len(texts))]
            verdicts = judge(call(texts, noise).float() * 2 - 1, scenes[at : at + batch])
            scores[label] += [v.attributes for v in verdicts]
    own = np.array(scores["ours"])
    return {
        label: {
            "mean": float(np.mean(found)),
            "difference": None if label == "ours" else interval(list(np.array(found) - own)),
        }
        for label, found in scores.items()
    }


if __name__ == "__main__":
    typer.run(main)
