"""A run's folder: opened for work, read as data frames and images, merged from shards."""

from __future__ import annotations

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest, RelayError
from relay.files import replacing, write_atomically
from scheduler.outcomes import TABLES, image_path, read_table, unit_path

if TYPE_CHECKING:
    import polars as pl
    from PIL.Image import Image

PACKED = "all"  # the file that holds every unit of a table


class Run:
    """A finished or unfinished run, for reading. `open_run(folder)` makes one."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / "run.json").read_text())
        except FileNotFoundError:
            raise BadRequest(f"{folder} is no run folder: it has no run.json") from None
        except ValueError as error:
            raise RelayError(f"{folder / 'run.json'} is damaged: {error}") from None

    @property
    def config(self) -> dict[str, Any]:
        return self.facts["config"]

    @property
    def config_hash(self) -> str:
        return self.facts["config_hash"]

    @property
    def dtypes(self) -> dict[str, str]:
        """What each family's members compute in; empty in a run that was begun before this was told."""
        return self.facts.get("dtypes", {})

    @property
    def dtype(self) -> str:
        """The same as text; empty where it is not told."""
        return dtypes_text(self.dtypes)

    @property
    def packed(self) -> dict[str, list[str]]:
        """Of a run that was packed: table -> the units whose rows lie in one file; a run that goes on leaves them alone."""
        return self.facts.get("packed", {})

    def is_one_file(self, table: str) -> bool:
        """Whether `pack` put a table's units together."""
        return unit_path(self.folder, table, PACKED).exists()

    def has(self, table: str, unit: str) -> bool:
        """Whether a unit's rows are there. BadRequest where nobody can tell: a pack of before it named its units."""
        if table not in self.packed and self.is_one_file(table):
            raise BadRequest(f"{self.folder} was packed without the names of its units: it is for reading alone")
        return unit in self.packed.get(table, ()) or unit_path(self.folder, table, unit).exists()

    @cached_property
    def outcomes(self) -> pl.DataFrame:
        """Quality rows, one a program x prompt x seed; see scheduler.outcomes.OUTCOME_SCHEMA."""
        return read_table(self.folder, "outcomes")

    @cached_property
    def times(self) -> pl.DataFrame:
        """Latency rows at batch 1, one a program x link x round."""
        return read_table(self.folder, "times")

    @cached_property
    def curves(self) -> pl.DataFrame:
        """Step time of each member over batch size."""
        return read_table(self.folder, "curves")

    def image(self, digest: str) -> Image:
        """The image that a row names in its `image` column."""
        from PIL import Image

        return Image.open(image_path(self.folder, digest)).convert("RGB")


def open_run(folder: str | Path) -> Run:
    """Read a run's data frames and images: `open_run("runs/experiments/rise").outcomes`."""
    return Run(Path(folder))


def dtypes_text(dtypes: dict[str, str]) -> str:
    """One word where all families compute alike."""
    words = list(dict.fromkeys(dtypes.values()))
    return ", ".join(words if len(words) < 2 else (f"{Path(f).stem} {d}" for f, d in dtypes.items()))


def begin(folder: Path, facts: dict[str, Any]) -> None:
    """Make the folder, or check that what lies there is the same experiment."""
    path = folder / "run.json"
    if path.exists():
        there = Run(folder)
        if there.config_hash != facts["config_hash"]:
            raise BadRequest(
                f"{folder} holds a run of another config ({there.facts['config']['name']}, {there.config_hash};"
                f" this one is {facts['config_hash']}): choose another --out, or remove it"
            )
        asked = facts.get("dtypes", {})
        if there.dtypes and asked and there.dtypes != asked:
            raise BadRequest(
                f"{folder} holds a run in {there.dtype}, this one is in {dtypes_text(asked)}: say the same --dtype, or"
                " choose another --out"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise BadRequest(f"{folder} is not empty and holds no run: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(facts, indent=1) + "\n")


def shard_of(text: str) -> tuple[int, int]:
    """`I/N` as a user says it: every N-th unit from the I-th."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise BadRequest(f"--shard {text!r} is not I/N with 1 <= I <= N")
    return int(found[1]), int(found[2])


def merge(out: Path, shards: list[Path]) -> Run:
    """Put the shards of one run into one folder, with the rows of an unsharded run."""
    runs = [Run(shard) for shard in shards]
    if len({run.config_hash for run in runs}) > 1:
        said = ", ".join(f"{run.folder} {run.config_hash}" for run in runs)
        raise BadRequest(f"these are not shards of one run: {said}")
    if len({run.dtype for run in runs}) > 1:
        said = "; ".join(f"{run.folder} in {run.dtype or 'what it does not tell'}" for run in runs)
        raise BadRequest(f"these shards were not computed alike: {said}")
    if len(packed := [run for run in runs if any(map(run.is_one_file, TABLES))]) > 1:
        said = " and ".join(str(run.folder) for run in packed)
        raise BadRequest(f"{said} are packed: no unit of theirs is a file of its own, merge before `pack`")
    begin(out, (packed or runs)[0].facts)
    there = Run(out).packed
    for run in runs:
        for part in (*TABLES, "images"):
            for source in sorted((run.folder / part).rglob("*.p[na][gr]*")):
                target = out / source.relative_to(run.folder)
                if source.suffix != ".part" and not target.exists() and source.stem not in there.get(part, ()):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with replacing(target) as partial:
                        shutil.copyfile(source, partial)
    return Run(out)


def pack(run: Run, out: Path) -> int:
    """A run's rows without its images, one file a table, to be shipped: a report can be drawn from them at once, and a copy
    of an unfinished one goes on elsewhere. Bytes."""
    import io

    if out.resolve() == run.folder.resolve():
        raise BadRequest(f"{out} is the run itself: its rows are packed into another folder")
    begin(out, run.facts)
    total, units = 0, {}
    for table in TABLES:
        frame, buffer = read_table(run.folder, table), io.BytesIO()
        frame.write_parquet(buffer, compression="zstd", compression_level=19)
        (out / table).mkdir(exist_ok=True)
        write_atomically(unit_path(out, table, PACKED), buffer.getvalue())
        total += buffer.tell()
        files = {path.stem for path in (run.folder / table).glob("*.parquet")} - {PACKED}
        units[table] = sorted(files.union(run.packed.get(table, ())))
    write_atomically(out / "run.json", json.dumps(run.facts | {"packed": units}, indent=1) + "\n")
    return total
