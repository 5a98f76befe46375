"""Run an experiment: fill the outcome store with what every program of a grid draws, then time each program alone.

for each unit of work that is not done:
    draw every program on a chunk of prompts, shared prefixes walked once
    score the images; store them under their content; write the unit's rows in one file
for each family: time every program at batch 1, interleaved; measure each member's step-time curve
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from experiments.grid import SEED_STRIDE, Experiment, Unit, config_hash, programs_of, units_of, workload_specs
from experiments.provenance import machine, provenance
from experiments.run_folder import begin
from experiments.scoring import Drawn, draw_batch
from relay.errors import BadRequest
from relay.metrics import Metric, load_metric, score_all
from relay.pipeline import RelayPipeline
from relay.program import Program
from scheduler.outcomes import SCORE, image_path, pixels_hash, unit_path, write_unit

if TYPE_CHECKING:
    from experiments.baselines.points import Point
    from experiments.workloads import Prompt


@dataclass
class Prepared:
    """All that a run needs, checked before its first step: a wrong key or a missing metric costs no time."""

    config: Experiment
    where: str
    pipes: dict[str, RelayPipeline]
    programs: dict[str, list[Program]]
    prompts: list[list[Prompt]]
    metrics: list[Metric]
    points: dict[str, list[Point]]
    hash: str
    units: list[Unit]
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(config: Experiment, where: str, device: str | None = None, dtype: str | None = None) -> Prepared:
    """Read families, prompts, metrics and baselines; BadRequest names file and key of whatever is wrong."""
    from experiments.baselines import load_baseline
    from experiments.baselines.points import points, totals_of
    from experiments.grid import weights_digest
    from experiments.timing import link_for
    from experiments.workloads import load_workload

    def keyed(key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except BadRequest as error:
            raise BadRequest(f"{where}: `$.{key}`: {error}") from None

    metrics = [keyed(f"metrics[{i}]", partial(_named, load_metric, m)) for i, m in enumerate(config.metrics)]
    for i, metric in enumerate(metrics):
        if reason := metric.missing():
            raise BadRequest(f"{where}: `$.metrics[{i}]`: {reason}")
    baselines = [keyed(f"baselines[{i}]", partial(_named, load_baseline, b)) for i, b in enumerate(config.baselines)]
    prompts = []
    for i, spec in enumerate(workload_specs(config)):
        prompts.append(keyed(f"workload[{i}]", partial(_prompts, load_workload, spec)))
    pipes = {f: RelayPipeline.from_pretrained(f, device=device, torch_dtype=dtype) for f in config.families}
    programs = {f: programs_of(config, pipe.family, where) for f, pipe in pipes.items()}
    for pipe in pipes.values():
        if pipe.family.spec.scenes:
            from relay.request import check_texts

            texts = [p.text for some in prompts for p in some]
            keyed("workload", partial(check_texts, pipe.family, texts, []))
    asked = {
        f: [total or pipe.family.spec.members["large"].steps for total in config.steps] for f, pipe in pipes.items()
    }
    found = {
        f: keyed("baselines", partial(points, baselines, pipe.family, totals_of(programs[f], asked[f])))
        for f, pipe in pipes.items()
    }
    digests = {f: weights_digest(pipe.family) for f, pipe in pipes.items()}
    prepared = Prepared(
        config, where, pipes, programs, prompts, metrics, found, config_hash(config, digests),
        units_of(config, prompts),
    )  # fmt: skip
    for i, entry in enumerate(config.links):
        for pipe in pipes.values():  # a wrong link costs no time either; its scale is measured later
            keyed(f"links[{i}]", partial(link_for, entry, pipe.family.spec, 1.0))
    prepared.facts = {
        "config": msgspec.to_builtins(config), "config_hash": prepared.hash, "weights": digests,
        "programs": {f: [str(p) for p in some] for f, some in programs.items()}, "provenance": provenance(),
        "baselines": {f: {b.name: b.applies(pipe.family) for b in baselines} for f, pipe in pipes.items()},
    }  # fmt: skip
    return prepared


def run(prepared: Prepared, folder: Path, shard: tuple[int, int] = (1, 1), progress: Any = None) -> None:
    """Do what is not done yet. `shard` (i, n): every n-th unit from the i-th; times are shard 1's."""
    begin(folder, prepared.facts)
    i, n = shard
    mine = prepared.units[i - 1 :: n]
    todo = [unit for unit in mine if not unit_path(folder, "outcomes", unit.name).exists()]
    if progress:
        progress.begin(len(mine), len(mine) - len(todo), {u.name: u.last - u.first for u in mine})
    for unit in todo:
        rows, drawn = draw_unit(prepared, unit, folder)
        write_unit(folder, "outcomes", unit.name, rows)
        if progress:
            progress.unit(unit.name, rows, drawn)
    if i == 1 and prepared.config.times is not None:
        from experiments.timing import time_family

        for f, family in enumerate(prepared.config.families):
            name = f"f{f}-{Path(family).stem}"
            if not unit_path(folder, "times", name).exists():
                if progress:
                    progress.say(f"timing {family}: every program alone, batch 1")
                times, curves = time_family(prepared, family)
                write_unit(folder, "curves", name, curves)
                write_unit(folder, "times", name, times)


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
        **_where_from(prepared.facts["provenance"]),
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


def _named(load: Callable[..., Any], entry: str | dict[str, Any]) -> Any:
    if isinstance(entry, str):
        return load(entry)
    options = dict(entry)
    if "name" not in options:
        raise BadRequest(f"{entry} needs a name")
    return load(options.pop("name"), **options)


def _prompts(load_workload: Callable[..., Any], spec: dict[str, Any]) -> list[Prompt]:
    options = dict(spec)
    split, count, seed = (options.pop(key) for key in ("split", "count", "seed"))
    if not isinstance(count, int) or count < 1:
        raise BadRequest(f"count {count!r} is not a whole number of at least 1")
    found = load_workload(options.pop("name"), **options).prompts(split, count, seed)
    # Class by class in turn, so that any first part of a workload holds all classes alike.
    classes: dict[str, list[Prompt]] = {}
    for prompt in found:
        classes.setdefault(prompt.complexity, []).append(prompt)
    longest = max(map(len, classes.values()), default=0)
    return [some[i] for i in range(longest) for some in classes.values() if i < len(some)]
