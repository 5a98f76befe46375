"""The main job on a laptop: prompts to pictures at several handoff points, with both embedded families.

Leaves a contact sheet and the pictures themselves, and prints quality and time per handoff point. The sheet's pictures
are made one by one as a user would make them; the table's quality comes from a small sample of held-out prompts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

FAMILIES = ("mini-sd3", "mini-sdxl")
PROMPTS = (
    "a large red heart",
    "a small yellow star at the top left and a large blue dotted circle at the bottom right, on a black background",
    "three green rings on a white background",
    "a large purple striped square at the centre, a small white diamond at the top right and a red cross at the left, "
    "on a yellow background",
    "a large orange checkered circle at the top left, a small red plain triangle at the top right, a large green star at "
    "the bottom left and a small purple striped heart at the bottom right, on a white background",
    'the word "CAT" in red on a white background',
)
SHARES = (0.0, 0.25, 1 / 3, 0.5, 1.0)
console = Console()


def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, sheets and the table.")] = Path("out/demo"),
    sample: Annotated[int, typer.Option(help="Held-out prompts behind each row of the table.")] = 40,
    prompts: Annotated[int, typer.Option(help="Rows of the contact sheet.")] = len(PROMPTS),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    steps: Annotated[int | None, typer.Option(help="T; default: each family's own.")] = None,
) -> None:
    """Relay at several handoff points with both embedded families: contact sheets, and a table of quality and time."""
    from nodes.session import quiet_libraries

    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in family or FAMILIES:
        written += _family(name, out, sample, PROMPTS[:prompts], steps)
    console.print("\nwritten:")
    for path in written:
        console.print(f"  {path}", soft_wrap=True)


def _family(name: str, out: Path, sample: int, prompts: tuple[str, ...], steps: int | None) -> list[Path]:
    from experiments.contact_sheet import Cell, contact_sheet
    from nodes.results import score
    from relay.pipeline import RelayPipeline

    pipe = RelayPipeline.from_pretrained(name)
    total = steps or pipe.family.spec.members["large"].steps
    programs = [pipe.plan(num_inference_steps=total, handoff=round(share * total)) for share in SHARES]
    pictures = out / name
    pictures.mkdir(exist_ok=True)
    rows = []
    times: dict[str, list[float]] = {str(p): [] for p in programs}
    pipe(prompts[0], program=programs[2], seed=0)  # load and warm up, so that no time holds a first call
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{name}: pictures", total=len(prompts) * len(programs))
        for i, prompt in enumerate(prompts):
            cells = []
            for program in programs:
                result = pipe(prompt, program=program, seed=i)
                seconds = sum(result.denoising_s.values())
                times[str(program)].append(seconds)
                verdict = score(result.images[0], prompt)
                result.images[0].save(pictures / f"{i}-s{program.steps['large']:02d}.png")
                cells.append(Cell(result.images[0], f"{seconds:.2f} s   {verdict['attributes']:.0%}"))
                progress.advance(task)
            rows.append((prompt, cells))
        scored = _sample(pipe, programs, sample, progress)
    columns = [_column(p) for p in programs]
    title = f"{name}: s steps of the large member, the rest by the small one (denoising time, attributes right)"
    sheet = out / f"{name}.png"
    contact_sheet(title, columns, rows).save(sheet)
    _print_table(name, programs, times, scored, sample)
    table = out / f"{name}.json"
    table.write_text(json.dumps({"programs": times, "attributes": scored}, indent=1) + "\n")
    return [sheet, pictures, table]


def _column(program) -> str:  # noqa: ANN001
    large, small = program.steps["large"], program.steps["small"]
    name = {"full-cloud": "full-cloud", "edge-only": "edge-only"}.get(program.mode, f"s = {large}")
    return f"{name}\n{large} + {small} steps"


def _sample(pipe, programs, sample: int, progress) -> dict[str, list[float]]:  # noqa: ANN001
    import numpy as np

    from experiments.scoring import score_programs
    from relay.scenes.sampling import caption, held_out

    scenes = held_out(sample, "test")
    rng = np.random.default_rng(23)
    captions = [caption(scene, rng) for scene in scenes]
    task = progress.add_task(f"{pipe.family.name}: {sample} held-out prompts", total=sample)
    scored = score_programs(
        pipe.family, scenes, captions, programs, list(range(sample)), batch=20,
        progress=lambda done, _: progress.update(task, completed=done),
    )  # fmt: skip
    return {text: [v.attributes for v in verdicts] for text, verdicts in scored.verdicts.items()}


def _print_table(name: str, programs, times, scored, sample: int) -> None:  # noqa: ANN001
    from experiments.statistics import gap_closed, interval

    table = Table(title=f"{name}: {sample} held-out prompts, seeds fixed; time is latency at batch 1", box=None)
    for column in ("program", "steps", "attributes right", "gap closed", "denoising", "of full-cloud"):
        table.add_column(column, justify="left" if column == "program" else "right")
    full = str(programs[-1])
    small = scored[str(programs[0])]
    whole = sum(times[full])
    for program in programs:
        text = str(program)
        mean, low, high = interval(scored[text])
        gap = gap_closed(scored[text], small, scored[full])
        closed = f"{gap[0]:.2f}" if gap and program.mode == "relay" else "-"
        taken = f"{program.steps['large']} + {program.steps['small']}"
        seconds = sum(times[text])
        each = f"{seconds / len(times[text]):.2f} s"
        table.add_row(
            program.mode, taken, f"{mean:.3f} [{low:.3f}, {high:.3f}]", closed, each, f"{seconds / whole:.2f}"
        )
    console.print(table)


if __name__ == "__main__":
    typer.run(demo)
