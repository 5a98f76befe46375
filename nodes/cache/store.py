"""The cache on disk: latents as files, what is known of them in SQLite, found by similarity through an index in memory.

    cache.db              one row a latent: space, owner, prompt, vector, steps skipped, bytes, uses
    latents/ab/ID         magic, length, checksum, payload: whole or not at all

A kill loses nothing that was stored: the index is built anew from the rows at the start, files that no row names are
removed, and a file that is gone, short or altered is forgotten when it is met, never served. A database that is damaged or
of another version is set aside with its files, and an empty cache begun. Bytes are bounded; what goes first is told by
`eviction`: LCBFU drops the lowest uses x share of T that it spares (NIRVANA; Argus, arXiv 2511.06724), LRU the longest unused.

Owners: latents of one are never found by another. With `shared` there is one owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from relay.errors import BadRequest
from relay.files import write_atomically
from relay.program import check_choice
from scheduler.load.similarity import Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("relay.cache")
Scope = Literal["off", "tenant", "shared"]
EVICTIONS = ("lcbfu", "lru")
NEAREST = 8  # prompts that are looked at: the nearest may have been stored at fewer steps than the next
_APPLICATION, _FORMAT = 0x524C4348, 1  # "RLCH"
_MAGIC, _HEAD = b"RLATENT1", struct.Struct("<Q16s")
_TABLES = """
CREATE TABLE IF NOT EXISTS latents (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, space TEXT NOT NULL, owner TEXT NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, vector BLOB NOT NULL, skipped INTEGER NOT NULL, total INTEGER NOT NULL, bytes INTEGER NOT NULL,
    uses INTEGER NOT NULL DEFAULT 0, used REAL NOT NULL
);
"""


@dataclass(frozen=True)
class Hit:
    """A latent to start from. `skipped` of `total` steps are done."""

    prompt: str
    seed: int
    similarity: float
    skipped: int
    total: int
    payload: bytes


class LatentCache:
    """`bound`: bytes of latents on disk. Used from one thread."""

    def __init__(
        self, folder: Path, bound: int, scope: Scope = "tenant", eviction: str = "lcbfu", rule: Rule | None = None
    ):
        check_choice("cache", scope, ("off", "tenant", "shared"))
        check_choice("cache eviction", eviction, EVICTIONS)
        if bound < 1:
            raise BadRequest(f"a cache of {bound} bytes holds nothing: `cache: off` says so")
        self.folder, self.bound, self.scope, self.eviction = folder, bound, scope, eviction
        self.rule = rule or Rule()
        self.hits = self.misses = self.evicted = self.damaged = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._db = _opened(folder)
        self._indexes: dict[tuple[str, str], Any] = {}
        self.bytes = 0
        self._load()

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM latents").fetchone()[0])

    # --- in ---

    def store(
        self, space: str, tenant: str, prompt: str, seed: int, vector: NDArray[Any], skipped: int, total: int,
        payload: bytes,
    ) -> bool:  # fmt: skip
        """Keep a latent after `skipped` of `total` steps. False where it is there already, or does not fit at all."""
        owner = self._owner(tenant)
        if self.scope == "off" or len(payload) > self.bound or not 0 < skipped < total:
            return False
        id_ = hashlib.blake2b(f"{space}\0{owner}\0{prompt}\0{seed}\0{skipped}".encode(), digest_size=16).hexdigest()
        if self._db.execute("SELECT 1 FROM latents WHERE id = ?", (id_,)).fetchone():
            return False
        unit = _unit(vector)
        self._make_room(len(payload))
        path = self._path(id_)
        path.parent.mkdir(parents=True, exist_ok=True)
        checksum = hashlib.blake2b(payload, digest_size=16).digest()
        try:
            write_atomically(path, _MAGIC + _HEAD.pack(len(payload), checksum) + payload)
            with self._db:
                number = self._db.execute(
                    "INSERT INTO latents (id, space, owner, prompt, seed, vector, skipped, total, bytes, used)"
                    " VALUES (?,?,?,?,?,?,?,?,?,?)",
                    (id_, space, owner, prompt, seed, unit.tobytes(), skipped, total, len(payload), time.time()),
                ).lastrowid
        except (OSError, sqlite3.Error) as error:  # a full disk: the request it came from has long been answered
            log.warning("a latent is not kept: %s", error)
            path.unlink(missing_ok=True)
            return False
        self.bytes += len(payload)
        self._index(space, owner, len(unit)).add(int(number or 0), unit)
        return True

    def _make_room(self, size: int) -> None:
        # what a use spared, as often as it was used; or how long ago that was
        order = "(uses + 1) * CAST(skipped AS REAL) / total, used" if self.eviction == "lcbfu" else "used"
        while self.bytes + size > self.bound:
            rows = self._db.execute(f"SELECT number FROM latents ORDER BY {order} LIMIT 16").fetchall()
            if not rows:
                return
            for (number,) in rows:
                if self.bytes + size <= self.bound:
                    return
                self._forget(number)
                self.evicted += 1

    # --- out ---

    def find(self, space: str, tenant: str, vector: NDArray[Any]) -> Hit | None:
        """The latent that spares most steps among those that the prompts' similarity allows; the nearer of equals."""
        owner = self._owner(tenant)
        index = self._indexes.get((space, owner))
        if self.scope == "off" or index is None or not len(index):
            return None
        found = index.search(_unit(vector), min(NEAREST, len(index)))
        near = sorted(
            ((1.0 - float(d), int(key)) for key, d in zip(found.keys, found.distances, strict=True)), reverse=True
        )
        choices = []
        for similarity, number in near:
            row = self._db.execute(
                "SELECT skipped, total FROM latents WHERE number = ?", (number,)
            ).fetchone()  # fmt: skip
            if row is not None and row[0] / row[1] <= self.rule.allowed(similarity) + 1e-9:
                choices.append((row[0] / row[1], similarity, number))
        for _, similarity, number in sorted(choices, reverse=True):
            if (hit := self._read(number, similarity)) is not None:
                self.hits += 1
                return hit
        self.misses += 1
        return None

    def _read(self, number: int, similarity: float) -> Hit | None:
        """None where its file is not what was written; then it is forgotten."""
        id_, prompt, seed, skipped, total = self._db.execute(
            "SELECT id, prompt, seed, skipped, total FROM latents WHERE number = ?", (number,)
        ).fetchone()
        payload = _payload(self._path(id_))
        if payload is None:
            log.warning("a cached latent is damaged and forgotten")
            self.damaged += 1
            self._forget(number)
            return None
        with contextlib.suppress(sqlite3.Error), self._db:  # a full disk costs a count, not the hit
            self._db.execute("UPDATE latents SET uses = uses + 1, used = ? WHERE number = ?", (time.time(), number))
        return Hit(prompt, seed, similarity, skipped, total, payload)

    def status(self) -> dict[str, Any]:
        return {
            "scope": self.scope, "latents": len(self), "bytes": self.bytes, "bound": self.bound, "hits": self.hits,
            "misses": self.misses, "evicted": self.evicted, "damaged": self.damaged,
        }  # fmt: skip

    def close(self) -> None:
        self._db.close()

    # --- within ---

    def _owner(self, tenant: str) -> str:
        return "" if self.scope == "shared" else tenant

    def _path(self, id_: str) -> Path:
        return self.folder / "latents" / id_[:2] / id_

    def _index(self, space: str, owner: str, width: int) -> Any:
        from usearch.index import Index

        key = space, owner
        if key not in self._indexes:
            self._indexes[key] = Index(ndim=width, metric="cos", dtype="f32")
        return self._indexes[key]

    def _load(self) -> None:
        """The index of what is there; files that no row names are what a kill left behind."""
        known = set()
        for number, id_, space, owner, vector, size in self._rows():
            unit = np.frombuffer(vector, np.float32)
            self._index(space, owner, len(unit)).add(number, unit)
            self.bytes += size
            known.add(id_)
        for path in (self.folder / "latents").glob("*/*"):
            if path.name not in known:
                path.unlink(missing_ok=True)

    def _rows(self) -> Iterator[tuple[int, str, str, str, bytes, int]]:
        owned = (
            "owner = ''" if self.scope == "shared" else "owner != ''"
        )  # the other scope's are not this one's to show
        yield from self._db.execute(f"SELECT number, id, space, owner, vector, bytes FROM latents WHERE {owned}")
        others = self._db.execute(f"SELECT id FROM latents WHERE NOT {owned}").fetchall()
        for (id_,) in others:
            self._path(id_).unlink(missing_ok=True)
        with self._db:
            self._db.execute(f"DELETE FROM latents WHERE NOT {owned}")

    def _forget(self, number: int) -> None:
        row = self._db.execute("SELECT id, space, owner, bytes FROM latents WHERE number = ?", (number,)).fetchone()
        if row is None:
            return
        id_, space, owner, size = row
        with contextlib.suppress(sqlite3.Error), self._db:
            self._db.execute("DELETE FROM latents WHERE number = ?", (number,))
        self._path(id_).unlink(missing_ok=True)
        self._indexes[space, owner].remove(number)
        self.bytes -= size


