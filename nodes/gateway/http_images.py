"""`POST /v1/images/generations` as OpenAI's clients ask it, and `/v1/models`."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nodes.gateway.api import ALIVE, Api, EventStream, gone, sse, stopping, tenant_of
from nodes.gateway.http_errors import ApiError, as_api_error
from nodes.gateway.http_models import AUTO, OPENAPI_BODY, ImagesBody
from nodes.gateway.views import Record, ended, picture_of, watch
from nodes.stages import Stage
from relay.errors import RelayError
from relay.family_spec import FamilySpec
from relay.program import Program

IDEMPOTENCY: dict[str, Any] = {
    "name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 255},
    "description": "The same key with the same body is the same request: it is done once and answered as often as it is"
    " asked. With another body: 409. Kept as long as the request's jobs.",
}  # fmt: skip
ASKED = OPENAPI_BODY | {"parameters": [IDEMPOTENCY]}
CLIENT_LEFT = "its client has gone"


def routes(api: Api) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/images/generations", summary="Make pictures and wait for them", openapi_extra=ASKED)
    async def generate(request: Request) -> Response:
        """Answers when all pictures are there, or with the first error. Every picture says in `relay` what it takes to
        make it again (`job`, `program`, `seed`, size) and how it was made: steps really done, nodes, timings in seconds,
        `degraded`, what went wrong on the way.

        With `stream`: server-sent events `image_generation.partial_image` and `image_generation.completed`, one of the
        latter for each picture, and `error` for one that could not be made.

        **A client that goes away** before its answer cancels what it asked for: nobody could fetch it. With an
        `Idempotency-Key` it goes on, and asking again with that key fetches it. Jobs (`POST /v1/jobs`) always go on.
        """
        body, wanted, key = await api.read(request, jobs=False)
        if body.stream:
            return await _streamed(api, request, body, wanted, key)
        _, ids = await api.submit(request, wanted, key)
        records = await _wait(api, request, ids, leave=key is None)
        return JSONResponse(await _answer(api, request, body, records))

    @router.get("/v1/models", summary="Families on offer")
    async def models(request: Request) -> Response:
        """One model a family, and `auto`: any of them. `relay` says what can be asked of each: members and their default
        steps and guidance, sizes, the programs on offer where the request leaves the choice."""
        return JSONResponse({"object": "list", "data": await _models(api)})

    @router.get("/v1/models/{model}", summary="One family")
    async def model(request: Request, model: str) -> Response:
        """As in the list."""
        for each in await _models(api):
            if each["id"] == model:
                return JSONResponse(each)
        raise ApiError(404, f"there is no model {model[:100]!r} here", code="model_not_found", param="model")

    return router


# --- one answer ---


async def _wait(api: Api, request: Request, ids: list[str], leave: bool) -> list[Record]:
    """All of them ended. `leave`: cancel what is open when the client goes."""
    tenant = tenant_of(request)
    everything = asyncio.ensure_future(asyncio.gather(*(ended(api.dispatcher, tenant, each) for each in ids)))
    closing = asyncio.ensure_future(api.closing.wait())
    waits: list[asyncio.Future[Any]] = [everything, closing, asyncio.ensure_future(gone(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if everything.done():
            return list(everything.result())
        if closing.done():
            raise stopping()
        if leave:
            await cancel_open(api, tenant, ids, CLIENT_LEFT)
        raise ApiError(499, CLIENT_LEFT)
    finally:
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def cancel_open(api: Api, tenant: str, ids: list[str], reason: str) -> None:
    for each in ids:
        if (job := api.dispatcher.jobs.get(each)) is not None and job.tenant == tenant:
            await api.dispatcher.cancel(job, reason)


async def _answer(api: Api, request: Request, body: ImagesBody, records: list[Record]) -> dict[str, Any]:
    if failed := [record for record in records if record.stage is not Stage.DONE]:
        error = failure_of(failed[0])
        if len(records) > 1:
            done = [record.id for record in records if record.stage is Stage.DONE]
            message = f"{len(failed)} of {len(records)} pictures were not made: {error}"
            raise ApiError(error.status, message, relay={"failed": [r.id for r in failed], "done": done})
        raise error
    link = api.link(request)
    data = [await _picture(api, record, body, link) for record in records]
    return {
        "created": int(time.time()),
        **_about(body, records[0]),
        "data": data,
        "relay": {"request": records[0].request},
    }


async def _picture(api: Api, record: Record, body: ImagesBody, link: Callable[[str], str]) -> dict[str, Any]:
    if body.response_format == "url":
        if record.image is None:
            raise ApiError(410, f"the picture of job {record.id} is not here")
        return {"url": link(f"/v1/jobs/{record.id}/image"), "relay": record.made()}
    return {"b64_json": base64.b64encode(await picture_of(api.dispatcher, record)).decode(), "relay": record.made()}


def failure_of(record: Record) -> ApiError:
    """Of a job that ended without a picture."""
    said = record.error or f"job {record.id} ended as {record.stage}"
    return ApiError(record.status, said, relay={"job": record.id})


def _about(body: ImagesBody, record: Record) -> dict[str, Any]:
    """What OpenAI's answers say of all pictures."""
    said = {"background": "opaque", "output_format": "png", "size": record.size}
    return said | ({"quality": body.quality} if body.quality in ("low", "medium", "high", "xhigh", "max") else {})


