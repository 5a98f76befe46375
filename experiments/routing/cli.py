"""`python -m experiments.routing table CONFIG`: fit every router with every seed, and write the tables beside the paper's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes.cli import run as run_app

if TYPE_CHECKING:
    from experiments.routing.cells import Bench, Cell
    from experiments.routing.config import Comparison

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Compare routers on what was drawn.")
CONFIG = Path("configs/experiments/routing.yaml")


@app.callback()
def _group() -> None:
    """Keeps `table` a command of its own."""


@app.command()
def table(
    config: Annotated[Path, typer.Argument(help="A YAML as configs/experiments/routing.yaml.")] = CONFIG,
    out: Annotated[Path, typer.Option(help="The Markdown file to write; .json and PNGs lie beside it.")] = Path(
        "docs/results/routing.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Only these families.")] = None,
    on: Annotated[str, typer.Option(help="test, or validation to look at while developing.")] = "test",
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Fit what is missing and write nothing.")] = False,
    threads: int = 1,
) -> None:
    """Search settings on validation, fit with every seed, measure on test; a stopped run goes on where it was."""
    import msgspec
    import torch

    from experiments.routing.config import read_comparison
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    comparison = read_comparison(config)
    if family:
        comparison = msgspec.structs.replace(comparison, families=family)
    found = []
    for name in comparison.families:
        for metric_set in comparison.metrics:
            bench = load_bench(comparison, name, metric_set, on)
            cells = fit_all(bench, comparison)
            if not fit_only:
                from experiments.routing.evaluate import evaluate

                found.append(evaluate(bench, cells, comparison, on))
    if not fit_only:
        from experiments.routing.page import write_page

        write_page(out, found, comparison)


def load_bench(comparison: Comparison, family: str, metric_set: Any, on: str) -> Bench:
    """A family's data and embeddings, checked before anything is fitted."""
    from experiments.routing.cells import Bench
    from experiments.routing.data import load
    from experiments.routing.embeddings import embeddings_of
    from relay.errors import BadRequest

    data = load(comparison.runs, family, metric_set)
    needed = ("train", "validation", on) if on == "test" else ("train", "validation")
    if empty := [name for name in needed if not len(getattr(data, name))]:
        raise BadRequest(f"{', '.join(comparison.runs)} holds no {' and no '.join(empty)} prompts of {family} yet")
    folder = Path(comparison.folder)
    prompts = data.train.prompts + data.validation.prompts + data.test.prompts
    return Bench(
        data, embeddings_of(family, prompts, folder / "embeddings"), folder / f"{Path(family).stem}-{metric_set}"
    )


def fit_all(bench: Bench, comparison: Comparison) -> Mapping[str, list[Cell]]:
    """Router -> one cell a seed; ablations of the token router last, with its settings."""
    from experiments.routing.baselines import ABLATIONS
    from experiments.routing.cells import chosen_cells, fitted, other_seeds
    from relay.errors import BadRequest

    began = time.monotonic()
    where = f"{bench.data.family}, {bench.data.metric_set}"

    def say(text: str) -> None:
        typer.echo(f"[{time.monotonic() - began:6.0f} s] {where}: {text}", err=True)

    cells: dict[str, list[Cell]] = {}
    for router in comparison.routers:
        cells[router] = chosen_cells(bench, router, comparison.tries, comparison.seeds, say)
    if comparison.other_seeds:
        if cell := other_seeds(bench, comparison.other_seeds):
            cells["oracle-seeds"] = [cell]
        else:
            say(f"{', '.join(comparison.other_seeds)} does not hold every test prompt: no oracle by other seeds")
    if bench.data.metric_set != comparison.metrics[0]:
        return cells
    for name in comparison.ablations:
        if name not in ABLATIONS:
            raise BadRequest(f"no ablation is called '{name}'; ablations: {', '.join(ABLATIONS)}")
        if "token" not in cells:
            raise BadRequest("ablations are the token router's: name `token` among the routers")
        settings = cells["token"][0].settings | ABLATIONS[name]
        cells[f"token, {name}"] = fitted(bench, "token", settings, range(comparison.seeds), say)
    return cells


def main() -> None:
    run_app(app)
