"""The cache on disk: latents as files, what is known of them in SQLite, found by similarity through an index in memory.

    cache.db              one row a latent: space, owner, source (the job it comes from), vector, steps skipped, bytes, uses
    latents/ab/ID         magic, length, checksum, payload: whole or not at all
    index/HASH            an index as it was when the cache was closed (`nodes.cache.snapshot`)

A kill loses nothing that was stored: what an index lacks enters it from the rows at the start, files that no row names are
removed, and a file that is gone, short or altered is forgotten when it is met, never served. A database that is damaged or
of another version is set aside with its files, and an empty cache begun. Bytes are bounded; what goes first is told by
`eviction`: LCBFU drops the lowest uses x share of T that it spares (NIRVANA; Argus, arXiv 2511.06724), LRU the longest unused.

The index holds vectors in 8 bits, which is enough to find who is near; how near they are is told by the rows' own.

Owners: latents of one are never found by another. With `shared` there is one owner. No prompt's text is kept, only its vector.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import sqlite3
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nodes.cache.snapshot import TABLE, Snapshots
from relay.errors import BadRequest
from relay.files import write_atomically
from relay.program import check_choice
from scheduler.load.similarity import Rule, skip_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

log = logging.getLogger("relay.cache")
Scope = Literal["off", "tenant", "shared"]
EVICTIONS = ("lcbfu", "lru")
NEAREST = 40  # latents that are looked at: a walk leaves several, and the nearest may spare fewer steps than the next
EXPANSION = 64  # candidates an entry is linked among: half of usearch's own, and of what building the index anew takes
_LOADED = 4096  # vectors that enter the index at once
_SAVED = 10_000  # latents that entered an index at a start: it is kept at once, so that a kill does not cost that again
_APPLICATION, _FORMAT = 0x524C4348, 3  # "RLCH"
_MAGIC, _HEAD = b"RLATENT1", struct.Struct("<Q16s")
_TABLES = """
CREATE TABLE IF NOT EXISTS latents (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, space TEXT NOT NULL, owner TEXT NOT NULL, source TEXT NOT NULL,
    vector BLOB NOT NULL, skipped INTEGER NOT NULL, total INTEGER NOT NULL, bytes INTEGER NOT NULL,
    uses INTEGER NOT NULL DEFAULT 0, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS latents_of ON latents (space, owner);
"""


@dataclass(frozen=True)
class Hit:
    """A latent to start from. `skipped` of `total` steps are done; `source` is whose walk it was."""

    source: str
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
        self._snapshots = Snapshots(folder, self._db)
        self._indexes: dict[tuple[str, str], Any] = {}
        self._changed: set[tuple[str, str]] = set()  # indexes that are not as their snapshot
        self.bytes = self._count = 0
        self._load()

    def __len__(self) -> int:
        return self._count

    # --- in ---

    def store(
        self, space: str, tenant: str, prompt: str, seed: int, source: str, vector: NDArray[Any], skipped: int, total: int,
        payload: bytes,
    ) -> bool:  # fmt: skip
        """Keep a latent after `skipped` of `total` steps. False where it is there already, or does not fit at all.

        `prompt` and `seed` only tell whether it is there: what is written names `source`.
        """
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
                    "INSERT INTO latents (id, space, owner, source, vector, skipped, total, bytes, used)"
                    " VALUES (?,?,?,?,?,?,?,?,?)",
                    (id_, space, owner, source, unit.tobytes(), skipped, total, len(payload), time.time()),
                ).lastrowid
        except (OSError, sqlite3.Error) as error:  # a full disk: the request it came from has long been answered
            log.warning("a latent is not kept: %s", error)
            path.unlink(missing_ok=True)
            return False
        self.bytes += len(payload)
        self._count += 1
        self._snapshots.given((space, owner), int(number or 0))
        self._index(space, owner, len(unit)).add(int(number or 0), unit, threads=1)
        self._changed.add((space, owner))
        return True

    def _make_room(self, size: int) -> None:
        # what a use spared, as often as it was used; or how long ago that was
        order = "(uses + 1) * CAST(skipped AS REAL) / total, used" if self.eviction == "lcbfu" else "used"
        if self.bytes + size <= self.bound:
            return
        room = self.bound - max(size, self.bound // 64)  # to rank all of them costs too much to be done for each latent
        for (number,) in self._db.execute(f"SELECT number FROM latents ORDER BY {order}").fetchall():
            if self.bytes <= room:
                return
            self._forget(number)
            self.evicted += 1

    # --- out ---

    def find(
        self, space: str, tenant: str, vector: NDArray[Any], below: int | None = None, nth: int = 0,
        rule: Rule | None = None,
    ) -> Hit | None:  # fmt: skip
        """The latent that spares most steps among those that the prompts' similarity allows; the nearer of equals.

        `below`: fewer steps than so many. `nth`: of each source its best, the n-th of
        these, so that pictures of one request do not all become one. `rule`: in place of the cache's own.
        """
        owner = self._owner(tenant)
        index = self._indexes.get((space, owner))
        if self.scope == "off" or index is None or not len(index):
            return None
        unit, rule = _unit(vector), rule or self.rule
        found = index.search(unit, min(NEAREST, len(index)), threads=1)
        choices = []
        for number in found.keys:
            row = self._db.execute(
                "SELECT skipped, total, source, vector FROM latents WHERE number = ?", (int(number),)
            ).fetchone()  # fmt: skip
            if row is None or (below is not None and row[0] >= below):
                continue
            similarity = min(1.0, float(unit @ np.frombuffer(row[3], np.float32)))
            if row[0] <= skip_of(rule.allowed(similarity), row[1]):
                choices.append((row[0] / row[1], similarity, int(number), row[2]))
        seen: set[str] = set()
        for _, similarity, number, source in sorted(choices, reverse=True):
            if source in seen:
                continue
            if len(seen) < nth:
                seen.add(source)
            elif (hit := self._read(number, similarity)) is not None:
                self.hits += 1
                return hit
        self.misses += 1
        return None

    def _read(self, number: int, similarity: float) -> Hit | None:
        """None where its file is not what was written; then it is forgotten."""
        id_, source, skipped, total = self._db.execute(
            "SELECT id, source, skipped, total FROM latents WHERE number = ?", (number,)
        ).fetchone()
        payload = _payload(self._path(id_))
        if payload is None:
            log.warning("a cached latent is damaged and forgotten")
            self.damaged += 1
            self._forget(number)
            return None
        with contextlib.suppress(sqlite3.Error), self._db:  # a full disk costs a count, not the hit
            self._db.execute("UPDATE latents SET uses = uses + 1, used = ? WHERE number = ?", (time.time(), number))
        return Hit(source, similarity, skipped, total, payload)

    def status(self) -> dict[str, Any]:
        return {
            "scope": self.scope, "latents": len(self), "bytes": self.bytes, "bound": self.bound, "hits": self.hits,
            "misses": self.misses, "evicted": self.evicted, "damaged": self.damaged,
        }  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # closed before, or a disk that is gone
            self._keep_indexes()
        self._db.close()

    # --- within ---

    def _owner(self, tenant: str) -> str:
        return "" if self.scope == "shared" else tenant

    def _path(self, id_: str) -> Path:
        return self.folder / "latents" / id_[:2] / id_

    def _index(self, space: str, owner: str, width: int) -> Any:
        key = space, owner
        if key not in self._indexes:
            self._indexes[key] = _empty(width)
        return self._indexes[key]

    def _load(self) -> None:
        """The indexes of what is there; files that no row names are what a kill left behind."""
        self._drop_others()
        sizes = self._db.execute("SELECT count(*), coalesce(sum(bytes), 0) FROM latents").fetchone()
        self._count, self.bytes = sizes
        keys = self._db.execute("SELECT space, owner, max(length(vector)) / 4 FROM latents GROUP BY space, owner")
        entered = 0
        for space, owner, width in keys.fetchall():
            entered += self._enter((space, owner), width)
        if entered >= _SAVED:
            self._keep_indexes()
        for path in (self.folder / "latents").glob("*"):
            known = {
                id_
                for (id_,) in self._db.execute(
                    "SELECT id FROM latents WHERE id >= ? AND id < ?", (path.name, path.name + "g")
                )
            }  # of a folder at a time: all of them would be some hundred MB
            for file in path.glob("*"):
                if file.name not in known:
                    file.unlink(missing_ok=True)

    def _enter(self, key: tuple[str, str], width: int) -> int:
        """An index from its snapshot and the rows; how many had to enter."""
        index, upto = self._snapshots.read(key, lambda: _empty(width))
        self._indexes[key] = index
        if upto:
            rows = self._db.execute(
                "SELECT number FROM latents WHERE space = ? AND owner = ? AND number <= ?", (*key, upto)
            )
            there = np.fromiter((number for (number,) in rows), np.uint64)
            gone = np.setdiff1d(np.asarray(index.keys), there)
            for number in gone:
                index.remove(int(number))
            if len(gone):
                self._changed.add(key)
        newer = self._db.execute(
            "SELECT number, vector FROM latents WHERE space = ? AND owner = ? AND number > ?", (*key, upto)
        )
        entered = 0
        while chunk := newer.fetchmany(_LOADED):
            numbers, vectors = zip(*chunk, strict=True)
            units = np.frombuffer(b"".join(vectors), np.float32).reshape(len(numbers), width)
            index.add(np.array(numbers, np.uint64), units, threads=1)  # the cores are the compute thread's
            entered += len(numbers)
        if entered:
            self._changed.add(key)
        return entered

    def _keep_indexes(self) -> None:
        last = self._db.execute("SELECT coalesce(max(number), 0) FROM latents").fetchone()[0]
        for key in self._changed:
            self._snapshots.write(key, self._indexes[key], last)
        self._changed.clear()

    def _drop_others(self) -> None:
        """The other scope's latents are not this one's to show."""
        owned = "owner = ''" if self.scope == "shared" else "owner != ''"
        others = self._db.execute(f"SELECT DISTINCT space, owner FROM latents WHERE NOT {owned}").fetchall()
        for key in others:
            self._snapshots.drop(key)
        with self._db:  # their files are named by no row any more
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
        self._changed.add((space, owner))
        self.bytes -= size
        self._count -= 1


def _empty(width: int) -> Any:
    from usearch.index import Index

    return Index(ndim=width, metric="cos", dtype="i8", expansion_add=EXPANSION)


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
        db.executescript(_TABLES + TABLE)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {_FORMAT}")
    except sqlite3.Error:
        db.close()
        raise
    return db
