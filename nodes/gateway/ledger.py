"""The ledger: every accepted request and how it ended, in SQLite, before anyone is told.

One thread writes. Whatever waits for it goes into one transaction (WAL), so accepting many requests costs one sync to disk
and the event loop never waits for a disk. A request is acknowledged only after its commit is on the disk; an end is
answered only after its commit, which a killed process leaves behind, and on the disk a second later (settling.py). A full
disk fails the commit: what was not accepted is refused, an end is kept and tried again by the caller.

Times are wall-clock seconds for people; deadlines live in the process by its monotonic clock. That clock goes on from one
process to the next until the machine is booted again, so a request remembers it, and the boot that it was read in: after a
restart what is left of a deadline does not depend on a wall clock that may have been set meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from relay.errors import RelayError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE IF NOT EXISTS requests (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, idempotency_key TEXT, body TEXT NOT NULL, accepted_at REAL NOT NULL,
    machine_boot TEXT, monotonic_s REAL, UNIQUE (tenant, idempotency_key)
);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, request TEXT NOT NULL REFERENCES requests(id), number INTEGER NOT NULL, tenant TEXT NOT NULL,
    seed INTEGER NOT NULL, stage TEXT NOT NULL, attempt INTEGER NOT NULL DEFAULT 0, program TEXT, nodes TEXT, error TEXT,
    report TEXT, image TEXT, ended_at REAL, digest TEXT
);
CREATE INDEX IF NOT EXISTS open_jobs ON jobs(stage) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS ended_jobs ON jobs(ended_at);
CREATE INDEX IF NOT EXISTS jobs_of_tenant ON jobs(tenant);
CREATE TABLE IF NOT EXISTS events (job TEXT NOT NULL, at REAL NOT NULL, node TEXT NOT NULL, what TEXT NOT NULL, data TEXT);
CREATE INDEX IF NOT EXISTS events_of ON events(job);
"""
_LATER = {"requests": ("machine_boot TEXT", "monotonic_s REAL"), "jobs": ("digest TEXT",)}
_UNSETTLED = "CREATE INDEX IF NOT EXISTS unsettled_jobs ON jobs(id) WHERE digest IS NOT NULL"


_Order = tuple[
    Callable[[sqlite3.Connection], Any], bool, Future[Any]
]  # what to do, whether the disk is waited for, whom to tell


class LedgerUnwritable(RelayError):
    """The disk did not take a commit; nothing of it happened."""


class OpenJob(NamedTuple):
    """A job that had not ended when the process did."""

    id: str
    request: str
    number: int
    tenant: str
    seed: int
    attempt: int
    nodes: list[str]  # of that attempt
    body: dict[str, Any]
    waited_s: float  # since it was accepted


