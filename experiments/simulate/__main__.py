"""`python -m experiments.simulate`: tune policies, compare them, check the simulation against real processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.cli import run as run_app
from scheduler.bandit import SHIPPED

if TYPE_CHECKING:
    from experiments.simulate.scheduling import Bench

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The service, simulated.")
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML as configs/experiments/scheduling.yaml.")]
Only = Annotated[list[str] | None, typer.Option(help="Only these contenders.")]
Folder = Annotated[Path | None, typer.Option(help="Where runs are kept; default: runs/experiments/NAME.")]


@app.command()
def scales(
    config: Config,
    requests: Annotated[int, typer.Option(help="Requests of the random policy.")] = 2000,
    split: Annotated[str, typer.Option(help="Of the prompts.")] = "validation",
    arms: Annotated[str | None, typer.Option(help="One of the config's `arms`; default: every stored program.")] = None,
) -> None:
    """Propose the reward's scales: of each term what one in twenty of the random policy's answers passes."""
    from experiments.simulate.scales import propose

    print(propose(_bench(config), requests, split, arms))


@app.command()
def tune(config: Config, only: Only = None, folder: Folder = None) -> None:
    """Search every learner's settings on validation prompts and write them to the config's `tuned` file."""
    from experiments.simulate.search import search, write_tuned
    from relay.errors import BadRequest

    bench = _bench(config)
    if bench.config.tuned is None:
        raise BadRequest(f"{config} names no `tuned` file to write to")
    found = search(bench, _folder(bench, folder), only, _say)
    write_tuned(bench, found, Path(bench.config.tuned))
    print(bench.config.tuned)


@app.command()
def table(
    config: Config,
    only: Only = None,
    folder: Folder = None,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; .json and .png lie beside it.")] = Path(
        "docs/results/scheduling.md"
    ),
    without: Annotated[list[str] | None, typer.Option(help="Not these contenders.")] = None,
    untuned: Annotated[bool, typer.Option(help="With the settings as given where none were searched.")] = False,
    draw: Annotated[bool, typer.Option(help="Only write what stands, run nothing.")] = False,
) -> None:
    """Run every contender that has not been run, and write the table, the shifts and the learning curves."""
    from experiments.provenance import write_result
    from experiments.simulate.cells import read_cells, run_cells
    from experiments.simulate.charts import draw_charts
    from experiments.simulate.report import report
    from relay.errors import BadRequest

    bench = _bench(config)
    names = [n for n in bench.config.contenders if (not only or n in only) and n not in (without or ())]
    wanting = [n for n in names if bench.config.contenders[n].space and n not in bench.tuned]
    if wanting and not untuned:
        raise BadRequest(f"{', '.join(wanting)}: not tuned yet: run `tune`, or say --untuned")
    where = _folder(bench, folder)
    if not draw:
        run_cells(bench, where, names, _say)
    cells = read_cells(bench, where)
    charts = draw_charts(bench, cells, out.parent, out.stem)
    text, data = report(bench, cells, charts)
    write_result(out, "Scheduling: policies in the simulated service", text, data)


@app.command()
def warm(
    config: Config,
    requests: Annotated[int, typer.Option(help="Requests of train prompts to learn from.")] = 4000,
    elsewhere: Annotated[Path, typer.Option(help="A deployment whose nodes it is judged on.")] = Path(
        "configs/deployments/simulation.yaml"
    ),
    seeds: Annotated[int, typer.Option(help="Streams of requests it is judged on.")] = 10,
    router: Annotated[bool, typer.Option(help="With the router in front of it, as it serves.")] = True,
    model: Annotated[Path, typer.Option(help="The bandit's file to write; default: where it ships.")] = SHIPPED,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/warm-start.md"
    ),
) -> None:
    """Make the start that the learned policy ships with, and measure what it is worth on other nodes."""
    from experiments.provenance import write_result
    from experiments.simulate import warm as warming

    bench = _bench(config)
    options = {"router": router}
    learned = warming.learn(bench, model, requests, options)
    found = warming.check(bench, model, elsewhere, seeds, options, _say)
    write_result(out, "The bandit's warm start", warming.table(found, learned, elsewhere), found)


@app.command()
def off_policy(
    config: Config,
    arms: Annotated[str, typer.Option(help="One of the config's `arms`: few actions, or a log says little.")] = "rise",
    family: Annotated[str, typer.Option(help="Programs of this family only.")] = "mini-sd3",
    logs: Annotated[int, typer.Option(help="Logs of the random policy, in each of two worlds.")] = 100,
    rows: Annotated[int, typer.Option(help="Requests a log.")] = 1000,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/off-policy.md"
    ),
) -> None:
    """Measure what `relay replay` is worth: coverage where requests are rare, bias where actions change later queues."""
    from experiments.provenance import write_result
    from experiments.simulate import off_policy as evaluating

    found = evaluating.measure(_bench(config), arms, family, logs, rows, _say)
    write_result(out, "Off-policy evaluation against the truth", evaluating.table(found), found)


@app.command()
def check(
    family: Annotated[str, typer.Option(help="A family that is here.")] = "mini-sd3",
    requests: Annotated[int, typer.Option(help="How many are sent through both.")] = 200,
    load: Annotated[float, typer.Option(help="Share of its time that the edge is busy.")] = 0.5,
    link: Annotated[str | None, typer.Option(help="Emulated between the device and all others.")] = None,
    pace: Annotated[float, typer.Option(help="Of both nodes: so slow that being two costs neither anything.")] = 2.0,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/simulation.md"
    ),
) -> None:
    """Send the same requests through real processes and through the simulation, and compare mean times."""
    from experiments.provenance import write_result
    from experiments.simulate.check import main as run_check

    text, data = run_check(family, requests, load, link, pace=pace)
    write_result(out, "The simulation against real processes", text, {family: data})


def _bench(path: Path) -> Bench:
    from experiments.simulate.scheduling import Bench, read_scheduling

    return Bench(read_scheduling(path))


def _folder(bench: Bench, folder: Path | None) -> Path:
    return folder or Path("runs/experiments") / bench.config.name


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    """`python -m experiments.simulate`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of policies that use torch: their networks are tiny
    run_app(app)


if __name__ == "__main__":
    main()
