"""`relay levels`: what a family's levels of work are worth and cost, as measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes import options as opt
from relay.errors import BadRequest

if TYPE_CHECKING:
    from scheduler.load.levels import Level


def levels(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="A family whose outcome rows are at hand.")],
    run: Annotated[
        list[Path] | None,
        typer.Option(help="Run folders with outcome rows and step times; default: those that the project ships."),
    ] = None,
    prompts: Annotated[str, typer.Option("--class", help="Prompt class: 1, 2, 3, 4, letters, or all.")] = "all",
    every: Annotated[bool, typer.Option("--all", help="Also the levels that are not worth choosing.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw quality against cost into this .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a family's levels: steps skipped from a cached latent, steps of the large member, steps of the small one.

    Example: relay levels mini-sd3 --picture levels.png
    """
    try:
        from scheduler.load.levels import SHIPPED, lattice
    except ImportError as error:
        raise BadRequest(f"{error.name} is not installed: pip install 'relay-inference[experiments]'") from None

    found = lattice(family, run or SHIPPED)
    classes = sorted({name for level in found for name in level.classes})
    if prompts not in classes:
        raise BadRequest(f"no prompts of class {prompts!r} were measured: choose {', '.join(classes)}")
    if picture is not None:
        _draw(found, family, prompts, opt.writable(picture))
    shown = [each for each in found if prompts in each.classes and (every or each.classes[prompts].front)]
    if as_json:
        print(json.dumps([told(level) for level in shown], indent=1))
        return
    from rich.console import Console

    Console(width=max(Console().width, 130)).print(_table(shown, found, family, prompts))
    if picture is not None:
        print(picture)


def told(level: Level) -> dict[str, Any]:
    """A level for programs."""
    import dataclasses

    return {
        "program": str(level.program), "skipped": level.skipped, "needs_similarity": level.needs,
        "steps": level.program.taken(level.skipped), "busy_s": dict(level.busy_s), "cost_s": level.cost_s,
        "latency_s": level.latency_s,
        "classes": {name: dataclasses.asdict(worth) for name, worth in level.classes.items()},
    }  # fmt: skip


def _table(shown: list[Level], found: list[Level], family: str, prompts: str) -> Any:
    from rich.table import Table

    full = _full(found)
    title = (
        f"{family}, prompts of class {prompts}: quality relative to full-cloud on the same prompts (95 % interval); node time"
        " an image at the best batch; latency at batch 1, denoising alone"
    )
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in (
        "level",
        "cached prompt",
        "quality",
        "prompts",
        "node time",
        "of full",
        "latency",
        "worth it in",
    ):
        table.add_column(column, no_wrap=True)
    for level in shown:
        worth = level.classes[prompts]
        best = [name for name, each in level.classes.items() if each.front]
        table.add_row(
            level.label,
            "" if level.needs is None else f">= {level.needs:.3f} alike",
            f"{worth.quality:.3f} [{worth.low:.3f}, {worth.high:.3f}]", str(worth.prompts),
            f"{1000 * level.cost_s:.0f} ms", f"{level.cost_s / full.cost_s:.2f}", f"{1000 * level.latency_s:.0f} ms",
            ", ".join(best),
        )  # fmt: skip
    return table


def _full(found: list[Level]) -> Level:
    return next(level for level in found if level.program.mode == "full-cloud" and not level.skipped)


def _short(level: Level) -> str:
    """For a picture: steps of the large and the small member, and after which K."""
    steps = level.program.taken(level.skipped)
    return f"{steps['large']} + {steps['small']}" + (f" from {level.skipped}" if level.skipped else "")


def _draw(found: list[Level], family: str, prompts: str, path: Path) -> None:
    """Quality against node time; what is worth choosing is labelled and joined."""
    if path.suffix not in (".png", ".svg"):
        raise BadRequest(f"--picture {path}: only .png and .svg files can be drawn")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise BadRequest(f"{error.name} is not installed: pip install 'relay-inference[experiments]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    full = _full(found)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for begins, colour, said in ((False, "#1f5fa8", "from noise"), (True, "#b8560f", "from a cached latent")):
        some = [each for each in found if prompts in each.classes and (each.skipped > 0) == begins]
        for level in some:
            worth, x = level.classes[prompts], level.cost_s / full.cost_s
            axes.plot([x, x], [worth.low, worth.high], color=colour, alpha=0.3, lw=1)
            axes.plot(x, worth.quality, "o", color=colour, ms=6 if worth.front else 3, alpha=1 if worth.front else 0.4)
            if worth.front:
                axes.annotate(
                    _short(level), (x, worth.quality), textcoords="offset points", xytext=(3, -4), fontsize=7, rotation=-45,
                    va="top", color=colour,
                )  # fmt: skip
        line = sorted((e.cost_s / full.cost_s, e.classes[prompts].quality) for e in some if e.classes[prompts].front)
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, lw=1, label=said)
    axes.margins(x=0.06)
    axes.set(
        xlabel="node time of full-cloud's",
        ylabel=f"quality relative to full-cloud, class {prompts}",
        title=f"Levels of {family}: steps of the large + the small member",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
