"""Cells of a scheduling table on disk: one file a contender, scenario and seed; what is there is not run again."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.simulate.scheduling import Bench, frame
from relay.errors import BadRequest
from relay.files import write_atomically

if TYPE_CHECKING:
    import polars as pl

Cells = dict[tuple[str, str], list["pl.DataFrame"]]  # scenario, contender -> a frame a seed


def cell_path(bench: Bench, folder: Path, name: str, scenario: str, seed: int) -> Path:
    return folder / "cells" / scenario / name / f"{seed:02d}-{bench.digest(name, scenario)}.parquet"


def run_cells(bench: Bench, folder: Path, only: Iterable[str] | None, say: Callable[[str], None]) -> None:
    """All that is missing, seed by seed, so that a table over few seeds stands early."""
    import polars as pl

    config = bench.config
    names = [name for name in config.contenders if only is None or name in set(only)]
    for name in names:
        try:
            bench.policy(name, 0)  # refused now rather than after an hour
        except BadRequest as error:
            raise BadRequest(f"contender {name}: {error}; leave it out with --without") from None
    for seed in range(config.seeds):
        for name in names:
            for scenario in bench.scenarios(name):
                path = cell_path(bench, folder, name, scenario, seed)
                if path.exists():
                    continue
                learn, judged, micros = bench.run(name, seed, config.splits[2], config.learn, config.requests, scenario)
                rows = pl.concat(
                    [frame(learn).with_columns(phase=pl.lit("learn")), frame(judged).with_columns(phase=pl.lit("test"))]
                )
                buffer = io.BytesIO()
                rows.with_columns(decide_us=pl.lit(micros)).write_parquet(buffer)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, buffer.getbuffer())
                mean = judged and sum(row.reward or 0.0 for row in judged) / len(judged)
                say(f"{scenario} {name} seed {seed}: {mean:.4f}, {micros:.0f} us a decision")


def read_cells(bench: Bench, folder: Path) -> Cells:
    """What stands of the present config; a contender whose seeds are not all there has fewer frames."""
    import polars as pl

    found: Cells = {}
    for name in bench.config.contenders:
        for scenario in bench.scenarios(name):
            paths = [cell_path(bench, folder, name, scenario, seed) for seed in range(bench.config.seeds)]
            found[scenario, name] = [pl.read_parquet(path) for path in paths if path.exists()]
    return found
