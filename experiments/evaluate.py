"""The README's table: what the embedded families and their relays are worth, on held-out prompts.

Scores: 500 test prompts a family, spread evenly over the complexity classes, seeds fixed, in batches with shared
prefixes. Times: latency at batch 1, interleaved, in a pass of their own. Nothing is tuned here: choices were made on
the validation split.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from relay.program import Program
    from relay.scenes.judge import Verdict
    from relay.scenes.language import Scene

FAMILIES = ("mini-sd3", "mini-sdxl")
CLASSES = ("1", "2", "3", "4", "letters")
console = Console()


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for quality-FAMILY.json and .md.")] = Path("docs/results"),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    prompts: Annotated[int, typer.Option(help="Held-out prompts, spread evenly over the classes.")] = 500,
    split: Annotated[str, typer.Option(help="test for reports, validation for choices.")] = "test",
    repeats: Annotated[int, typer.Option(help="Rounds of the timing pass.")] = 7,
    steps: Annotated[int | None, typer.Option(help="T; default: each family's own.")] = None,
    threads: int = 2,
    readme: Annotated[Path | None, typer.Option(help="Also put the tables between this file's markers.")] = None,
) -> None:
    """Score and time large, small and relays of the embedded families; write tables with intervals."""
    import torch

    from experiments.provenance import footer, provenance
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in family or FAMILIES:
        result = measure(name, prompts, split, repeats, steps)
        result["provenance"] = provenance()
        (out / f"quality-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        text = table(result) + f"\n{footer(result['provenance'])}\n"
        (out / f"quality-{name}.md").write_text(text)
        if readme is not None:
            put_into(readme, name, text)
        console.print(text, soft_wrap=True, highlight=False)


def programs_for(pipe: Any, steps: int | None = None) -> dict[str, Program]:
    """The rows of the table: both members alone, relays at a half and a third of T, and two that are faster still, with
    fewer steps of the small member (chosen on validation: docs/results/schedules.md)."""
    steps = steps or pipe.family.spec.members["large"].steps
    plan = partial(pipe.plan, num_inference_steps=steps)
    return {
        "large alone (full-cloud)": plan(handoff=steps),
        "relay, s = T/2": plan(handoff=round(steps / 2)),
        "relay, s = T/3": plan(handoff=round(steps / 3)),
        "relay, s = 0.36 T, 6 small steps": plan(handoff=round(0.36 * steps), small_steps=6, matching="exact"),
        "relay, s = 0.29 T, 6 small steps": plan(handoff=round(0.29 * steps), small_steps=6, matching="exact"),
        "small alone (edge-only)": plan(handoff=0),
    }


def measure(name: str, count: int, split: str, repeats: int, steps: int | None = None) -> dict[str, Any]:
    """All figures of one family, as plain data."""
    import numpy as np

    from experiments.scoring import score_programs
    from experiments.timing import time_programs
    from nodes.session import progress_bar
    from relay.pipeline import RelayPipeline
    from relay.scenes.sampling import caption, held_out

    pipe = RelayPipeline.from_pretrained(name)
    programs = programs_for(pipe, steps)
    scenes = held_out(count, split)
    rng = np.random.default_rng(29)
    captions = [caption(scene, rng) for scene in scenes]
    with progress_bar() as progress:
        task = progress.add_task(f"{name}: scores", total=count)
        update = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
        scored = score_programs(pipe.family, scenes, captions, list(programs.values()), range(count), progress=update)
        task = progress.add_task(f"{name}: times", total=repeats)
        times = time_programs(pipe, captions[-1 - count // 5], list(programs.values()), repeats, update)
    verdicts = {label: scored.verdicts[str(program)] for label, program in programs.items()}
    verdicts |= floor_and_ceiling(pipe, scenes)
    large, small = (verdicts[label] for label in ("large alone (full-cloud)", "small alone (edge-only)"))
    rows = {}
    for label, found in verdicts.items():
        row: dict[str, Any] = {"classes": _by_class(found, scenes)}
        if label in programs:
            full = times[str(programs["large alone (full-cloud)"])]["denoising_s"]
            row |= {"program": str(programs[label]), "steps": programs[label].steps} | times[str(programs[label])]
            row["share_of_full_time"] = row["denoising_s"] / full
        if label.startswith("relay"):
            row["gap_closed"] = _gaps(found, small, large, scenes)
        rows[label] = row
    parts = {label: _parts(found) for label, found in verdicts.items()}
    return {
        "family": name, "split": split, "prompts": count, "rows": rows, "attributes_by_kind": parts,
        "steps_saved_by_shared_prefixes": round(scored.steps_saved, 3),
    }  # fmt: skip


def floor_and_ceiling(pipe: Any, scenes: list[Scene]) -> dict[str, list[Verdict]]:
    """Ceiling: VAE reconstructions of true scenes. Floor: true renders of *other* prompts of the same class."""
    import numpy as np
    import torch

    from relay.scenes.judge import judge
    from relay.scenes.render import render

    images = render(scenes, np.random.default_rng(31))
    vae = pipe.family.vae
    with torch.inference_mode():
        parts = [vae.decode(vae.encode(chunk).latents).sample for chunk in images.to(vae.dtype).split(50)]
    share = len(scenes) // len(CLASSES)
    others = [i - i % share + (i % share + 1) % share for i in range(len(scenes))]
    return {
        "VAE reconstructions of true scenes (ceiling)": judge(torch.cat(parts).float(), scenes),
        "true renders of other prompts (floor)": judge(images[others], scenes),
    }


def _by_class(verdicts: list[Verdict], scenes: list[Scene]) -> dict[str, dict[str, list[float]]]:
    from experiments.statistics import interval

    found = {}
    for name in (*CLASSES, "all"):
        some = [v for v, s in zip(verdicts, scenes, strict=True) if name in ("all", s.complexity)]
        found[name] = {
            "attributes": list(interval([v.attributes for v in some])),
            "strict": list(interval([float(v.strict) for v in some])),
        }
    return found


def _gaps(relay, small, large, scenes) -> dict[str, list[float] | None]:  # noqa: ANN001
    from experiments.statistics import gap_closed

    gaps: dict[str, list[float] | None] = {}
    for name in (*CLASSES, "all"):
        keep = [i for i, s in enumerate(scenes) if name in ("all", s.complexity)]
        values = ([v[i].attributes for i in keep] for v in (relay, small, large))
        closed = gap_closed(*values)
        gaps[name] = list(closed) if closed else None
    return gaps


def _parts(verdicts: list[Verdict]) -> dict[str, float]:
    totals: dict[str, list[int]] = {}
    for verdict in verdicts:
        for kind, (right, asked) in verdict.parts.items():
            both = totals.setdefault(kind, [0, 0])
            both[0] += right
            both[1] += asked
    shares = {kind: round(r / a, 4) for kind, (r, a) in totals.items() if kind != "extra"}
    categories: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for kind, right in verdict.categories.items():
            categories.setdefault(kind, []).append(right)
    shares |= {f"category:{kind}": round(sum(v) / len(v), 4) for kind, v in categories.items()}
    return shares | {"extra_per_image": round(totals.get("extra", [0, 0])[1] / len(verdicts), 4)}


def table(result: dict[str, Any]) -> str:
    """Markdown: attributes right and strict per class, ratio, share of the gap closed, time."""
    per_class = result["prompts"] // len(CLASSES)
    lines = [
        f"### {result['family']}: {result['prompts']} {result['split']} prompts, {per_class} a class",
        "",
        "| | steps | attributes right: 1 object | 4 objects | letters | strict: 1 object | 4 objects "
        "| of large's score, all | gap closed, 4 objects | denoising | of full-cloud |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    full = result["rows"]["large alone (full-cloud)"]["classes"]["all"]["attributes"][0]
    for label, row in result["rows"].items():
        classes = row["classes"]
        cells = [label, f"{row['steps']['large']} + {row['steps']['small']}" if "steps" in row else ""]
        cells += [_number(classes[c]["attributes"]) for c in ("1", "4", "letters")]
        cells += [_number(classes[c]["strict"]) for c in ("1", "4")]
        cells.append(f"{classes['all']['attributes'][0] / full:.3f}")
        gap = row.get("gap_closed", {}).get("4")
        cells.append(f"{gap[0]:.2f} [{gap[1]:.2f}, {gap[2]:.2f}]" if gap else "")
        cells += (
            [f"{row['denoising_s'] * 1000:.0f} ms", f"{row['share_of_full_time']:.2f}"] if "steps" in row else ["", ""]
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Means with half the width of their 95 % bootstrap interval; denoising is the median latency at batch 1 with "
        "guidance. Two and three objects, categories and intervals of every class: the .json beside this file.",
    ]
    return "\n".join(lines) + "\n"


def put_into(readme: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- quality NAME -->` and `<!-- end NAME -->`."""
    before, start, rest = readme.read_text().partition(f"<!-- quality {name} -->\n")
    _, end, after = rest.partition(f"<!-- end {name} -->")
    if not start or not end:
        raise typer.BadParameter(f"{readme} has no markers for {name}")
    readme.write_text(before + start + text + end + after)


def _number(found: list[float]) -> str:
    mean, low, high = found
    return f"{mean:.3f} ± {(high - low) / 2:.3f}"


if __name__ == "__main__":
    typer.run(evaluate)
