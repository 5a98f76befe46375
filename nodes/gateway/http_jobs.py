"""`/v1/jobs`: ask now, look later. A job is one picture; it belongs to its tenant, and does not exist for any other."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response

from nodes.gateway.api import ALIVE, Api, EventStream, sse, tenant_of
from nodes.gateway.http_errors import ApiError
from nodes.gateway.http_images import ASKED, failure_of
from nodes.gateway.views import Record, ended, find, listed, picture_of, watch
from nodes.stages import Stage
from nodes.trace import chrome_trace, timeline

JobId = Annotated[str, Path(description="As `POST /v1/jobs` or a picture's `relay.job` said it.", max_length=100)]
STEP_FIELDS = ("id", "number", "stage", "program", "attempt", "leg", "step", "of", "degraded")


def routes(api: Api) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])
    dispatcher = api.dispatcher

    @router.post("", summary="Ask for pictures without waiting", status_code=202, openapi_extra=ASKED)
    async def submit(request: Request) -> Response:
        """202 as soon as the request is on disk: from then on each job ends in a picture or an error that says why,
        whatever dies in between. One job a picture, in `jobs`. They go on when their asker goes away."""
        _, wanted, key = await api.read(request, jobs=True)
        rid, ids = await api.submit(request, wanted, key)
        link = api.link(request)
        jobs = [shown(await find(dispatcher, tenant_of(request), each), link) for each in ids]
        said = {"id": rid, "object": "image.request", "jobs": jobs}
        return JSONResponse(said, 202, {"Location": f"/v1/jobs/{ids[0]}"})

    @router.get("", summary="Your jobs, newest first")
    async def jobs(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100, description="At most so many.")] = 20,
        after: Annotated[str | None, Query(description="Go on after this job's id.", max_length=100)] = None,
    ) -> Response:
        """`has_more` says whether more follow the last one; ask on with its id as `after`."""
        records = await listed(dispatcher, tenant_of(request), limit + 1, after)
        link = api.link(request)
        data = [shown(record, link) for record in records[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(records) > limit})

    @router.get("/{job}", summary="One job: where it stands, and its full report")
    async def job(request: Request, job: JobId) -> Response:
        """`stage` is one of accepted, placed, denoising, decoding, waiting (to be placed again), done, failed, cancelled.
        `report` holds program, steps really done, nodes, timings, attempts and what went wrong on the way; `image` the
        picture's address once it is done."""
        return JSONResponse(shown(await find(dispatcher, tenant_of(request), job), api.link(request)))

    @router.delete("/{job}", summary="Cancel a job")
    async def cancel(request: Request, job: JobId) -> Response:
        """The job as it then is. One that has ended stays as it is."""
        tenant = tenant_of(request)
        open_job = dispatcher.jobs.get(job)
        if open_job is not None and open_job.tenant == tenant:
            await dispatcher.cancel(open_job)
            with contextlib.suppress(TimeoutError):  # it may be ending of itself just now
                async with asyncio.timeout(1.0):
                    await open_job.ended.wait()
            if not open_job.stage.ended:
                raise ApiError(507, "the ledger cannot be written now: the job is not cancelled", retry_after_s=5)
        return JSONResponse(shown(await find(dispatcher, tenant, job), api.link(request)))

    @router.get(
        "/{job}/image", summary="A job's picture", response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "The PNG; it carries its parameters as metadata."}},
    )  # fmt: skip
    async def image(
        request: Request,
        job: JobId,
        expires: Annotated[str | None, Query(description="Of an address made by the gateway.")] = None,
        signature: Annotated[str | None, Query(description="Of an address made by the gateway.")] = None,
    ) -> Response:
        """409 while it is not done, 410 where it ended without one or is not kept any more."""
        record = await find(dispatcher, tenant_of(request), job)
        if not record.stage.ended:
            raise ApiError(409, f"job {record.id} is not done: it is {record.stage}", code="not_done", retry_after_s=1)
        if record.stage is not Stage.DONE:
            raise ApiError(
                410, f"job {record.id} has no picture, it is {record.stage}: {record.error}", code="no_image"
            )
        headers = {
            "Content-Disposition": f'inline; filename="{record.id}.png"',
            "Cache-Control": "private, max-age=3600",
        }
        return Response(await picture_of(dispatcher, record), media_type="image/png", headers=headers)

    @router.get(
        "/{job}/events", summary="Watch a job", response_class=Response,
        responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
    )  # fmt: skip
    async def events(request: Request, job: JobId) -> Response:
        """Server-sent events: `stage` (the first says where it stands), `step` (`step` of `of` of leg `leg`), `preview` (a
        PNG in `b64_json`, where the request asked for `partial_images`), and `end` with the job as `GET /v1/jobs/ID` shows
        it, after which the stream ends. Of a job that has ended, `end` alone. Who reads slowly misses steps, never the
        end."""
        tenant = tenant_of(request)
        record = await find(dispatcher, tenant, job)
        api.take_stream(tenant)

        async def done() -> None:
            api.drop_stream(tenant)

        return EventStream(api, _events(api, request, record), done)

    @router.get("/{job}/trace", summary="A job's timeline over all nodes")
    async def trace(
        request: Request,
        job: JobId,
        format: Annotated[
            Literal["rows", "chrome"],
            Query(description="`chrome`: Chrome trace JSON, for chrome://tracing and Perfetto."),
        ] = "rows",
    ) -> Response:
        """Rows by the gateway's clock; `left` and `spent_s`: the stage that ended there and how long it took."""
        record = await find(dispatcher, tenant_of(request), job)
        await dispatcher.timeline.flush()
        rows = await asyncio.to_thread(dispatcher.ledger.events_of, record.id)
        if format == "chrome":
            return JSONResponse(chrome_trace(record.id, rows))
        return JSONResponse({"object": "list", "job": record.id, "data": timeline(rows)})

    return router


def shown(record: Record, link: Callable[[str], str]) -> dict[str, Any]:
    """The job object of `/v1/jobs`. `link`: a path as an address that opens it."""
    failed = failure_of(record).body["error"] if record.stage in (Stage.FAILED, Stage.CANCELLED) else None
    return record.told() | {
        "object": "image.job", "created": int(record.accepted_at), "ended": record.ended_at and int(record.ended_at),
        "error": failed, "image": link(f"/v1/jobs/{record.id}/image") if record.image else None,
    }  # fmt: skip


async def _events(api: Api, request: Request, record: Record) -> AsyncGenerator[bytes, None]:
    tenant, link = tenant_of(request), api.link(request)
    if not record.stage.ended:
        yield sse("stage", {name: value for name, value in record.told().items() if name in STEP_FIELDS})
    async with aclosing(watch(api.dispatcher, tenant, [record.id])) as happenings:
        async for each in happenings:
            if not api.let_in(tenant):
                return
            said = {name: each.data[name] for name in STEP_FIELDS if name in each.data}
            match each.what:
                case "alive":
                    yield ALIVE
                case "stage":
                    more = {name: each.data[name] for name in ("node", "what", "reason", "nodes") if name in each.data}
                    yield sse("stage", said | more)
                case "step":
                    yield sse("step", said)
                case "preview":
                    yield sse("preview", said | {"b64_json": base64.b64encode(each.preview).decode()})
                case "end":
                    yield sse("end", shown(await ended(api.dispatcher, tenant, record.id), link))
