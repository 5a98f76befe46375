"""`python -m experiments.load`: measured levels, capacity, tuning and the table of systems under load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nodes.cli import run as run_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serving under load, simulated: ours and others.")
CONFIG = Path("configs/experiments/load.yaml")
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML as configs/experiments/load.yaml.")]
Only = Annotated[list[str] | None, typer.Option(help="Only these systems.")]
Folder = Annotated[Path | None, typer.Option(help="Where runs are kept; default: runs/experiments/NAME.")]


@app.command()
def levels(
    family: Annotated[str, typer.Argument(metavar="FAMILY")],
    store: Annotated[list[Path], typer.Option(help="Run folders of the outcome store, all three splits.")],
    metric: Annotated[str, typer.Option(help="The score that is called quality.")] = "attributes",
    router: Annotated[
        str | None, typer.Option(help="Metric set of the router whose word is taken; none: words only.")
    ] = None,
    starts: Annotated[
        list[Path] | None,
        typer.Option(help="Runs of cached starts: their levels too, as far as the family's rule allows."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Default: where the package keeps it.")] = None,
    report: Annotated[Path | None, typer.Option(help="A Markdown file on how well levels are predicted.")] = None,
) -> None:
    """Measure a family's levels and fit how to predict their quality for a prompt."""
    import msgspec

    from experiments.load.fit import fit, with_starts
    from experiments.load.tables import prediction_table
    from experiments.provenance import write_result
    from relay.files import write_atomically
    from scheduler.load.prediction import shipped
    from scheduler.load.similarity import read_rule

    loaded = None
    if router is not None:
        from scheduler.router.router import Router

        loaded = Router.load(family, router)
    found, told = fit(store, family, metric, loaded, router)
    if starts:
        found = with_starts(found, starts, read_rule(found.family))
    path = out or shipped(family)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.encode(found).decode() + "\n")
    print(f"{path}: {len(found.levels)} levels")
    if report is not None:
        write_result(report, f"Levels of {family} and their prediction", prediction_table(found, told), {family: told})


@app.command()
def ship(
    store: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The folder that takes validation and test rows, scores alone.")],
    metric: Annotated[list[str], typer.Option(help="Scores to keep.")] = ["attributes"],  # noqa: B006
    family: Annotated[list[str] | None, typer.Option(help="Only these families.")] = None,
) -> None:
    """Copy what a table reads of the outcome store, so that it can be made anew from a fresh clone."""
    from experiments.load.tables import ship as copy

    print(copy(store, out, metric, family))


@app.command()
def capacity(config: Config = CONFIG) -> None:
    """Each fleet's full-cloud capacity and latency, as simulated."""
    case = _case(config)
    for fleet in case.config.fleets:
        per_s, latency = case.capacity(fleet)
        print(f"{fleet}: {per_s:.3f} pictures/s, {latency:.3f} s")


@app.command()
def tune(config: Config = CONFIG, only: Only = None, folder: Folder = None) -> None:
    """Search every system's settings, as many for each, on validation prompts; write them to the config's `tuned`."""
    from experiments.load.cells import search
    from experiments.load.tables import write_tuned
    from relay.errors import BadRequest

    case = _case(config)
    if case.config.tuned is None:
        raise BadRequest(f"{config} names no `tuned` file to write to")
    found = search(case, _folder(case, folder), only, _say)
    write_tuned(Path(case.config.tuned), found)
    print(case.config.tuned)


@app.command()
def table(
    config: Config = CONFIG,
    only: Only = None,
    folder: Folder = None,
    out: Annotated[Path, typer.Option(help="The Markdown file; .json and .png lie beside it.")] = Path(
        "docs/results/load.md"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Fewer than the config says.")] = None,
    requests: Annotated[int | None, typer.Option(min=10, help="Of a cell; fewer than the config says.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Not these systems.")] = None,
) -> None:
    """Run every cell that has not been run, and write the table."""
    from experiments.load.cells import names
    from experiments.load.report import collect, draw, report
    from experiments.load.tables import fitting
    from experiments.provenance import write_result

    case = _case(config)
    who, left_out = fitting(case, [n for n in names(case, only) if n not in (without or ())])
    rows = collect(case, _folder(case, folder), who, seeds or case.config.seeds, requests or case.config.requests, _say)
    text, data = report(case, rows, who, left_out)
    charts = draw(case, rows, who, out.parent, out.stem)
    text += "\n" + "\n".join(f"![{path.stem}]({path.name})" for path in charts) + "\n"
    write_result(out, "Under load: ours and other systems", text, {case.config.family: data})


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="The Markdown file; a .json lies beside it.")] = Path(
        "docs/results/load-control.md"
    ),
) -> None:
    """What the decisions themselves cost."""
    from experiments.load.bench import main as run_bench
    from experiments.provenance import write_result

    text, data = run_bench()
    write_result(out, "What decisions under load cost", text, {"control": data})


def _case(path: Path) -> Any:
    from experiments.load.case import read_case

    return read_case(path)


def _folder(case: Any, folder: Path | None) -> Path:
    return folder or Path("runs/experiments") / str(case.config.name)


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """`python -m experiments.load`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_app(app)


if __name__ == "__main__":
    main()
