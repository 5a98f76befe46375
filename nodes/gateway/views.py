"""Jobs as their tenant sees them, open or ended: found, listed, waited for, watched.

An open job is the dispatcher's, an ended one the ledger's; nobody who asks needs to know which. A job of another tenant
does not exist.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.jobs import Job
from nodes.requests import Refusal
from nodes.stages import Stage

ALIVE_S = 10.0  # between two signs of life where nothing happens
ENDED_STATUS = {Stage.CANCELLED: 499, Stage.FAILED: 502}  # of jobs whose report does not say it


@dataclass(frozen=True)
class Record:
    """A job. `accepted_at`, `ended_at`: wall-clock seconds."""

    id: str
    request: str
    number: int
    stage: Stage
    seed: int
    body: dict[str, Any]  # of its request, as the ledger keeps it
    accepted_at: float
    program: str | None = None
    error: str | None = None
    report: dict[str, Any] = field(default_factory=dict)
    image: str | None = None  # relative to the store
    ended_at: float | None = None
    live: dict[str, Any] = field(default_factory=dict)  # where it stands, while it is open

    @property
    def status(self) -> int:
        """HTTP's, of its end."""
        if self.stage is Stage.DONE:
            return 200
        return int(self.report.get("status") or ENDED_STATUS.get(self.stage, 502))

    @property
    def size(self) -> str:
        return f"{self.body.get('width')}x{self.body.get('height')}"  # filled in when it was planned

    def made(self) -> dict[str, Any]:
        """What it takes to make the picture again, and how it was made."""
        names = (
            "prompt", "negative_prompt", "width", "height", "dtype", "version", "nodes", "seconds", "timings", "attempts",
            "steps_paid", "history", "policy", "probability", "start",
        )  # fmt: skip
        return {
            "job": self.id, "seed": self.seed, "program": self.program, "steps": self.report.get("steps"),
            "degraded": bool(self.report.get("degraded")), **{name: self.report.get(name) for name in names},
        }  # fmt: skip

    def told(self) -> dict[str, Any]:
        """Its state as every asker is told it."""
        return {
            "id": self.id, "request": self.request, "number": self.number, "stage": str(self.stage), "seed": self.seed,
            "prompt": self.body.get("prompt"), "program": self.program, "degraded": bool(self.report.get("degraded")),
            "error": self.error, "image": self.image, "report": self.report or None, **self.live,
        }  # fmt: skip


def of_job(job: Job) -> Record:
    """An open job, or one whose end was just seen."""
    import msgspec

    ago = time.monotonic() - job.accepted
    return Record(
        id=job.id, request=job.request_id, number=job.number, stage=job.stage, seed=job.seed,
        body={k: v for k, v in msgspec.to_builtins(job.request).items() if v is not None},
        accepted_at=time.time() - ago, program=str(job.program) if job.program else None, error=job.error,
        report=(job.report or {}) | ({} if job.stage.ended else {"degraded": job.degraded, "history": list(job.history)}),
        image=job.image if job.stage is Stage.DONE else None, ended_at=time.time() if job.stage.ended else None,
        live={} if job.stage.ended else job.where,
    )  # fmt: skip


def _of_row(row: dict[str, Any]) -> Record:
    report = json.loads(row["report"]) if row["report"] else {}
    return Record(
        id=row["id"], request=row["request"], number=row["number"], stage=Stage(row["stage"]), seed=row["seed"],
        body=json.loads(row["body"]), accepted_at=row["accepted_at"], program=report.get("program") or row["program"],
        error=row["error"], report=report, image=row["image"], ended_at=row["ended_at"],
    )  # fmt: skip


async def find(dispatcher: Dispatcher, tenant: str, job_id: str) -> Record:
    """Refusal 404 where there is none, or it is another tenant's."""
    if (job := dispatcher.jobs.get(job_id)) is not None and job.tenant == tenant:
        return of_job(job)
    row = await asyncio.to_thread(dispatcher.ledger.job, job_id)
    if row is None or row["tenant"] != tenant:
        raise Refusal(f"there is no job {job_id[:100]}", 404)
    return _of_row(row)


async def listed(dispatcher: Dispatcher, tenant: str, limit: int, after: str | None) -> list[Record]:
    """A tenant's jobs, newest first."""
    rows = await asyncio.to_thread(dispatcher.ledger.list_jobs, tenant, limit, after)
    return [of_job(job) if (job := dispatcher.jobs.get(row["id"])) else _of_row(row) for row in rows]


async def ended(dispatcher: Dispatcher, tenant: str, job_id: str) -> Record:
    """A job once it has ended."""
    while True:
        if (job := dispatcher.jobs.get(job_id)) is not None and job.tenant == tenant:
            await job.ended.wait()
            return of_job(job)
        record = await find(dispatcher, tenant, job_id)
        if record.stage.ended:
            return record
        await asyncio.sleep(0.05)  # it is in the ledger and the dispatcher takes it up at any moment


async def picture_of(dispatcher: Dispatcher, record: Record) -> bytes:
    """The PNG. Refusal 410 where it is not here: it stayed on its asker's device, or is not kept any more."""
    try:
        if record.image is not None:
            return await asyncio.to_thread((dispatcher.store / record.image).read_bytes)
    except OSError:
        pass
    raise Refusal(f"the picture of job {record.id} is not here, or not any more", 410)


@dataclass(frozen=True)
class Happening:
    """`what`: stage | step | preview | end | alive. `data`: what the dispatcher told; `record`: of a job that ended."""

    what: str
    job: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    preview: bytes = b""
    record: Record | None = None


async def watch(dispatcher: Dispatcher, tenant: str, ids: Sequence[str]) -> AsyncGenerator[Happening, None]:
    """What happens to some jobs until all have ended; who reads slowly misses steps, never an end."""
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(256)
    live = {each: job for each in ids if (job := dispatcher.jobs.get(each)) is not None and job.tenant == tenant}
    left = list(ids)
    for job in live.values():
        job.watchers.add(queue)
    try:
        while left:
            try:
                told = queue.get_nowait()
            except asyncio.QueueEmpty:
                for each in [e for e in left if e not in live or live[e].ended.is_set()]:
                    left.remove(each)
                    yield Happening("end", each, record=await ended(dispatcher, tenant, each))
                if not left:
                    return
                try:
                    async with asyncio.timeout(ALIVE_S):
                        told = await queue.get()
                except TimeoutError:
                    yield Happening("alive")
                    continue
            event, each = told["event"], told["id"]
            if event == "preview":
                if picture := live[each].preview:
                    yield Happening("preview", each, told, picture)
            elif event in ("placed", "stage", "waiting", "step"):
                yield Happening("step" if event == "step" else "stage", each, told)
    finally:
        for job in live.values():
            job.watchers.discard(queue)
