"""Which schedule the embedded families ship: the same weights on several schedules, on validation prompts.

Only `scheduler_config.json` differs: the flow's shift for mini-sd3, the first sigma of the large member's Karras
schedule for mini-sdxl. What is shipped (`experiments.training.members.SCHEDULERS`) was chosen from this table.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

# family -> file of the weights' folder that is changed, its key, the values
SWEEP: dict[str, tuple[tuple[str, ...], str, tuple[float | None, ...]]] = {
    "mini-sd3": (("scheduler", "scheduler_small"), "shift", (1.5, 1.0, 0.6, 0.4, 0.3)),
    "mini-sdxl": (("scheduler",), "sigma_max", (None, 8.0, 5.0, 4.0, 3.0)),
}


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/schedules.md"
    ),
    prompts: Annotated[int, typer.Option(help="Validation prompts.")] = 120,
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    only: Annotated[list[float] | None, typer.Option(help="Only these values.")] = None,
    threads: int = 2,
) -> None:
    """Score full-cloud, edge-only and four relays on each schedule."""
    import torch

    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    found: dict[str, Any] = {}
    for name in family or SWEEP:
        values = [v for v in SWEEP[name][2] if only is None or v in only]
        found[name] = {}
        for value in values:
            found[name][label(name, value)] = score(name, value, prompts)
            print(name, list(found[name].items())[-1], flush=True)
    write_result(out, "Schedules of the embedded families, on validation prompts", table(found, prompts), found)


def score(name: str, value: float | None, prompts: int) -> dict[str, float]:
    """Program -> share of attributes right, over a copy of the family with another schedule."""
    import numpy as np
    import torch

    from experiments.scoring import score_programs
    from experiments.workloads import load_workload
    from relay.checkpoints import Component
    from relay.family_spec import find_family
    from relay.pipeline import RelayPipeline
    from relay.scenes.language import parse

    spec = find_family(name)
    folders, key, _ = SWEEP[name]
    some = load_workload("scenes").prompts("validation", prompts, 0)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        where = Path(folder) / name
        shutil.copytree(Path(str(Component(repo=spec.members["large"].repo))), where)
        for each in folders:
            config = where / each / "scheduler_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
        yaml = where.with_suffix(".yaml")
        yaml.write_text((Path("configs/families") / f"{name}.yaml").read_text().replace(f"embedded:{name}", str(where)))
        pipe = RelayPipeline.from_pretrained(yaml)
        total = spec.members["large"].steps
        programs = {"large alone": pipe.plan(handoff=total)}
        for part in (0.29, 0.36, 0.43, 0.5):
            s = round(part * total)
            programs[f"s = {part:g} T, n = 6"] = pipe.plan(handoff=s, small_steps=6, matching="exact")
        programs["small alone"] = pipe.plan(handoff=0)
        scenes, captions = [parse(p.scene or p.text) for p in some], [p.text for p in some]
        scored = score_programs(pipe.family, scenes, captions, list(programs.values()), list(range(len(some))))
    return {
        said: float(np.mean([v.attributes for v in scored.verdicts[str(program)]]))
        for said, program in programs.items()
    }


def label(name: str, value: float | None) -> str:
    return f"{SWEEP[name][1]} {value or 'of its noise'}"


def shipped(name: str) -> str:
    """The row of the schedule that the family ships."""
    from relay.family import Family

    return label(name, Family.load(name).scheduler_config("large").get(SWEEP[name][1]))


def table(found: dict[str, Any], prompts: int) -> str:
    lines = [
        f"Share of attributes right, {prompts} validation prompts; only the schedule differs. Bold: shipped.",
        "",
    ]
    for name, rows in found.items():
        columns = list(next(iter(rows.values())))
        lines += [f"| {name} | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        own = shipped(name)
        for words, row in rows.items():
            said = f"**{words}**" if words == own else words
            lines.append(f"| {said} | " + " | ".join(f"{row[c]:.3f}" for c in columns) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
