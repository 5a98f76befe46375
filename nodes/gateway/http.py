"""The gateway over HTTP: OpenAI's image API, jobs, and what operators look at.

    api.py          what every handler shares        guard.py     who asks: tokens, hosts, ids, one log line a request
    http_models.py  what a body may say              tokens.py    tokens and tenants
    http_images.py  /v1/images/generations, models   http_errors.py  errors in OpenAI's shape
    http_jobs.py    /v1/jobs                         metrics.py   /metrics
    http_feedback.py  ratings of pictures            docs_page.py    /docs
    views.py        jobs as their tenant sees them

Served in the gateway's own event loop; whatever touches a disk runs in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from nodes.deployment import GatewayConfig
from nodes.gateway import http_feedback, http_images, http_jobs
from nodes.gateway.api import Api
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.docs_page import docs_page
from nodes.gateway.guard import Guard
from nodes.gateway.http_errors import ApiError, as_api_error, of_http
from nodes.gateway.jobs import Job
from nodes.gateway.metrics import CONTENT_TYPE, Metrics
from nodes.gateway.placement import actions_for
from nodes.gateway.tokens import Tokens, check_address, parse_address
from nodes.requests import ImageRequest
from nodes.results import version
from relay.errors import BadRequest, RelayError
from relay.program import Program

log = logging.getLogger("relay.http")
STOP_S = 5.0  # for answers that are being sent when the server stops

ABOUT = """Text to image over a large and a small member of one model family, on different machines.

What you ask for is done or refused, never ignored: a field that is not known here, or cannot be honoured, is a 400 that
names it. Errors have OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`.

Where the gateway has tokens, send one as `Authorization: Bearer TOKEN`; jobs and pictures belong to the token's tenant.
OpenAI's own clients work unchanged: `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key=TOKEN)`.
"""

ERROR = {
    "description": "An error. `param` names the field, `code` says what kind of error; with 429 and 503 comes Retry-After.",
    "content": {"application/json": {"example": ApiError(400, "n: input should be at most 16", param="n").body}},
}


def make_app(dispatcher: Dispatcher, config: GatewayConfig, status: Callable[[], dict[str, Any]]) -> FastAPI:
    """BadRequest where the config's address needs tokens that it does not name, or its tokens cannot be read."""
    tokens = Tokens(Path(config.tokens)) if config.tokens is not None else None
    if config.http is not None:
        check_address(config.http, tokens is not None)
    api = Api(dispatcher, config, status, tokens, Metrics(dispatcher))
    app = FastAPI(
        title="relay", version=version(), description=ABOUT, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={"default": ERROR},
        dependencies=[Depends(_known_query), Security(HTTPBearer(auto_error=False, description="A token of the gateway's."))],
    )  # fmt: skip
    app.state.api = api
    app.include_router(http_images.routes(api))
    app.include_router(http_jobs.routes(api))
    app.include_router(http_feedback.routes(api))
    app.include_router(_operators(api))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(docs_page(app.openapi()))

    @app.exception_handler(RelayError)
    async def ours(request: Request, error: RelayError) -> Response:
        said = as_api_error(error)
        request.state.noted.update(code=said.code, param=said.param)
        return said.response()

    @app.exception_handler(sqlite3.Error)
    async def unreadable(request: Request, error: sqlite3.Error) -> Response:
        log.error("the ledger cannot be read: %s", error)
        return ApiError(503, "the ledger cannot be read now", retry_after_s=5).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return ApiError(400, f"{name}: {first['msg']}", code="invalid_value", param=name).response()

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> Response:
        response = of_http(error.status_code, str(error.detail), request.url.path).response()
        response.headers.update(error.headers or {})
        return response

    app.add_middleware(Guard, api=api)
    return app


def _known_query(request: Request) -> None:
    """A query parameter that nobody reads is refused like a field that nobody reads."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    known = {field.alias for field in dependant.query_params} if dependant is not None else set()
    if unknown := [name for name in request.query_params if name not in known]:
        raise ApiError(
            400, f"unknown query parameter {unknown[0][:64]!r}: known are {', '.join(sorted(known)) or 'none here'}",
            code="unknown_parameter", param=unknown[0][:64],
        )  # fmt: skip


def _operators(api: Api) -> APIRouter:
    router = APIRouter(tags=["Operators"])

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> Response:
        """200 as long as it does. Needs no token."""
        return JSONResponse({"status": "ok"})

    @router.get("/readyz", summary="Whether pictures can be made now")
    async def readyz() -> Response:
        """200 if some program on offer can be served by the nodes that are here now, else 503; says which cannot, and
        what is missing. Needs no token."""
        programs = [_served(api, program) for program in await api.offered()]
        ready = any(each["served"] for each in programs)
        return JSONResponse({"ready": ready, "programs": programs}, 200 if ready else 503)

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        """Jobs by end, stage and job latencies, queue lengths, batch sizes, bytes, recoveries, decisions, nodes."""
        return Response(api.metrics.render(), media_type=CONTENT_TYPE)

    @router.get("/status", summary="What `relay status` shows")
    async def status() -> Response:
        """Nodes, what each does now, queues, counters."""
        return JSONResponse(api.status())

    return router


def _served(api: Api, program: Program) -> dict[str, Any]:
    """Whether the nodes that are here could serve a program, and which of its members nobody holds."""
    now = time.monotonic()
    request = ImageRequest(prompt="-")
    nobody = Job("-", "-", 0, "-", 0, request, now, now, [program], 0)
    ready = api.dispatcher.registry.ready()
    served = bool(actions_for(nobody, [program], ready))
    members = dict.fromkeys(leg.member for leg in program.legs)
    missing = [each for each in members if not any(node.holds(program.family, each) for node in ready)]
    return {"program": str(program), "served": served, "missing": missing}


# --- serving ---


class _Server(uvicorn.Server):
    """Leaves signals to the process it is part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: FastAPI, address: str) -> None:
    """Serve until cancelled; then streams are ended with a word, answers under way are sent, and sockets are closed."""
    listening = _listen(address)
    host, port = listening.getsockname()[:2]
    log.info("HTTP on http://%s:%d, described at /docs", f"[{host}]" if ":" in host else host, port)
    server = _Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=int(STOP_S),
        )
    )  # fmt: skip
    serving = asyncio.ensure_future(server.serve(sockets=[listening]))
    try:
        await asyncio.shield(serving)
    finally:
        app.state.api.closing.set()
        server.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S + 2):
                await serving
        listening.close()


def _listen(address: str) -> socket.socket:
    """BadRequest where it cannot be bound."""
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        raise BadRequest(f"HTTP cannot be served on {address}: {error.strerror or error}") from None
    listening.setblocking(False)
    return listening
