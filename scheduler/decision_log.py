"""The decision log: every decision with its context, actions and probability before it is acted on, and what came of it.

SQLite, one row a decision. What many decisions share is stored once: lists of actions, and the nodes' step-time curves.
The prompt is kept as features (`scheduler.features.PROMPT`), its text only where that was asked for: a row is enough to
ask any policy what it would have done (`scheduler.replay`).

    log = DecisionLog(path)
    log.write(context, actions, decision, marks=("pinned",), router="r3", bandit=policy.version)
    log.outcome(decision.id, stage="done", seconds=0.61, terms=rewarded.terms, missing=rewarded.missing, reward=rewarded.value)

A write goes to the write-ahead log without waiting for the disk: a killed process loses nothing, a power cut the last
moments. Bounded by rows, the oldest go first. A disk that is full loses rows, which `lost` counts, and never a request.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from relay.errors import BadRequest, RelayError
from relay.program import Program, check_choice
from scheduler.action_table import table_of
from scheduler.features import VERSION, prompt_features
from scheduler.policy import Action, Context, Decision, NodeState

MARKS = ("pinned", "fallback", "forced", "degraded", "resumed")
Prompts = Literal["on", "hash", "off"]

_APPLICATION, _FORMAT = 0x52454C59, 1  # SQLite's application_id ("RELY") and user_version
_TABLES = """
CREATE TABLE IF NOT EXISTS decisions (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, at REAL NOT NULL, job TEXT NOT NULL, policy TEXT NOT NULL,
    program TEXT NOT NULL, nodes TEXT NOT NULL, chosen INTEGER NOT NULL, probability REAL NOT NULL, distribution BLOB,
    actions TEXT NOT NULL, curves TEXT NOT NULL, context TEXT NOT NULL, prompt TEXT, notes TEXT NOT NULL,
    marks TEXT NOT NULL, router TEXT, bandit TEXT, features INTEGER NOT NULL,
    ended REAL, stage TEXT, seconds REAL, error TEXT, terms TEXT, missing TEXT, reward REAL
);
CREATE INDEX IF NOT EXISTS decisions_actions ON decisions (actions);
CREATE INDEX IF NOT EXISTS decisions_curves ON decisions (curves);
CREATE TABLE IF NOT EXISTS shared (digest TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID;
"""
_WRITTEN = (
    "id", "at", "job", "policy", "program", "nodes", "chosen", "probability", "distribution", "actions", "curves", "context",
    "prompt", "notes", "marks", "router", "bandit", "features",
)  # fmt: skip
_INSERT = f"INSERT INTO decisions ({', '.join(_WRITTEN)}) VALUES ({', '.join('?' * len(_WRITTEN))})"
_TIDY_EVERY = 1024  # writes; then what no row uses any more is dropped


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A decision as it was logged. `context` carries the prompt's features, and its text only where that was kept."""

    id: str
    at: float  # seconds since 1970
    policy: str
    context: Context
    actions: Sequence[Action]
    chosen: int
    probability: float
    distribution: tuple[float, ...] | None
    notes: dict[str, Any]
    marks: tuple[str, ...]
    router: str | None
    bandit: str | None
    features: int
    stage: str | None
    seconds: float | None
    error: str | None
    terms: dict[str, Any]
    missing: tuple[str, ...]
    reward: float | None


class DecisionLog:
    """`keep`: most rows. `prompts`: on keeps the text, hash a hash of it. RelayError on a file that is no such log."""

    def __init__(self, path: Path | str, keep: int = 200_000, prompts: Prompts = "off"):
        check_choice("prompts", prompts, ("on", "hash", "off"))
        if keep < 1:
            raise BadRequest(f"a decision log keeps at least one row, not {keep}")
        self.path, self.keep, self.prompts, self.lost = Path(path), keep, prompts, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._db = _open(self.path)
        self._writes = 0

    def write(
        self,
        context: Context,
        actions: Sequence[Action],
        decision: Decision,
        *,
        marks: Sequence[str] = (),
        router: str | None = None,
        bandit: str | None = None,
        probability: float | None = None,
    ) -> bool:
        """Log a decision among `actions`; call it before acting on it. False where the disk did not take it.

        `probability`: of the whole decision, where the policy's own is a part of it (router x bandit). `marks`: of MARKS;
        "forced" is added where the decision's notes say so.
        """
        for mark in marks:
            check_choice("mark", mark, MARKS)
        if decision.notes.get("forced") and "forced" not in marks:
            marks = (*marks, "forced")
        p = decision.probability if probability is None else probability
        if not 0 < p <= 1:
            raise BadRequest(f"a decision is logged with its probability, above 0 and at most 1, not {p}")
        if not decision.id:
            raise BadRequest("a decision is logged under its id, and this one has none")
        action = decision.action
        chosen = next((i for i, each in enumerate(actions) if each is action), None)
        text, curves = table_of(actions).text, _json({name: node.curves for name, node in context.nodes.items()})
        row = (
            decision.id, time.time(), context.job, decision.policy, str(action.program), ",".join(action.nodes),
            list(actions).index(action) if chosen is None else chosen, p,
            array.array("d", decision.distribution).tobytes() if decision.distribution else None,
            _digest(text), _digest(curves), _context_json(context), self._prompt(context.prompt), _json(decision.notes),
            _json(marks), router, bandit, VERSION,
        )  # fmt: skip
        try:
            with self._db:
                for shared in (text, curves):
                    self._db.execute("INSERT OR IGNORE INTO shared VALUES (?, ?)", (_digest(shared), shared))
                number = self._db.execute(_INSERT, row).lastrowid or 0
                self._db.execute("DELETE FROM decisions WHERE number <= ?", (number - self.keep,))
                self._writes += 1
                if self._writes % _TIDY_EVERY == 0:
                    used = "SELECT actions FROM decisions UNION SELECT curves FROM decisions"
                    self._db.execute(f"DELETE FROM shared WHERE digest NOT IN ({used})")
        except sqlite3.Error:
            self.lost += 1
            return False
        return True

    def outcome(
        self,
        decision_id: str,
        *,
        stage: str | None = None,
        seconds: float | None = None,
        error: str | None = None,
        terms: Mapping[str, Any] | None = None,
        missing: Sequence[str] | None = None,
        reward: float | None = None,
    ) -> bool:
        """What came of a decision. What is given is kept beside what was given before: a judge or a user may speak later.

        False where there is no such decision (any more), or where the disk did not take it.
        """
        changes: dict[str, Any] = {"ended": time.time(), "stage": stage, "error": error}
        changes |= {"seconds": _number("seconds", seconds), "reward": _number("reward", reward)}
        if missing is not None:
            changes["missing"] = _json(list(missing))
        if terms:
            for name, value in terms.items():
                _number(name, value)
        try:
            with self._db:
                if terms:
                    found = self._db.execute("SELECT terms FROM decisions WHERE id = ?", (decision_id,)).fetchone()
                    before = msgspec.json.decode(found[0]) if found and found[0] else {}
                    changes["terms"] = _json(before | dict(terms))
                told = {name: value for name, value in changes.items() if value is not None}
                names = ", ".join(f"{name} = ?" for name in told)
                done = self._db.execute(f"UPDATE decisions SET {names} WHERE id = ?", (*told.values(), decision_id))
                return done.rowcount == 1
        except sqlite3.Error:
            self.lost += 1
            return False

    def entries(self) -> Iterator[Entry]:
        """Decisions in the order they were made."""
        return _entries(self._db)

    def __len__(self) -> int:
        return int(self._db.execute("SELECT count(*) FROM decisions").fetchone()[0])

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()

    def _prompt(self, prompt: str) -> str | None:
        if self.prompts == "hash":
            return "blake2:" + hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
        return prompt if self.prompts == "on" else None


def read_log(path: Path) -> Iterator[Entry]:
    """The decisions of a log, written to meanwhile or not; changes nothing in it. BadRequest on what is no such log."""
    if not path.is_file():
        raise BadRequest(f"{path}: no such file")
    try:
        db = _open(path, only_read=True)
    except RelayError as error:
        raise BadRequest(str(error)) from None
    with contextlib.closing(db):
        yield from _entries(db)


def _open(path: Path, only_read: bool = False) -> sqlite3.Connection:
    try:
        db = (
            sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)
            if only_read
            else sqlite3.connect(path, timeout=1.0)
        )
        own, known = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        new = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if (own, known) != (_APPLICATION, _FORMAT) and (only_read or not new):
            said = "is a decision log of another version" if own == _APPLICATION else "is no decision log"
            raise RelayError(f"{path} {said}: name another file, or move it away")
        if not only_read:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.executescript(_TABLES)
            db.execute(f"PRAGMA application_id = {_APPLICATION}")
            db.execute(f"PRAGMA user_version = {_FORMAT}")
    except sqlite3.Error as error:
        raise RelayError(f"{path} cannot be opened as a decision log ({error}): move it away") from None
    return db


