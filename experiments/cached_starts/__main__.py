"""python -m experiments.cached_starts run | report

`run` draws pairs of prompts from cached starts into a run folder, a few pairs a unit, and goes on where it was stopped.
`report` calibrates the similarity thresholds on validation rows, writes them into configs/cache, and reports on test rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nodes.cli import run as run_app

app = typer.Typer(add_completion=False, no_args_is_help=True)
FOLDER = Path("runs/experiments/cached-starts")
SPLITS = ("validation", "test")
Families = Annotated[list[str] | None, typer.Option(help="Default: both embedded ones.")]


@app.command()
def run(
    family: Families = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Of each split, of T = 28: the large member alone and relays.")
    ] = 144,
    long: Annotated[
        int, typer.Option(min=0, help="The first so many of them also with T = 50, the large member.")
    ] = 24,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a unit of work.")] = 24,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16; default: the family's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...; default: the family's.")] = None,
    threads: int = 1,
    shard: Annotated[str, typer.Option(help="I/N: every N-th unit from the I-th, into the same folder.")] = "1/1",
    out: Path = FOLDER,
) -> None:
    """Draw what is not drawn yet."""
    import torch

    from experiments.cached_starts.work import prepare, units, work
    from experiments.run_folder import begin, open_run, shard_of
    from nodes.session import quiet_libraries
    from scheduler.outcomes import write_unit

    part, parts = shard_of(shard)
    quiet_libraries()
    torch.set_num_threads(threads)
    prepared = prepare(family or ["mini-sd3", "mini-sdxl"], pairs, long, batch, dtype, device)
    begin(out, prepared.facts)
    mine = units(prepared, SPLITS)[part - 1 :: parts]
    there = open_run(out)
    todo = [unit for unit in mine if not there.has("outcomes", unit.name)]
    for number, unit in enumerate(todo):
        rows = work(prepared, unit)
        write_unit(out, "outcomes", unit.name, rows)
        print(f"{number + 1} of {len(todo)}: {unit.name}, {len(rows)} rows", flush=True)


@app.command()
def report(
    folder: Path = FOLDER,
    out: Annotated[Path, typer.Option(help="A .json lies beside it.")] = Path("docs/results/cache-levels.md"),
    configs: Annotated[Path, typer.Option(help="Where thresholds are written, FAMILY.yaml.")] = Path("configs/cache"),
    thresholds: Annotated[
        bool, typer.Option(help="Write them; not from a run that is too small to say something.")
    ] = True,
    ship: Annotated[Path | None, typer.Option(help="Also pack the rows into this folder.")] = None,
) -> None:
    """Thresholds from validation rows, tables from test rows."""
    from experiments.cached_starts.report import text_and_data, write_rules
    from experiments.provenance import write_result
    from experiments.run_folder import open_run, pack

    found = open_run(folder)
    text, data = text_and_data(found)
    if thresholds:
        write_rules(configs, data)
    if ship is not None:
        print(f"{pack(found, ship)} bytes of rows in {ship}")
    write_result(out, "Cached starts: quality by similarity and steps skipped", text, data)


def main(argv: Any = None) -> None:
    run_app(app)


if __name__ == "__main__":
    main()
