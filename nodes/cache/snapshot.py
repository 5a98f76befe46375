"""An index of the cache on disk, so that a start need not build it anew: what a million latents take minutes for.

    index/HASH      the index of one space and owner, as usearch writes it
    snapshots       in the cache's database: the file's checksum, and the last latent that is in it

What came after it enters at the next start, what went is taken out of it. One that is damaged, or cannot be trusted any more
because a number was given anew, is dropped with one line, and the index built from the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("relay.cache")
LEAST = 1000  # latents, below which an index is built as fast as it is read
TABLE = """
CREATE TABLE IF NOT EXISTS snapshots (
    space TEXT NOT NULL, owner TEXT NOT NULL, upto INTEGER NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (space, owner)
);
"""
Key = tuple[str, str]  # space, owner


class Snapshots:
    """`folder`: the cache's."""

    def __init__(self, folder: Path, db: sqlite3.Connection):
        self.folder, self._db = folder / "index", db
        rows = db.execute("SELECT space, owner, upto FROM snapshots").fetchall()
        self._upto: dict[Key, int] = {(space, owner): upto for space, owner, upto in rows}

    def read(self, key: Key, make: Callable[[], Any]) -> tuple[Any, int]:
        """An index that `make` began empty, filled from disk, and the last number in it; 0 where there is none."""
        if key not in self._upto:
            return make(), 0
        path = self._path(key)
        (said,) = self._db.execute("SELECT checksum FROM snapshots WHERE space = ? AND owner = ?", key).fetchone()
        try:
            if _checksum(path) != said:
                raise ValueError("it is not what was written")
            index = make()
            index.load(str(path))
            return index, self._upto[key]
        except Exception as error:  # whatever a file that cannot be read raises: usearch knows no class of its own
            log.error("an index of the cache in %s cannot be used (%s): it is built anew", self.folder.parent, error)
            self.drop(key)
            return make(), 0

    def write(self, key: Key, index: Any, upto: int) -> None:
        """A full disk costs the next start some time, and no more."""
        if len(index) < LEAST:
            return
        path = self._path(key)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            index.save(str(partial))
            checksum = _checksum(partial)
            partial.replace(path)  # a kill between this and the row: another checksum, and it is built anew
            with self._db:
                self._db.execute("REPLACE INTO snapshots VALUES (?,?,?,?)", (*key, upto, checksum))
            self._upto[key] = upto
        except Exception as error:
            log.warning("an index of the cache is not kept: %s", error)
            partial.unlink(missing_ok=True)

    def given(self, key: Key, number: int) -> None:
        """A latent was given this number: a snapshot that may hold another of the same is of no use."""
        if number <= self._upto.get(key, 0):
            self.drop(key)

    def drop(self, key: Key) -> None:
        if self._upto.pop(key, None) is not None:
            with contextlib.suppress(sqlite3.Error), self._db:
                self._db.execute("DELETE FROM snapshots WHERE space = ? AND owner = ?", key)
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: Key) -> Path:
        return self.folder / hashlib.blake2b("\0".join(key).encode(), digest_size=16).hexdigest()


def _checksum(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
