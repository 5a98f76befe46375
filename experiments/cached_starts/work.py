"""What a run of cached starts consists of: its programs, its units of work, and the rows of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from experiments.cached_starts.draw import SHARES, draw, rows_of
from experiments.cached_starts.pairs import BINS, Pair, make_pairs
from experiments.grid import weights_digest
from experiments.prepare import dtype_of
from experiments.provenance import machine, provenance
from relay.errors import BadRequest
from relay.pipeline import RelayPipeline
from relay.program import Program

STEPS, LONG = 28, 50
RELAYS: tuple[dict[str, Any], ...] = (
    {"handoff": 14},
    {"handoff": 10, "small_steps": 6},
)  # of T = 28: the even one, and the fast one of rise.yaml


@dataclass(frozen=True)
class Unit:
    """Some pairs of a family and split, drawn with all programs of one T."""

    name: str
    family: str
    split: str
    steps: int
    first: int
    last: int


@dataclass
class Prepared:
    pipes: dict[str, RelayPipeline]
    pairs: int
    long: int
    batch: int
    facts: dict[str, Any] = field(default_factory=dict)

    @cache  # noqa: B019 - as long as the run
    def pairs_of(self, family: str, split: str) -> list[Pair]:
        return make_pairs(self.pipes[family].family, split, self.pairs)

    def programs(self, family: str, steps: int) -> list[Program]:
        """All begin with the large member's same walk."""
        pipe = self.pipes[family]
        full = pipe.plan(num_inference_steps=steps, mode="full-cloud")
        relays = RELAYS if steps == STEPS else ()
        return [full, *(pipe.plan(num_inference_steps=steps, matching="exact", **words) for words in relays)]

    def __hash__(self) -> int:
        return id(self)


def prepare(
    families: Sequence[str], pairs: int, long: int, batch: int, dtype: str | None = None, device: str | None = None
) -> Prepared:
    """BadRequest where a family draws no scenes: what a picture must show is then not known."""
    pipes = {f: RelayPipeline.from_pretrained(f, torch_dtype=dtype, device=device) for f in families}
    for pipe in pipes.values():
        if not pipe.family.spec.scenes:
            raise BadRequest(f"{pipe.family.name} draws no scenes: pairs and their judge are of the scene language")
    prepared = Prepared(pipes, pairs, min(long, pairs), batch)
    config = {
        "name": "cached-starts", "families": list(families), "pairs": pairs, "long": prepared.long, "batch": batch,
        "shares": SHARES, "bins": BINS,
    }  # fmt: skip
    digests = {f: weights_digest(pipe.family) for f, pipe in pipes.items()}
    text = msgspec.json.encode([config, digests], order="sorted")
    prepared.facts = {
        "config": msgspec.to_builtins(config), "config_hash": hashlib.blake2b(text, digest_size=6).hexdigest(),
        "weights": digests, "provenance": provenance(),
        "programs": {f: [str(p) for t in (STEPS, LONG) for p in prepared.programs(f, t)] for f in families},
        "dtypes": {f: dtype_of(pipe.family) for f, pipe in pipes.items()},
    }  # fmt: skip
    return prepared


def units(prepared: Prepared, splits: Sequence[str]) -> list[Unit]:
    """Chunk by chunk, every family and split in turn: a run that is stopped holds something of all."""
    found = []
    for steps, count in ((STEPS, prepared.pairs), (LONG, prepared.long)):
        for first in range(0, count, prepared.batch):
            last = min(first + prepared.batch, count)
            for family in prepared.pipes:
                for split in splits:
                    name = f"{Path(family).stem}-{split}-t{steps}-p{first:05d}"
                    found.append(Unit(name, family, split, steps, first, last))
    return found


def work(prepared: Prepared, unit: Unit) -> list[dict[str, Any]]:
    """Draw and judge one unit; its rows."""
    family = prepared.pipes[unit.family].family
    pairs = prepared.pairs_of(unit.family, unit.split)[unit.first : unit.last]
    programs = prepared.programs(unit.family, unit.steps)
    told = prepared.facts["provenance"]
    facts = {
        "config_hash": prepared.facts["config_hash"], "family": family.name, "workload": "cached-pairs",
        "dtype": prepared.facts["dtypes"][unit.family], "commit": told["commit"], "machine": machine(told),
        "versions": " ".join(f"{name} {version}" for name, version in told["versions"].items()),
    }  # fmt: skip
    return rows_of(pairs, programs, draw(family, pairs, programs), facts)
