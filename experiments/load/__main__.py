"""`python -m experiments.load`: measured levels, capacity, tuning, the table of systems under load, and real processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from nodes.cli import run as run_app

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Serving under load, simulated: ours and others.")
CONFIG = Path("configs/experiments/load.yaml")
REAL = Path("configs/experiments/load-service.yaml")
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
    report: Annotated[
        Path | None,
        typer.Option(help="A Markdown file on how well levels are predicted; what it says of other families stays."),
    ] = None,
) -> None:
    """Measure a family's levels and fit how to predict their quality for a prompt."""
    import msgspec

    from experiments.load.fit import fit, with_starts
    from experiments.load.tables import levels_report
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
        text, data = levels_report(report, {family: (found, told)})
        write_result(report, "Levels under load and their prediction", text, data)


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
    from experiments.pictures import shown
    from experiments.provenance import write_result

    case = _case(config)
    who, left_out = fitting(case, [n for n in names(case, only) if n not in (without or ())])
    rows, long = collect(case, _folder(case, folder), who, _say, seeds, requests)
    text, data = report(case, rows, long, who, left_out)
    charts = draw(case, rows, who, out.parent, out.stem)
    text += "\n" + "\n".join(map(shown, charts)) + "\n"
    write_result(out, "Under load: ours and other systems", text, {case.config.family: data})


@app.command()
def service(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Its fleet is started as processes here.")] = REAL,
    only: Only = None,
    trace: Annotated[list[str] | None, typer.Option(help="Default: all of the config's.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of each trace and system.")] = 600.0,
    load: Annotated[float, typer.Option(min=0.01, help="Of full-cloud capacity.")] = 1.3,
    deadline: Annotated[float, typer.Option(min=0.01, help="Times full-cloud latency.")] = 2.0,
    out: Annotated[Path, typer.Option(help="A .json lies beside it.")] = Path("docs/results/load-service.md"),
) -> None:
    """The same requests through real processes and through the simulation, for ours and others."""
    from experiments.load.against import run, text
    from experiments.load.cells import names
    from experiments.provenance import write_result

    case = _case(config)
    fleet = _fleet(case)
    rows = run(case, fleet, names(case, only), _traces(case, trace), seconds, load, deadline, _say)
    write_result(
        out, "Under load: the simulation against real processes", text(case, fleet, rows, seconds, load, deadline),
        {case.config.family: {"rows": rows}},
    )  # fmt: skip


@app.command()
def overload(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Its fleet is started as processes here.")] = REAL,
    times: Annotated[float, typer.Option(min=0.1, help="Asked at the peak, of the sustainable load.")] = 3.0,
    before: Annotated[float, typer.Option(min=1, help="Seconds of calm.")] = 30.0,
    peak: Annotated[float, typer.Option(min=1, help="Seconds of the peak.")] = 60.0,
    after: Annotated[float, typer.Option(min=1, help="Seconds of calm.")] = 60.0,
    deadline: Annotated[float, typer.Option(min=0.01, help="SLO, times full-cloud latency.")] = 2.0,
    kill: Annotated[
        str | None, typer.Option(help="A node killed in the middle of the peak; default: the last edge.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The Markdown file; .json and .png lie beside it.")] = Path(
        "docs/results/overload.md"
    ),
) -> None:
    """Real processes asked for several times what they can bear, and what is left of them afterwards."""
    from experiments.load import overload as overloading
    from experiments.provenance import write_result

    case, phases = _case(config), overloading.Phases(before, peak, after, times)
    fleet = _fleet(case)
    edges = [name for name, node in case.config.fleets[fleet].nodes.items() if node.role == "edge"]
    found = overloading.run(case, fleet, phases, deadline, kill or edges[-1], case.tuned.get("ours", {}))
    overloading.draw(found, phases, out.with_suffix(".png"))
    text = overloading.text(found, case, fleet, phases, out.with_suffix(".png").name)
    write_result(out, "Several times what can be borne, and back", text, {case.config.family: found})


def _fleet(case: Any) -> str:
    """The only one of a config whose fleet is started."""
    from relay.errors import BadRequest

    if len(case.config.fleets) != 1:
        raise BadRequest(f"one fleet is started as processes, and the config has {', '.join(case.config.fleets)}")
    return str(next(iter(case.config.fleets)))


def _traces(case: Any, wanted: list[str] | None) -> list[str]:
    from relay.errors import BadRequest

    if unknown := [name for name in wanted or () if name not in case.config.traces]:
        raise BadRequest(f"no trace {unknown[0]!r} in the config: choose {', '.join(case.config.traces)}")
    return [name for name in case.config.traces if name in (wanted or case.config.traces)]


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
