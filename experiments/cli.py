"""`relay-experiment`: sweep programs, look at the trade-off, choose one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from nodes.cli import run as run_app
from relay.errors import BadRequest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Experiments on relays: run a grid of programs, compare runs, report, advise.\n\n"
    "Try: `relay-experiment run configs/experiments/quick.yaml`",
)
Pass = Literal["scores", "times"]
Json = Annotated[bool, typer.Option("--json", help="For programs.")]


@app.command("run")
def run_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML as in configs/experiments/.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; default: runs/experiments/NAME.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the grid, an estimate of time and all that is missing here; draw nothing."
        ),
    ] = False,
    step_ms: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: LARGE,SMALL, what a step of one image costs in ms, instead of a figure of ours."
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(help="I/N: do every N-th unit from the I-th; `merge` puts shards together.")
    ] = "1/1",
    family: Annotated[list[str] | None, typer.Option(help="Run on these families instead (name or YAML).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N, mps; default: the family's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16, bf16; default: the family's.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    only: Annotated[
        Pass | None, typer.Option(help="Scores may be drawn on a busy machine, times want a quiet one.")
    ] = None,
) -> None:
    """Run a grid of programs into a folder; the same command goes on where a stopped one was.

    With --family a config's `real:` block takes over where the families are real checkpoints: their prompts, metrics
    and sizes. --dry-run needs none of their files and says which are missing.
    """
    import msgspec

    from experiments.grid import read_experiment
    from experiments.run_folder import shard_of

    experiment = read_experiment(config)
    part = shard_of(shard)
    if step_ms and not dry_run:
        raise BadRequest("--step-ms is what --dry-run reckons with: a run measures its own")
    if family:
        experiment = msgspec.structs.replace(experiment, families=family)
    from nodes.own_process import keep_memory

    keep_memory()  # big batches one after the other
    from experiments.progress import RunProgress
    from experiments.run import prepare, run
    from nodes.session import quiet_libraries

    quiet_libraries()
    import torch

    if threads:
        torch.set_num_threads(threads)
    if dry_run:
        from experiments.estimate import dry_run as survey

        print(survey(experiment, str(config), device, dtype, step_ms))
        return
    prepared = prepare(experiment, str(config), device, dtype)
    folder = out or Path("runs/experiments") / experiment.name
    with RunProgress() as progress:
        run(prepared, folder, part, progress, only)
    saved = (
        f"; shared prefixes saved {1 - progress.saved[0] / progress.saved[1]:.0%} of the steps"
        if progress.saved[1]
        else ""
    )
    done = "times taken" if only == "times" else f"{len(prepared.units[part[0] - 1 :: part[1]])} units of work done"
    print(f"{folder}: {done}{saved}")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    shards: Annotated[list[Path], typer.Argument(metavar="SHARD...")],
) -> None:
    """Put the shards of one run into one folder, with the rows of an unsharded run."""
    from experiments.run_folder import merge as merge_shards

    whole = merge_shards(out, shards)
    print(f"{out}: {whole.outcomes.height} rows")


@app.command()
def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
) -> None:
    """Keep a run's rows without its images, small enough to ship; `report` draws from it, and `run --out` of a copy goes on."""
    from experiments.run_folder import open_run
    from experiments.run_folder import pack as pack_rows

    print(f"{out}: {pack_rows(open_run(run), out) / 1000:.0f} KB")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A")],
    b: Annotated[Path, typer.Argument(metavar="B")],
    across: Annotated[
        bool, typer.Option(help="Pair programs of the same steps, for runs that differ in codec, matching or guidance.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Set two runs side by side: differences paired by program, prompt and seed, with bootstrap intervals."""
    from experiments.compare import compare as compare_runs
    from experiments.run_folder import open_run

    rows = compare_runs(open_run(a), open_run(b), across)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", title=f"A: {a}, B: {b}", title_justify="left")
    for column in ("program", "score", "A", "B", "B - A", "95 % interval", "pairs"):
        table.add_column(column)
    for row in rows:
        apart = (f"{row['difference']:+.4f}", f"[{row['low']:+.4f}, {row['high']:+.4f}]", str(row["pairs"]))
        table.add_row(_label(row), row["score"], f"{row['a']:.4f}", f"{row['b']:.4f}", *apart)
    Console(width=max(Console().width, 190)).print(table)


@app.command()
def choose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of all settings, scores and times, on validation.")],
    speedup: Annotated[
        list[float] | None,
        typer.Option(help="Least speedup of denoising against full-cloud; may be given again. [default: 2.1]"),
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="The score that counts; default: the first a report ranks by.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The YAML that a config's `chosen:` names.")] = Path(
        "configs/experiments/chosen/baselines.yaml"
    ),
) -> None:
    """Choose each baseline's setting: of those at least so fast the one with the best score, else its fastest."""
    from experiments.choose import choose as choose_settings
    from experiments.choose import write_chosen
    from experiments.run_folder import open_run

    opened, speedups = open_run(run), speedup or [2.1]
    print(write_chosen(opened, choose_settings(opened, speedups, score), speedups, out), end="")


