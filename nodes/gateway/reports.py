"""What is told of a job that has ended: beside its picture, or in place of one."""

from __future__ import annotations

import time
from typing import Any

from nodes.gateway.deciding import told_of
from nodes.gateway.jobs import Job
from nodes.messages import Result
from relay.program import Program


def report_of(job: Job, node: str, result: Result, program: Program) -> dict[str, Any]:
    """A picture that `node` made with `program`: what it says of it, and what the gateway knows."""
    known = _known(job)
    spent = {**job.spent, node: result.report.get("spent_s", {})}
    return (
        result.report
        | known
        | {"node": node, "nodes": known["nodes"] or [node], "steps": program.taken(_skipped(result)), "timings": spent}
    )


def _skipped(result: Result) -> int:
    """Steps that a cached start spared."""
    start = result.report.get("start")
    skipped = start.get("skipped") if isinstance(start, dict) else None
    return skipped if isinstance(skipped, int) else 0


def report_of_failure(job: Job, status: int) -> dict[str, Any]:
    """A job that ends without a picture. `status`: HTTP's."""
    program = str(job.program) if job.program else None
    return _known(job) | {"status": status, "program": program, "seed": job.seed, "timings": job.spent}


def _known(job: Job) -> dict[str, Any]:
    decision = job.decision
    return {
        "job": job.id, "nodes": list(decision.action.nodes) if decision else [], "degraded": job.degraded,
        "seconds": time.monotonic() - job.accepted, "attempts": job.tries + 1, "history": job.history,
        "steps_paid": job.steps_paid, "policy": decision.policy if decision else None,
        "probability": decision.probability if decision else None, "decision": told_of(decision) if decision else None,
    }  # fmt: skip
