"""The decision log: context, action and probability of every decision before it is acted on, and what came of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

if TYPE_CHECKING:
    from nodes.gateway.jobs import Job, Point
    from scheduler.policy import Context, Decision


class DecisionLog:
    """JSON lines, appended; a line is written before the nodes are told. `keep_mb`: then it is moved to `.1`."""

    def __init__(self, path: Path, keep_mb: float = 64.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.keep = path, int(keep_mb * 1e6)
        self._file: BinaryIO = path.open("ab", buffering=0)
        self.lost = 0

    def write(self, job: Job, context: Context, decision: Decision, point: Point | None) -> None:
        self._append(
            {
                "kind": "decision", "at": time.time(), "job": job.id, "attempt": job.attempt, "policy": decision.policy,
                "probability": decision.probability, "actions": decision.actions, "program": str(decision.action.program),
                "nodes": decision.action.nodes, "notes": decision.notes, "preference": context.preference,
                "deadline_s": context.deadline_s, "from": point.reached if point else None,
                "states": {name: {"backlog_s": n.backlog_s, "battery": n.battery} for name, n in context.nodes.items()},
            }
        )  # fmt: skip

    def outcome(self, job: Job) -> None:
        report = job.report or {}
        self._append(
            {"kind": "outcome", "at": time.time(), "job": job.id, "attempt": job.attempt, "stage": str(job.stage),
             "seconds": report.get("seconds"), "degraded": job.degraded, "error": job.error}
        )  # fmt: skip

    def _append(self, row: dict[str, Any]) -> None:
        try:
            if self._file.tell() > self.keep:
                self._file.close()
                self.path.replace(self.path.with_suffix(".jsonl.1"))
                self._file = self.path.open("ab", buffering=0)
            self._file.write(msgspec.json.encode(row) + b"\n")
        except OSError:  # a full disk must not stop the service; what was lost is counted and told
            self.lost += 1