@app.command()
def advise(
    run: Annotated[
        Path | None,
        typer.Option(help="A run folder with quality and time rows; default: those that this checkout ships."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Which of the run's families; default: its only one.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Of the link to the device, Mbit/s.")] = None,
    round_trip: Annotated[float, typer.Option(help="Of the link, ms.")] = 0.0,
    link: Annotated[
        str | None, typer.Option(help="A link by name or YAML instead of bandwidth and round trip.")
    ] = None,
    floor: Annotated[float | None, typer.Option(help="Least share of the large member's score, such as 0.95.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Most seconds end to end.")] = None,
    score: Annotated[str, typer.Option(help="The score that counts.")] = "attributes",
    complexity: Annotated[str | None, typer.Option(help="Only prompts of this class: 1, 2, 3, 4, letters.")] = None,
    step_ms: Annotated[
        str | None, typer.Option(help="LARGE,SMALL: step costs of your machines in ms, instead of the run's.")
    ] = None,
    service: Annotated[
        Path | None,
        typer.Option(help="Through our service: the .json that `python -m experiments.advise_links` wrote."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Name the best program for a link and a wish, how sure that is, and what the next best gives up."""
    from experiments import advise as advice

    print(
        advice.answer(
            run, family, bandwidth, round_trip, link, floor, time_limit, score, complexity, step_ms, as_json, service
        )
    )


@app.command()
def latency(
    family: Annotated[str, typer.Option(help="sdxl-vega or sd35.")],
    tiny: Annotated[
        bool, typer.Option("--tiny", help="The same code on tiny shapes, on a CPU: figures mean nothing.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N; default: cuda, with --tiny cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32; default: bf16, on a CPU fp32.")] = None,
    steps: Annotated[int | None, typer.Option(help="T; default: the family's.")] = None,
    batches: Annotated[str, typer.Option(help="Batch sizes of the step-time curve.")] = "1,2,4,8,16",
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after one to warm up.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Default: docs/results/latency-FAMILY.md; a .json lies beside it.")
    ] = None,
) -> None:
    """Time the real architectures at full size with random weights: no download, and no quality to be read."""
    from experiments.latency import default_out
    from experiments.latency import latency as measure_latency
    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    text, data = measure_latency(family, tiny, device, dtype, steps, batches, repeats)
    write_result(out or default_out(family, tiny), f"Latency of {family}, random weights", text, {family: data})


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Default: `report` in the first folder.")] = None,
    title: Annotated[str | None, typer.Option(help="Default: the runs' names.")] = None,
    result: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="MD", help="A measured table, as in docs/results/, to stand behind the runs; again for more."
        ),
    ] = None,
) -> None:
    """Show runs: one self-contained HTML page, and every figure as PNG and CSV."""
    from experiments.report import write_report

    print(write_report(folders, out, title, result or ()))


def _label(row: dict[str, Any]) -> str:
    """The program in A, and what is different of the one in B."""
    ours, theirs = row["program"].split("/"), row["program_b"].split("/")
    other = [part for part in theirs if part not in ours]
    return " ".join([row["program"], *(["->", *other] if other else [])])


def main() -> None:
    """`relay-experiment`."""
    run_app(app)


if __name__ == "__main__":
    main()
