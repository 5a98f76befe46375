"""`python -m experiments.baselines`: which baseline applies to which family, and why not."""

from __future__ import annotations

from typing import Annotated

import typer


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Name or YAML; may be repeated. Default: both embedded.")
    ] = None,
) -> None:
    """Print each family's table of baselines. Reads configs only, no weights."""
    from experiments.baselines import table
    from nodes.session import quiet_libraries
    from relay.family import Family

    quiet_libraries()
    for name in family or ["mini-sd3", "mini-sdxl"]:
        typer.echo(table(Family.load(name)) + "\n")


if __name__ == "__main__":
    typer.run(main)
