"""Run an experiment: fill the outcome store with what every program of a grid draws, then time each program alone.

for each unit of work that is not done:
    draw every program on a chunk of prompts, shared prefixes walked once
    score the images; store them under their content; write the unit's rows in one file
for each family: time every program and baseline at batch 1, interleaved; measure each member's step-time curve
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from experiments.grid import SEED_STRIDE, Unit, workload_specs
from experiments.prepare import Prepared, prepare
from experiments.provenance import machine
from experiments.run_folder import Run, begin
from experiments.scoring import Drawn, draw_batch
from relay.metrics import score_all
from relay.pipeline import RelayPipeline
from relay.program import Program
from scheduler.outcomes import SCORE, image_path, pixels_hash, write_unit

__all__ = ["Prepared", "prepare", "run"]


def run(
    prepared: Prepared,
    folder: Path,
    shard: tuple[int, int] = (1, 1),
    progress: Any = None,
    only: Literal["scores", "times"] | None = None,
) -> None:
    """Do what is not done yet. `shard` (i, n): every n-th unit from the i-th; times are shard 1's.

    `only` one of the two passes: scores may be drawn on a busy machine, times want a quiet one.
    """
    begin(folder, prepared.facts)
    there = Run(folder)
    i, n = shard
    mine = prepared.units[i - 1 :: n] if only != "times" else []
    todo = [unit for unit in mine if not there.has("outcomes", unit.name)]
    if progress:
        progress.begin(len(mine), len(mine) - len(todo), {u.name: u.last - u.first for u in mine})
    for unit in todo:
        rows, drawn = draw_unit(prepared, unit, folder)
        write_unit(folder, "outcomes", unit.name, rows)
        if progress:
            progress.unit(unit.name, rows, drawn)
    if i != 1 or only == "scores":
        return
    if prepared.config.times is not None:
        from experiments.timing import time_family

        for f, family in enumerate(prepared.config.families):
            name = f"f{f}-{Path(family).stem}"
            if not there.has("times", name):
                if progress:
                    progress.say(f"timing {family}: every program alone, batch 1")
                times, curves = time_family(prepared, family)
                write_unit(folder, "curves", name, curves)
                write_unit(folder, "times", name, times)
    if prepared.config.policy:
        from experiments.service_pass import serve_family

        for f, family in enumerate(prepared.config.families):
            name = f"f{f}-{Path(family).stem}-service"
            if not there.has("times", name):
                if progress:
                    progress.say(f"serving {family}: every policy over every link, between real processes")
                write_unit(folder, "times", name, serve_family(prepared, family))


def draw_unit(prepared: Prepared, unit: Unit, folder: Path) -> tuple[list[dict[str, Any]], Drawn]:
    """Draw, score and store one unit; its rows."""
    config, pipe = prepared.config, prepared.pipes[unit.family]
    prompts = prepared.prompts[unit.workload][unit.first : unit.last]
    seeds = [unit.seed * SEED_STRIDE + i for i in range(unit.first, unit.last)]
    programs = prepared.programs[unit.family]
    texts = [p.text for p in prompts]
    referred = references(prepared, pipe, programs)
    asked = list({str(p): p for p in (*programs, *referred.values())}.values())
    drawn = draw_batch(pipe.family, texts, seeds, asked, min(config.deviation, len(texts)))
    rows: list[dict[str, Any]] = []
    spec = workload_specs(config)[unit.workload]
    facts = {
        "config_hash": prepared.hash, "family": pipe.family.name, "workload": spec["name"], "split": spec["split"],
        "dtype": prepared.facts["dtypes"][unit.family], **_where_from(prepared.facts["provenance"]),
    }  # fmt: skip

    def score(images: torch.Tensor, reference: torch.Tensor | None, columns: list[dict[str, Any]]) -> None:
        scores = score_all(prepared.metrics, images, texts, reference)
        digests = store_images(folder, images)
        for i, (prompt, own) in enumerate(zip(prompts, columns, strict=True)):
            rows.append(
                facts | own | {f"{SCORE}{name}": values[i] for name, values in scores.items()}
                | {"prompt_index": unit.first + i, "prompt": prompt.text, "scene": prompt.scene or "",
                   "complexity": prompt.complexity, "seed": seeds[i], "image": digests[i]}
            )  # fmt: skip

    for program in programs:
        reference = referred.get(str(program))
        columns = _program_columns(program, pipe, drawn, len(texts))
        score(drawn.images[str(program)], drawn.images[str(reference)] if reference else None, columns)
    for point in prepared.points[unit.family]:
        result = point.baseline.run(pipe.family, texts, seeds, point.setting)
        own = {
            "method": point.baseline.name, "program": point.text, "mode": "baseline", "steps_total": point.steps_total,
        }  # fmt: skip
        full = next((p for p in asked if p.mode == "full-cloud" and p.legs[0].steps_total == point.steps_total), None)
        score(result.images, drawn.images[str(full)] if full else None, [own] * len(texts))
    return rows, drawn


def references(prepared: Prepared, pipe: RelayPipeline, programs: Sequence[Program]) -> dict[str, Program]:
    """For each program the full-cloud run that its image is compared with, where a metric compares."""
    if not any(metric.needs_reference for metric in prepared.metrics):
        return {}
    steps = {str(p): p.legs[0].steps_total for p in programs}
    return {text: pipe.plan(mode="full-cloud", num_inference_steps=total) for text, total in steps.items()}


def _program_columns(program: Program, pipe: RelayPipeline, drawn: Drawn, count: int) -> list[dict[str, Any]]:
    """What the row of each prompt says of its program, with the intensity's deviation where it was watched."""
    from relay.codecs import payload_bytes
    from relay.deviation import relative_deviation

    size, family = pipe.family.spec.sizes.default, pipe.family
    shape = (1, family.channels, size[1] // family.factor, size[0] // family.factor)
    same: dict[str, Any] = {
        "method": "program", "program": str(program), "mode": program.mode,
        "steps_total": program.legs[0].steps_total, "handoff": program.steps["large"],
        "small_steps": program.steps["small"], "matching": program.matching, "codec": program.codec,
        "conditioning": program.conditioning, "guidance": ",".join(f"{g:g}" for g in program.guidance),
        "latent_bytes": (len(program.legs) - 1) * payload_bytes(program.codec, shape),
    }  # fmt: skip
    watched: list[dict[str, Any]] = []
    if trace := drawn.traces.get(str(program)):
        for before, relay, reference in zip(drawn.prefixes[str(program)], *trace, strict=True):
            apart = relative_deviation(relay, reference)
            watched.append(
                {"deviation_mean": apart.mean().item(), "deviation_max": apart.max().item(),
                 "intensity_prefix": before.tolist(), "intensity": relay.tolist(), "intensity_reference": reference.tolist()}
            )  # fmt: skip
    errors = drawn.codec_errors.get(str(program))
    each = [{} if errors is None else {"codec_error": errors[i].item()} for i in range(count)]
    return [same | each[i] | (watched[i] if i < len(watched) else {}) for i in range(count)]


def store_images(folder: Path, images: torch.Tensor) -> list[str]:
    """Save images (B, 3, H, W) in 0..1 as PNG, each once, under the hash of its pixels; the hashes."""
    from PIL import Image

    from nodes.images import save_png

    digests = []
    for pixels in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy():
        digest = pixels_hash(pixels.tobytes(), pixels.shape)
        path = image_path(folder, digest)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_png(Image.fromarray(pixels), path, {})
        digests.append(digest)
    return digests


def _where_from(facts: dict[str, Any]) -> dict[str, str]:
    versions = " ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return {"commit": facts["commit"], "versions": versions, "machine": machine(facts)}
