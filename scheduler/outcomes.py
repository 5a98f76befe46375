"""The outcome store: what came out when a program drew a prompt. Its schema, how it is written and how it is read.

A run folder holds

    run.json                 the resolved config, its hash, versions, machine
    outcomes/UNIT.parquet    quality rows: program x prompt x seed (x cached start, if any), with scores
    times/UNIT.parquet       time rows: program x link x round, latency at batch 1, stage by stage
    curves/UNIT.parquet      step-time curve rows: member x batch size
    images/ab/abcdef.png     every image once, under the hash of its pixels

A unit of work is one file that appears whole or not at all, under a name that does not depend on who worked on it, so
a killed run goes on and shards merge by putting their files together. Scores (`score_*`) and times never stand in one
table: quality rows come from big batches with shared prefixes, and a time read there would be nobody's latency.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from relay.files import write_atomically

TABLES = ("outcomes", "times", "curves")
SCORE = "score_"

# Quality rows; score columns come after these, one a metric's column. `start_*` is empty for a start from noise.
OUTCOME_SCHEMA: dict[str, Any] = {
    "config_hash": pl.String,
    "family": pl.String,
    "method": pl.String,  # "program", or the name of a baseline
    "program": pl.String,  # canonical text; for a baseline NAME[SETTING], which tells T
    "mode": pl.String,
    "steps_total": pl.Int32,  # T of the first leg; for a baseline of the full-cloud that it approximates
    "handoff": pl.Int32,  # steps of the large member
    "small_steps": pl.Int32,
    "matching": pl.String,
    "codec": pl.String,
    "conditioning": pl.String,
    "guidance": pl.String,
    "workload": pl.String,
    "split": pl.String,
    "prompt_index": pl.Int32,
    "prompt": pl.String,
    "scene": pl.String,  # what the prompt asks for, canonically; empty for free text
    "complexity": pl.String,
    "seed": pl.Int64,
    "start_prompt": pl.String,
    "start_seed": pl.Int64,
    "start_similarity": pl.Float64,
    "start_skipped": pl.Int32,
    "latent_bytes": pl.Int64,  # of the latent(s) on the wire
    "codec_error": pl.Float64,  # relative L2 error of the latent after the wire, first handoff; null without one
    "image": pl.String,  # hash of its pixels; images/ab/HASH.png
    "deviation_mean": pl.Float64,  # latent-intensity deviation over the small leg; null where it was not watched
    "deviation_max": pl.Float64,
    "intensity_prefix": pl.List(pl.Float32),  # mean |latent| after each step of the first leg, up to the handoff
    "intensity": pl.List(pl.Float32),  # after each step of the small leg
    "intensity_reference": pl.List(pl.Float32),  # the same steps walked by the first leg's member
    "commit": pl.String,
    "versions": pl.String,
    "machine": pl.String,
    "dtype": pl.String,  # of the members; null in rows written before it was told
}

TIME_SCHEMA: dict[str, Any] = {
    "config_hash": pl.String,
    "family": pl.String,
    "method": pl.String,
    "program": pl.String,
    "measure": pl.String,  # always says what kind of time this is
    "link": pl.String,
    "link_kind": pl.String,  # "as given", "scaled", or "none"
    "round": pl.Int32,
    "encode_s": pl.Float64,
    "large_s": pl.Float64,
    "handoff_s": pl.Float64,  # encoding, checking and decoding the message
    "transfer_s": pl.Float64,  # what the link makes of its bytes
    "small_s": pl.Float64,
    "decode_s": pl.Float64,
    "return_s": pl.Float64,  # the image on its way back to the asker, from a large member's node
    "end_to_end_s": pl.Float64,
    "machine": pl.String,
    "dtype": pl.String,
    "threads": pl.Int32,
}

CURVE_SCHEMA: dict[str, Any] = {
    "config_hash": pl.String,
    "family": pl.String,
    "member": pl.String,
    "batch": pl.Int32,
    "measure": pl.String,
    "step_s": pl.Float64,  # one guided step of the whole batch
    "machine": pl.String,
    "dtype": pl.String,
    "threads": pl.Int32,
}

SCHEMAS = {"outcomes": OUTCOME_SCHEMA, "times": TIME_SCHEMA, "curves": CURVE_SCHEMA}
ORDER = {
    "outcomes": ["family", "program", "seed", "prompt_index"],
    "times": ["family", "program", "link", "round"],
    "curves": ["family", "member", "batch"],
}


def unit_path(folder: Path, table: str, unit: str) -> Path:
    return folder / table / f"{unit}.parquet"


def write_unit(folder: Path, table: str, unit: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows of one unit of work; the file appears whole or not at all."""
    schema = dict(SCHEMAS[table])
    if table == "outcomes":
        scores = sorted({key for row in rows for key in row if key.startswith(SCORE)})
        schema |= dict.fromkeys(scores, pl.Float64)
    frame = pl.DataFrame([{key: row.get(key) for key in schema} for row in rows], schema=schema)
    path = unit_path(folder, table, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()  # a full disk is then an OSError with its reason, whatever the writer makes of it
    frame.write_parquet(buffer)
    write_atomically(path, buffer.getbuffer())


def read_table(folders: Path | Iterable[Path], table: str) -> pl.DataFrame:
    """All rows of a table in canonical order; an empty frame with the schema where there are none."""
    several = [folders] if isinstance(folders, Path) else list(folders)
    frames = [pl.read_parquet(path) for folder in several for path in sorted((folder / table).glob("*.parquet"))]
    if not frames:
        return pl.DataFrame(schema=SCHEMAS[table])
    return pl.concat(frames, how="diagonal").sort(ORDER[table], maintain_order=True)


def pixels_hash(pixels: bytes, shape: tuple[int, ...]) -> str:
    """The name an image is stored under: 20 hex digits over its shape and its 8-bit pixels, not over a file's bytes."""
    return hashlib.blake2b(repr(shape).encode() + pixels, digest_size=10).hexdigest()


def image_path(folder: Path, digest: str) -> Path:
    return folder / "images" / digest[:2] / f"{digest}.png"
