"""A job's timeline, from the ledger's events: as rows, or as Chrome trace JSON.

An event is `{"at": wall-clock s, "node": who, "what": stage that is entered, ...}`. All `at` are the gateway's clock, when
it heard of it; `left` and `spent_s` name the stage that ended there and the seconds it took by its node's own clock. So a
span ends where the gateway heard of its end, and no two clocks are ever subtracted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]
_OWN = ("at", "node", "what", "left", "spent_s")


def timeline(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The events with `after_s`, the seconds since the first."""
    rows = sorted(events, key=lambda event: event["at"])
    start = rows[0]["at"] if rows else 0.0
    return [{"after_s": round(row["at"] - start, 6), **row} for row in rows]


def chrome_trace(job: str, events: Iterable[Event]) -> dict[str, Any]:
    """The object that chrome://tracing and Perfetto open: a track a node, a slice a stage, a mark for the rest."""
    rows = timeline(events)
    tracks = {node: i for i, node in enumerate(dict.fromkeys(row["node"] for row in rows), start=1)}
    found: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": job}}]
    found += [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": node}}
        for node, track in tracks.items()
    ]
    for row in rows:
        at, track = row["after_s"] * 1e6, tracks[row["node"]]
        said = {key: value for key, value in row.items() if key not in _OWN}
        if row.get("left") and row.get("spent_s"):
            start = max(at - row["spent_s"] * 1e6, 0.0)  # a stage may begin before its first event was written
            found.append(
                {"ph": "X", "name": row["left"], "cat": "stage", "pid": 1, "tid": track, "ts": start, "dur": at - start,
                 "args": said | {"spent_s": row["spent_s"]}}
            )  # fmt: skip
        if row["node"] == "gateway" or not row.get("left"):
            found.append(
                {"ph": "i", "name": row["what"], "cat": "gateway", "pid": 1, "tid": track, "ts": at, "s": "t", "args": said}
            )  # fmt: skip
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"job": job, "clock": "the gateway's"}}