def _entries(db: sqlite3.Connection) -> Iterator[Entry]:
    db.row_factory = sqlite3.Row

    @lru_cache(maxsize=1024)
    def shared(digest: str, read: Callable[[str], Any]) -> Any:
        return read(db.execute("SELECT text FROM shared WHERE digest = ?", (digest,)).fetchone()[0])

    try:
        for row in db.execute("SELECT * FROM decisions ORDER BY number"):
            yield _entry(row, shared(row["actions"], _read_actions), shared(row["curves"], _read_curves))
    except (sqlite3.Error, msgspec.DecodeError, msgspec.ValidationError, TypeError, BadRequest) as error:
        raise RelayError(f"the decision log is damaged: {error}") from None


def _entry(row: sqlite3.Row, actions: list[Action], curves: dict[str, Any]) -> Entry:
    told = msgspec.json.decode(row["context"])
    nodes = {name: NodeState(name=name, curves=curves[name], **facts) for name, facts in told.pop("nodes").items()}
    prompt = row["prompt"] or ""
    blob = row["distribution"]
    return Entry(
        context=Context(job=row["job"], prompt="" if prompt.startswith("blake2:") else prompt, nodes=nodes, **told),
        actions=actions,
        distribution=None if blob is None else tuple(array.array("d", blob)),
        notes=msgspec.json.decode(row["notes"]),
        marks=tuple(msgspec.json.decode(row["marks"])),
        terms=msgspec.json.decode(row["terms"] or "{}"),
        missing=tuple(msgspec.json.decode(row["missing"] or "[]")),
        **{name: row[name] for name in _AS_THEY_ARE},
    )


