"""From what a pipeline returns to files and lines: names, PNGs with their parameters, scores, the JSON report."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from relay.files import write_atomically

if TYPE_CHECKING:
    from relay.pipeline import RelayOutput, RelayPipeline


def image_paths(out: Path, prompts: list[str], seed: int, count: int) -> dict[tuple[str, int], Path]:
    """Where the image of each (prompt, seed) goes; a folder gets names that sort and say what they show."""
    jobs = [(prompt, seed + i) for prompt in dict.fromkeys(prompts) for i in range(count)]
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(jobs) > 1:
            raise BadRequest(f"{len(jobs)} images do not fit into one file {out}: give a folder")
        return {jobs[0]: out}
    if out.suffix and not out.is_dir():
        raise BadRequest(f"--out {out}: only .png files and folders can be written")
    out.mkdir(parents=True, exist_ok=True)
    names: dict[tuple[str, int], Path] = {}
    for job in jobs:
        slug = re.sub(r"[^a-z0-9]+", "-", job[0].lower()).strip("-")[:60] or "image"
        path, n = out / f"{slug}-{job[1]}.png", 1
        while path in names.values():
            path, n = out / f"{slug}-{job[1]}-{n}.png", n + 1
        names[job] = path
    return names


def save_result(
    pipe: RelayPipeline, result: RelayOutput, path: Path, prompt: str, seed: int | None, family: str
) -> dict[str, Any]:
    from nodes.images import save_png

    image = result.images[0]
    parameters = {
        "prompt": prompt,
        "negative_prompt": result.negative_prompts[0] if result.negative_prompts else None,
        "family_source": family,
        "program": str(result.program),
        "seed": seed,
        "width": image.width,
        "height": image.height,
        "dtype": pipe.dtype,
        "steps": result.steps,
        "version": version(),
    }
    save_png(image, path, parameters)
    entry = parameters | {"file": str(path), "timings_s": result.timings, "handoff_bytes": result.handoff_bytes}
    if result.deviation is not None:
        entry["deviation"] = result.deviation
    if pipe.family.spec.scenes:
        entry["score"] = score(image, prompt)
    return entry


def score(image: Any, prompt: str) -> dict[str, Any]:
    """The scene judge's verdict on one PIL image."""
    import dataclasses

    import numpy as np
    import torch

    from relay.scenes.judge import judge
    from relay.scenes.language import parse

    pixels = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    return dataclasses.asdict(judge(pixels, [parse(prompt)])[0])


def describe(entry: dict[str, Any]) -> str:
    """One line: file, steps really done, denoising time, score."""
    taken = " + ".join(f"{n} {member}" for member, n in entry["steps"].items() if n)
    denoising = sum(v for k, v in entry["timings_s"].items() if k.startswith("denoise"))
    line = f"{entry['file']}  {taken} steps  {denoising:.2f} s denoising  seed {entry['seed']}"
    if entry["handoff_bytes"]:
        line += f"  {entry['handoff_bytes']} B handed over"
    if "score" in entry:
        line += f"  attributes right {entry['score']['attributes']:.0%}"
    if "deviation" in entry:
        line += f"  intensity deviation {entry['deviation']['max']:.2%} at most"
    return line


def write_report(path: Path, entries: list[dict[str, Any]], pipe: RelayPipeline) -> None:
    import platform

    import diffusers
    import torch

    machine: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    machine |= {"relay": version(), "threads": torch.get_num_threads(), "processor": platform.machine()}
    write_atomically(path, json.dumps({"images": entries, "dtype": pipe.dtype, "machine": machine}, indent=1) + "\n")


@cache  # a walk through all that is installed
def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return of("relay-inference")
    except PackageNotFoundError:
        return "unknown"