class Ledger:
    """All methods that return an awaitable are done, on disk, when it is."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._local = threading.local()
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        try:
            with self._connect() as db:
                db.executescript(_SCHEMA)
                for table, columns in _LATER.items():  # a ledger that was begun before they were there
                    known = {row[1] for row in db.execute(f"PRAGMA table_info({table})")}
                    for column in columns:
                        if column.split()[0] not in known:
                            db.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
                db.execute(_UNSETTLED)
                row = db.execute("SELECT value FROM meta WHERE key = 'boots'").fetchone()
                self.boot = int(row[0]) + 1 if row else 1
                db.execute("INSERT OR REPLACE INTO meta VALUES ('boots', ?)", (str(self.boot),))
                db.commit()
        except sqlite3.Error as error:
            raise LedgerUnwritable(f"{path}: {error}") from None
        self._thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self._thread.start()

    # --- what the gateway says ---

    def accept(
        self, request: str, tenant: str, key: str | None, body: dict[str, Any], jobs: list[tuple[str, int]]
    ) -> asyncio.Future[tuple[str, list[str]]]:
        """Record a request and its jobs (id, seed). With an idempotency key that is known, the earlier request and its
        jobs are returned and nothing is recorded: the caller compares ids."""

        def order(db: sqlite3.Connection) -> tuple[str, list[str]]:
            if key is not None and (earlier := _of_key(db, tenant, key)) is not None:
                return earlier
            db.execute(
                "INSERT INTO requests (id, tenant, idempotency_key, body, accepted_at, machine_boot, monotonic_s)"
                " VALUES (?,?,?,?,?,?,?)",
                (request, tenant, key, json.dumps(body), time.time(), _machine_boot(), time.monotonic()),
            )
            db.executemany(
                "INSERT INTO jobs (id, request, number, tenant, seed, stage) VALUES (?,?,?,?,?,'accepted')",
                [(job, request, i, tenant, seed) for i, (job, seed) in enumerate(jobs)],
            )
            return request, [job for job, _ in jobs]

        return self._ask(order, sync=True)

    def placed(self, job: str, attempt: int, program: str, nodes: list[str]) -> asyncio.Future[None]:
        """Where a job was placed last. A restarted gateway takes a result of that attempt from those nodes."""
        values = (attempt, program, json.dumps(nodes), job)

        def order(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE jobs SET stage = 'placed', attempt = ?, program = ?, nodes = ? WHERE id = ? AND ended_at IS NULL",
                values,
            )

        return self._ask(order)

    def end(
        self,
        job: str,
        stage: str,
        *,
        error: str | None = None,
        report: dict[str, Any] | None = None,
        image: str | None = None,
        digest: str | None = None,
    ) -> asyncio.Future[bool]:
        """True where this is what ended it; False where it had ended before, which changes nothing. `digest`: of an image
        that may not be on the disk yet, until `settled`."""

        def order(db: sqlite3.Connection) -> bool:
            changed = db.execute(
                "UPDATE jobs SET stage = ?, error = ?, report = ?, image = ?, digest = ?, ended_at = ?"
                " WHERE id = ? AND ended_at IS NULL",
                (stage, error, json.dumps(report) if report else None, image, digest, time.time(), job),
            )
            return changed.rowcount == 1

        return self._ask(order)

    def settled(self, jobs: list[str]) -> asyncio.Future[None]:
        """The images of these are on the disk, and so is every end before this one when it is done."""
        rows = [(job,) for job in jobs]
        change = "UPDATE jobs SET digest = NULL WHERE id = ?"
        return self._ask(lambda db: db.executemany(change, rows) and None, sync=True)

    def reopen(self, job: str) -> asyncio.Future[None]:
        """Its image is lost: it has not ended."""
        change = (
            "UPDATE jobs SET stage = 'accepted', error = NULL, report = NULL, image = NULL, digest = NULL, ended_at = NULL"
            " WHERE id = ?"
        )
        return self._ask(lambda db: db.execute(change, (job,)) and None, sync=True)

    def amend(self, job: str, **parts: Any) -> asyncio.Future[dict[str, Any] | None]:
        """Put parts into the report of a job that has ended. The report as it was, None where there is no such job."""

        def order(db: sqlite3.Connection) -> dict[str, Any] | None:
            row = db.execute("SELECT report FROM jobs WHERE id = ? AND ended_at NOT NULL", (job,)).fetchone()
            if row is None:
                return None
            before: dict[str, Any] = json.loads(row[0] or "{}")
            db.execute("UPDATE jobs SET report = ? WHERE id = ?", (json.dumps(before | parts), job))
            return before

        return self._ask(order)

    def note(self, events: list[tuple[str, float, str, str, dict[str, Any]]]) -> asyncio.Future[None]:
        """Rows of the timeline: job, wall-clock time, node, what, data."""
        rows = [(job, at, node, what, json.dumps(data)) for job, at, node, what, data in events]
        return self._ask(lambda db: db.executemany("INSERT INTO events VALUES (?,?,?,?,?)", rows) and None)

    def forget(self, before: float) -> asyncio.Future[list[str]]:
        """Drop requests whose jobs all ended before that time; the image files that nobody names any more."""

        def order(db: sqlite3.Connection) -> list[str]:
            old = "SELECT request FROM jobs GROUP BY request HAVING SUM(ended_at IS NULL) = 0 AND MAX(ended_at) < ?"
            images = db.execute(f"SELECT image FROM jobs WHERE image NOT NULL AND request IN ({old})", (before,))
            found = [row[0] for row in images.fetchall()]
            db.execute(f"DELETE FROM events WHERE job IN (SELECT id FROM jobs WHERE request IN ({old}))", (before,))
            requests = db.execute(old, (before,)).fetchall()
            db.executemany("DELETE FROM jobs WHERE request = ?", requests)
            db.executemany("DELETE FROM requests WHERE id = ?", requests)
            return found

        return self._ask(order)

    # --- what it remembers ---

    def open_jobs(self) -> list[OpenJob]:
        """Jobs that have not ended, oldest first."""
        with self._reader() as db:
            rows = db.execute(
                "SELECT j.id, j.request, j.number, j.tenant, j.seed, j.attempt, j.nodes, r.body, r.accepted_at,"
                " r.machine_boot, r.monotonic_s FROM jobs j JOIN requests r ON r.id = j.request"
                " WHERE j.ended_at IS NULL ORDER BY r.rowid, j.number"
            ).fetchall()
        return [
            OpenJob(
                id=row[0], request=row[1], number=row[2], tenant=row[3], seed=row[4], attempt=row[5],
                nodes=json.loads(row[6] or "[]"), body=json.loads(row[7]), waited_s=_waited_s(*row[8:]),
            )
            for row in rows
        ]  # fmt: skip

    def of_key(self, tenant: str, key: str) -> tuple[str, list[str]] | None:
        """The request that an idempotency key began, and its jobs; None where there is none on disk."""
        with self._reader() as db:
            return _of_key(db, tenant, key)

    def job(self, job: str) -> dict[str, Any] | None:
        with self._reader() as db:
            cursor = db.cursor()
            cursor.row_factory = sqlite3.Row
            row = cursor.execute(
                "SELECT j.*, r.accepted_at, r.body FROM jobs j JOIN requests r ON r.id = j.request WHERE j.id = ?",
                (job,),
            ).fetchone()
        return dict(row) if row else None

    def list_jobs(self, tenant: str, limit: int, after: str | None = None) -> list[dict[str, Any]]:
        """A tenant's jobs as `job` tells them, newest first; `after`: those that come after this one in that order."""
        older = "AND j.rowid < (SELECT rowid FROM jobs WHERE id = ? AND tenant = ?)" if after is not None else ""
        with self._reader() as db:
            cursor = db.cursor()
            cursor.row_factory = sqlite3.Row
            rows = cursor.execute(
                "SELECT j.*, r.accepted_at, r.body FROM jobs j JOIN requests r ON r.id = j.request"
                f" WHERE j.tenant = ? {older} ORDER BY j.rowid DESC LIMIT ?",
                (tenant, *((after, tenant) if after is not None else ()), limit),
            ).fetchall()
        return [dict(row) for row in rows]

    def ended_images(self) -> list[tuple[float, str]]:
        """When each job with an image ended, and the file, newest first."""
        with self._reader() as db:
            return db.execute(
                "SELECT ended_at, image FROM jobs WHERE image NOT NULL AND ended_at NOT NULL ORDER BY ended_at DESC"
            ).fetchall()

    def unsettled(self) -> list[tuple[str, str, str]]:
        """Job, image and digest of those of which nobody said that the image is on the disk."""
        with self._reader() as db:
            return db.execute("SELECT id, image, digest FROM jobs WHERE digest IS NOT NULL").fetchall()

    def events_of(self, job: str) -> list[dict[str, Any]]:
        with self._reader() as db:
            rows = db.execute(
                "SELECT at, node, what, data FROM events WHERE job = ? ORDER BY at, rowid", (job,)
            ).fetchall()
        return [{"at": at, "node": node, "what": what, **json.loads(data or "{}")} for at, node, what, data in rows]

    def close(self) -> None:
        """What was ordered is written first."""
        self._orders.put(None)
        self._thread.join(timeout=10)

    # --- the thread ---

    def _reader(self) -> sqlite3.Connection:
        """A connection of this thread's own, kept: opening one costs more than most questions."""
        if (db := getattr(self._local, "db", None)) is None:
            db = self._local.db = self._connect()
        return db

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=10, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        return db

    def _ask(self, order: Callable[[sqlite3.Connection], Any], *, sync: bool = False) -> asyncio.Future[Any]:
        """`sync`: its commit waits for the disk, and with it for all before."""
        future: Future[Any] = Future()
        self._orders.put((order, sync, future))
        return asyncio.wrap_future(future)

    def _write(self) -> None:
        db = self._connect()
        while True:
            taken = [self._orders.get()]
            while not self._orders.empty() and len(taken) < 256:
                taken.append(self._orders.get())
            self._together(db, [order for order in taken if order is not None])
            if None in taken:
                db.close()
                return

    def _together(self, db: sqlite3.Connection, orders: list[_Order]) -> None:
        """One transaction for all; where it fails, each alone, so that one bad order spoils no other."""
        if not orders:
            return
        try:
            db.execute(f"PRAGMA synchronous = {'FULL' if any(sync for _, sync, _ in orders) else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            found = [order(db) for order, _, _ in orders]
            db.execute("COMMIT")
        except sqlite3.Error as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if len(orders) > 1:
                for each in orders:
                    self._together(db, [each])
                return
            found = []
            _settle(orders[0][2], error=LedgerUnwritable(f"the ledger {self.path.name} cannot be written: {error}"))
        for (_, _, future), value in zip(orders, found, strict=False):
            _settle(future, value)


def _waited_s(accepted_at: float, boot: str | None, monotonic_s: float | None) -> float:
    """By the monotonic clock where the machine was not booted since, else by the wall clock."""
    if boot and monotonic_s is not None and boot == _machine_boot():
        return time.monotonic() - monotonic_s
    return max(0.0, time.time() - accepted_at)


@cache
def _machine_boot() -> str:
    """Which boot of the machine this is, as far as it says."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _settle(future: Future[Any], value: Any = None, error: Exception | None = None) -> None:
    if future.set_running_or_notify_cancel():
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)


def _of_key(db: sqlite3.Connection, tenant: str, key: str) -> tuple[str, list[str]] | None:
    found = db.execute("SELECT id FROM requests WHERE tenant = ? AND idempotency_key = ?", (tenant, key)).fetchone()
    if not found:
        return None
    rows = db.execute("SELECT id FROM jobs WHERE request = ? ORDER BY number", found).fetchall()
    return found[0], [row[0] for row in rows]