def _unit(vector: NDArray[Any]) -> NDArray[np.float32]:
    unit = np.asarray(vector, np.float32).ravel()
    norm = float(np.linalg.norm(unit))
    if not np.isfinite(norm) or norm == 0:
        raise BadRequest("a prompt's embedding is finite and not zero")
    return unit / np.float32(norm)


def _payload(path: Path) -> bytes | None:
    """What a file holds; None where it is gone, short or altered."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + _HEAD.size
    if len(data) < start or not data.startswith(_MAGIC):
        return None
    length, checksum = _HEAD.unpack(data[len(_MAGIC) : start])
    payload = data[start:]
    return payload if len(payload) == length and hashlib.blake2b(payload, digest_size=16).digest() == checksum else None


def _opened(folder: Path) -> sqlite3.Connection:
    """The database of a folder; one that is damaged or of another version is set aside with its latents."""
    path = folder / "cache.db"
    try:
        return _checked(path)
    except sqlite3.Error as error:
        aside = folder.with_name(f"{folder.name}.aside-{time.time_ns()}")
        log.error("the cache in %s cannot be used (%s): it is set aside as %s", folder, error, aside.name)
        shutil.move(folder, aside)
        folder.mkdir(parents=True)
        return _checked(path)


def _checked(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=5.0)
    try:
        new = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        found = tuple(db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        if not new and found != (_APPLICATION, _FORMAT):
            raise sqlite3.DatabaseError("it is of another version")
        if not new and db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
            raise sqlite3.DatabaseError("it is damaged")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_TABLES)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {_FORMAT}")
    except sqlite3.Error:
        db.close()
        raise
    return db
