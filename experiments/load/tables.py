"""Small files of the comparison: shipped rows, tuned settings, how well levels are predicted; which systems fit a case."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.load.case import Case
from experiments.load.cells import short_name
from experiments.load.systems import Unfit
from experiments.run_folder import PACKED
from relay.errors import BadRequest
from relay.files import write_atomically
from relay.program import Program
from scheduler.load.prediction import Levels, read_levels, shipped
from scheduler.outcomes import SCORE, read_table, unit_path

KEPT = (
    "family", "method", "program", "mode", "split", "prompt_index", "prompt", "scene", "complexity", "seed", "commit", "dtype",
)  # fmt: skip


def fitting(case: Case, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Systems that this case can hold, and why the others cannot be."""
    fleet = next(iter(case.config.fleets))
    fine, left_out = [], {}
    for name in names:
        try:
            case.system(name, fleet, 1.0, 0, case.tuned.get(name, {}))
            fine.append(name)
        except Unfit as error:
            left_out[name] = str(error)
    if not fine:
        raise BadRequest("; ".join(left_out.values()) or "no system is left")
    return fine, left_out


def ship(folders: Sequence[Path], out: Path, metrics: Sequence[str], families: Sequence[str] | None) -> Path:
    """Validation and test rows of programs, with the scores named; rows of a start from noise alone."""
    import polars as pl

    rows = read_table(folders, "outcomes").filter(
        (pl.col("method") == "program")
        & pl.col("split").is_in(["validation", "test"])
        & pl.col("start_prompt").is_null()
    )
    if families:
        rows = rows.filter(pl.col("family").is_in(list(families)))
    if rows.is_empty():
        raise BadRequest(f"{', '.join(map(str, folders))} holds no validation or test rows of the programs asked for")
    if lacking := [m for m in metrics if SCORE + m not in rows.columns]:
        raise BadRequest(f"the outcome store has no score {', '.join(lacking)}")
    rows = rows.select(*KEPT, *(SCORE + m for m in metrics))
    path = unit_path(out, "outcomes", PACKED)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.write_parquet(path, compression="zstd", compression_level=19)
    return path


def write_tuned(out: Path, found: dict[str, Any]) -> None:
    """Settings of each system, and every configuration that was tried; systems not searched now keep what they had."""
    before = msgspec.yaml.decode(out.read_bytes())["systems"] if out.exists() else {}
    head = "# Written by `python -m experiments.load tune`: settings chosen on validation prompts, before test.\n"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, head.encode() + msgspec.yaml.encode({"systems": before | found}))


def levels_report(
    out: Path, families: Mapping[str, tuple[Levels, dict[str, Any]]]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Sections of these families, and of those that the report's data tells of already, from their shipped levels."""
    kept = out.with_suffix(".json")
    data: dict[str, dict[str, Any]] = json.loads(kept.read_text())["families"] if kept.exists() else {}
    found = {name: (read_levels(shipped(name), name), told) for name, told in data.items() if shipped(name).exists()}
    found = dict(sorted((found | dict(families)).items()))
    lines = []
    for name, (levels, told) in found.items():
        said = levels.provenance
        lines += [
            f"## {name}",
            "",
            prediction_table(levels, told),
            f"Fitted by `{said['command']}` at commit {said['commit']}.",
            "",
        ]
    return "\n".join(lines), {name: told for name, (_, told) in found.items()}


def prediction_table(levels: Levels, told: dict[str, Any]) -> str:
    """How far predictions are off on test prompts, by inputs."""
    kinds = [kind for kind in ("prompt", "prompt and router") if kind in told]
    programs = list(told["programs"])
    lines = [
        f"Quality is `{levels.metric}`. Fitted on train prompts, penalty and calibration on validation; below, test prompts.",
        "", "| inputs | rmse | rmse of each level's mean | mean correlation of a level's loss, predicted and measured |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for kind in kinds:
        said = told[kind]
        mean = np.mean([c for c in said["correlation_of_loss"] if c is not None])
        lines.append(f"| {kind} | {said['rmse']:.4f} | {said['rmse_of_means']:.4f} | {mean:.3f} |")
    lines += [
        "", f"| level | mean quality, validation |{''.join(f' bias, {kind} | correlation of its loss |' for kind in kinds)}",
        "| --- | --- |" + " --- | --- |" * len(kinds),
    ]  # fmt: skip
    for level in levels.levels:
        i, cells = programs.index(level.program), ""
        if level.skipped:  # so much of its program's, on every prompt; see `fit.with_starts`
            cells = " |  |" * len(kinds)
        for kind in kinds if not level.skipped else ():
            correlation = told[kind]["correlation_of_loss"][i]
            cells += f" {told[kind]['bias'][i]:+.4f} | {'' if correlation is None else f'{correlation:.2f}'} |"
        lines.append(f"| {short_name(Program.parse(level.program), level.skipped)} | {level.quality:.4f} |{cells}")
    lines += ["", "Calibration, fifths by prediction (predicted: measured):", ""]
    lines += [f"- {kind}: " + "; ".join(f"{a:.3f}: {b:.3f}" for a, b, _ in told[kind]["bins"]) for kind in kinds]
    return "\n".join(lines) + "\n"
