"""One column of a file on disk: text, CSV, JSON, parquet or Arrow. Every refusal names file and key, in one line.

polars is imported late: only those who read tables need the `experiments` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from relay.errors import BadRequest

if TYPE_CHECKING:
    import polars as pl

TABLES = (".csv", ".tsv", ".parquet", ".json", ".jsonl", ".ndjson", ".arrow")


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 text file, blank ones included, so that an index is a line number."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadRequest(f"{path}: line {line} is not UTF-8 text: save the file as UTF-8") from None


def read_column(path: Path, column: str, root: str | None = None) -> Sequence[str | None]:
    """A text column, row by row; of a list column the first entry. `root`: the key of a JSON object that holds the rows."""
    if not path.is_file():
        raise BadRequest(f"{path} cannot be read: there is no such file")
    series = _read(path, column, root)
    import polars as pl

    if isinstance(series.dtype, pl.List):
        series = series.list.first()
    if series.dtype != pl.String:
        raise BadRequest(f"{path}: column {column!r} holds {series.dtype}, not text")
    return series  # type: ignore[return-value]  # indexed and measured like a sequence, without 2 million str objects


def read_numbers(path: Path, column: str | None) -> list[float]:
    """A column of numbers of a CSV; without `column` the first one."""
    if not path.is_file():
        raise BadRequest(f"{path} cannot be read: there is no such file")
    series = _read(path, column, None)
    found: list[float] = []
    for row, text in enumerate(series, start=2):  # line 1 is the header
        try:
            found.append(float(text))
        except (TypeError, ValueError):
            raise BadRequest(f"{path}: line {row}, column {series.name!r}: {text!r} is not a number") from None
    return found


def _read(path: Path, column: str | None, root: str | None) -> pl.Series:
    try:
        import polars as pl
    except ImportError:
        raise BadRequest(f"{path}: reading tables needs polars: pip install 'relay-inference[experiments]'") from None
    try:
        if root is not None:
            return _nested(path, column or "", root)
        columns = _columns(path)
        if column is None:
            column = columns[0] if columns else ""
        if column not in columns:
            raise BadRequest(f"{path}: there is no column {column!r}: it has {', '.join(columns[:20]) or 'none'}")
        match path.suffix:
            case ".csv" | ".tsv":  # every cell as text: an inferred type would turn the prompt "2001" into a number
                return pl.read_csv(path, columns=[column], separator=_separator(path), infer_schema=False)[column]
            case ".parquet":
                return pl.read_parquet(path, columns=[column])[column]
            case ".json":
                return pl.read_json(path)[column]
            case ".arrow":
                return _arrow(path)[column]
        return pl.read_ndjson(path)[column]
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise BadRequest(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from None


def _columns(path: Path) -> list[str]:
    import polars as pl

    match path.suffix:
        case ".csv" | ".tsv":
            if not path.stat().st_size:
                raise BadRequest(f"{path} is empty")
            return pl.read_csv(path, n_rows=0, separator=_separator(path), infer_schema=False).columns
        case ".parquet":
            return list(pl.read_parquet_schema(path))
        case ".json":
            return pl.read_json(path).columns
        case ".jsonl" | ".ndjson":
            return pl.read_ndjson(path, n_rows=1).columns
        case ".arrow":
            return _arrow(path).columns
    raise BadRequest(f"{path}: unknown kind of table {path.suffix!r}: known are {', '.join(TABLES)}")


def _arrow(path: Path) -> pl.DataFrame:
    """Arrow, as `datasets.save_to_disk` writes it (a stream) or as a file."""
    import polars as pl

    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    return pl.read_ipc(path) if is_file else pl.read_ipc_stream(path)


def _nested(path: Path, column: str, root: str) -> pl.Series:
    """COCO's own annotation files: {"annotations": [{"caption": ...}, ...], ...}."""
    import polars as pl

    try:
        parts: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
        if root not in parts:
            raise BadRequest(f"{path}: there is no key {root!r}: it has {', '.join(list(parts)[:20]) or 'none'}")
        rows = msgspec.json.decode(parts[root], type=list[dict[str, Any]])
    except msgspec.DecodeError as error:
        raise BadRequest(f"{path} cannot be read as json: {error}") from None
    if rows and column not in rows[0]:
        raise BadRequest(f"{path}: there is no column {column!r} in {root}: it has {', '.join(list(rows[0])[:20])}")
    return pl.Series(column, [row.get(column) for row in rows], dtype=pl.String, strict=False)


def _separator(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","