_AS_THEY_ARE = (
    "id", "at", "policy", "chosen", "probability", "router", "bandit", "features", "stage", "seconds", "error", "reward",
)  # fmt: skip


def _read_actions(text: str) -> list[Action]:
    programs: dict[str, Program] = {}
    found = []
    for name, nodes in msgspec.json.decode(text):
        if name not in programs:
            programs[name] = Program.parse(name)
        found.append(Action(programs[name], tuple(nodes)))
    return found


def _read_curves(text: str) -> dict[str, Any]:
    return msgspec.json.decode(text, type=dict[str, dict[str, dict[str, dict[int, float]]]])


def _context_json(context: Context) -> str:
    """All of a context but its prompt's text and the nodes' curves."""
    return _json(
        {
            "prompt_features": prompt_features(context), "notes": context.notes, "preference": context.preference,
            "deadline_s": context.deadline_s, "attempt": context.attempt, "latent_bytes": context.latent_bytes,
            "image_bytes": context.image_bytes,
            "nodes": {name: {fact: getattr(node, fact) for fact in _FACTS} for name, node in context.nodes.items()},
        }
    )  # fmt: skip


_FACTS = tuple(name for name in NodeState.__struct_fields__ if name not in ("name", "curves"))


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _number(name: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRequest(f"decision log: {name} is {value}: leave out what is not known")
    return value