# --- a stream ---


async def _streamed(api: Api, request: Request, body: ImagesBody, wanted: Any, key: str | None) -> Response:
    tenant = tenant_of(request)
    api.take_stream(tenant)
    try:
        _, ids = await api.submit(request, wanted, key)
    except BaseException:
        api.drop_stream(tenant)
        raise

    async def done() -> None:
        api.drop_stream(tenant)
        if key is None and not api.closing.is_set():
            await cancel_open(api, tenant, ids, CLIENT_LEFT)

    return EventStream(api, _events(api, request, body, ids), done)


async def _events(api: Api, request: Request, body: ImagesBody, ids: list[str]) -> AsyncGenerator[bytes, None]:
    tenant, shown = tenant_of(request), Counter[str]()
    about = {"background": "opaque", "output_format": "png", "quality": body.quality or "auto"}
    async with aclosing(watch(api.dispatcher, tenant, ids)) as happenings:
        async for each in happenings:
            if not api.let_in(tenant):
                return
            if each.what == "alive":
                yield ALIVE
            elif each.what == "preview" and shown[each.job] < (body.partial_images or 0):
                told = about | {
                    "created_at": int(time.time()), "size": _size_of(api, each.job),
                    "b64_json": base64.b64encode(each.preview).decode(), "partial_image_index": shown[each.job],
                    "relay": {"job": each.job, "number": each.data["number"], "leg": each.data["leg"], "step": each.data["step"]},
                }  # fmt: skip
                shown[each.job] += 1
                yield _event("image_generation.partial_image", told)
            elif each.record is not None:
                yield await _ended(api, each.record, about)


async def _ended(api: Api, record: Record, about: dict[str, Any]) -> bytes:
    try:
        if record.stage is not Stage.DONE:
            raise failure_of(record)
        told = about | {
            "created_at": int(time.time()), "size": record.size,
            "b64_json": base64.b64encode(await picture_of(api.dispatcher, record)).decode(), "usage": None,
            "relay": record.made() | {"number": record.number},
        }  # fmt: skip
        return _event("image_generation.completed", told)
    except RelayError as error:
        return sse("error", {"type": "error", **as_api_error(error).body})


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return sse(kind, {"type": kind, **data})


def _size_of(api: Api, job_id: str) -> str:
    job = api.dispatcher.jobs.get(job_id)
    return "{}x{}".format(*job.size) if job else "auto"


# --- models ---


async def _models(api: Api) -> list[dict[str, Any]]:
    programs = await api.offered()
    found = [_model(api, spec, programs) for spec in api.families.values()]
    anything = {"families": list(api.families), "programs": [str(program) for program in programs]}
    return [*found, {"id": AUTO, "object": "model", "created": api.since, "owned_by": "relay", "relay": anything}]


def _model(api: Api, spec: FamilySpec, programs: list[Program]) -> dict[str, Any]:
    return {
        "id": spec.name, "object": "model", "created": api.since, "owned_by": "relay",
        "relay": {
            "architecture": spec.architecture,
            "members": {name: {"steps": m.steps, "guidance": m.guidance} for name, m in spec.members.items()},
            "size": "{}x{}".format(*spec.sizes.default), "multiple_of": spec.sizes.multiple_of,
            "modes": ["full-cloud", "relay", "edge-only"], "matching": spec.matching, "codec": spec.codec,
            "prompts": "scene language" if spec.scenes else "free text",
            "programs": [str(program) for program in programs if program.family == spec.name],
        },
    }  # fmt: skip
