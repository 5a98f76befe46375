"""Logs of every process: one JSON object a line where a machine reads them, one short line where a person does.

A record carries what it is about (request, job, node) beside its message: set for a stretch of work with `about`, for one
line with `extra=fields(...)`. Context follows into the tasks that are started from it. What a prompt leaves in a log is
the config's to say (`prompts_in_logs: on | hash | off`).

`RELAY_LOGS=json|text` decides where the guess (text on a terminal, else JSON) is not what is wanted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TextIO

_about: ContextVar[dict[str, Any]] = ContextVar("about", default={})  # noqa: B039  # never changed, only replaced


@contextlib.contextmanager
def about(**what: Any) -> Iterator[None]:
    """Every record made inside carries these fields."""
    token = _about.set({**_about.get(), **what})
    try:
        yield
    finally:
        _about.reset(token)


def fields(**values: Any) -> dict[str, Any]:
    """For `extra=`: fields of one record; what is None is left out."""
    return {"fields": {key: value for key, value in values.items() if value is not None}}


def prompt_fields(policy: str, **texts: str | None) -> dict[str, Any]:
    """What a log may hold of texts that people wrote: themselves (on), a short hash that tells equal ones (hash; it
    hides a text only from who cannot guess it), or nothing (off)."""
    said = {name: text for name, text in texts.items() if text is not None}
    if policy == "on":
        return dict(said)
    if policy == "hash":
        return {f"{name}_sha256": _hash(text) for name, text in said.items()}
    return {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


class JsonLines(logging.Formatter):
    """One object a line: at (UTC), level, logger, message, what it is about, its own fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_of(record),
        }
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row, ensure_ascii=True, default=str)


class Lines(logging.Formatter):
    """`12:00:00 info  relay.http  message  key=value ...`; a traceback on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{at} {record.levelname.lower():7} {record.name}: {' '.join(record.getMessage().split())}"
        line += "".join(f" {key}={_short(value)}" for key, value in _of(record).items())
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class _Context(logging.Filter):
    """Takes the context when the record is made: a handler may format it elsewhere."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.about = _about.get()
        return True


def _of(record: logging.LogRecord) -> dict[str, Any]:
    return {**getattr(record, "about", {}), **getattr(record, "fields", {})}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text and not set(text) & set(' "=\n\r\t') and text.isprintable() else json.dumps(text)


def set_up(stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """All of this process's records on `stream` (stderr)."""
    stream = stream or sys.stderr
    style = os.environ.get("RELAY_LOGS") or ("text" if stream.isatty() else "json")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines() if style == "text" else JsonLines())
    handler.addFilter(_Context())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    for talkative in ("uvicorn", "uvicorn.error", "asyncio"):  # one line a request is relay.http's
        logging.getLogger(talkative).setLevel(logging.WARNING)
