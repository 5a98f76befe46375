"""What every HTTP handler shares: who asks, how a body is read, addresses of pictures, streams and their end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from nodes.deployment import GatewayConfig
from nodes.gateway.dispatcher import Dispatcher
from nodes.gateway.http_errors import ApiError
from nodes.gateway.http_models import ImagesBody, parse_json, read_body, to_request
from nodes.gateway.metrics import Metrics
from nodes.gateway.tokens import Tokens
from nodes.logs import prompt_fields
from nodes.requests import ImageRequest
from relay.family_spec import FamilySpec, find_family
from relay.program import Program

MAX_BODY = 1 << 20  # bytes
MAX_STREAMS = 32  # of one tenant, at a time
BODY_S, SEND_S = 30.0, 60.0  # a client that sends or reads nothing for so long is let go


@dataclass
class Api:
    """One gateway, as HTTP offers it."""

    dispatcher: Dispatcher
    config: GatewayConfig
    status: Callable[[], dict[str, Any]]
    tokens: Tokens | None
    metrics: Metrics
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    since: int = field(default_factory=lambda: int(time.time()))
    streams: Counter[str] = field(default_factory=Counter)
    _offered: list[Program] | None = None

    @cached_property
    def families(self) -> dict[str, FamilySpec]:
        """The families on offer, by name."""
        specs = [find_family(offer.family) for offer in self.config.offer]  # by name or by path
        return {spec.name: spec for spec in specs}

    async def offered(self) -> list[Program]:
        """The programs on offer."""
        if self._offered is None:
            self._offered = await self.dispatcher.planner.start()
        return self._offered

    def link(self, request: Request) -> Callable[[str], str]:
        """Paths as addresses that the asker's browser can open."""
        base, tenant = str(request.base_url).rstrip("/"), tenant_of(request)

        def opened(path: str) -> str:
            return f"{base}{path}" + (f"?{self.tokens.sign(tenant, path)}" if self.tokens else "")

        return opened

    async def read(self, request: Request, jobs: bool) -> tuple[ImagesBody, ImageRequest, str | None]:
        """Body, what it asks for, and its idempotency key. ApiError on whatever is wrong with them."""
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
            raise ApiError(400, "Idempotency-Key: 1 to 255 printable ASCII characters", code="invalid_value")
        body = read_body(await json_of(request))
        noted(
            request, model=body.model, n=body.n, stream=body.stream,
            **prompt_fields(
                self.config.prompts_in_logs, prompt=body.prompt, negative_prompt=body.negative_prompt,
                user=body.safety_identifier or body.user,
            ),
        )  # fmt: skip
        wanted = to_request(body, self.families, jobs)
        if wanted.device is not None:
            node = self.dispatcher.registry.nodes.get(wanted.device)
            if node is None or node.role != "device":
                raise ApiError(400, f"no device node {wanted.device!r} is here", code="unknown_device", param="device")
        if body.partial_images:
            import msgspec

            planned = await self.dispatcher.planner.plan(wanted)
            total = min(sum(leg.steps for leg in program.legs) for program in planned.programs)
            wanted = msgspec.structs.replace(wanted, previews=max(1, total // (body.partial_images + 1)))
        return body, wanted, key

    async def submit(self, request: Request, wanted: ImageRequest, key: str | None) -> tuple[str, list[str]]:
        """Into the ledger; request id and job ids."""
        rid, ids = await self.dispatcher.submit(wanted, tenant_of(request), key)
        noted(request, job=ids[0], jobs=len(ids))
        return rid, ids

    def take_stream(self, tenant: str) -> None:
        """Counts a stream until `drop_stream`. ApiError 429 where the tenant has too many."""
        if self.streams[tenant] >= MAX_STREAMS:
            raise ApiError(
                429,
                f"{MAX_STREAMS} streams of yours are open, the limit here",
                code="too_many_streams",
                retry_after_s=5,
            )
        self.streams[tenant] += 1

    def drop_stream(self, tenant: str) -> None:
        self.streams[tenant] -= 1
        if not self.streams[tenant]:
            del self.streams[tenant]

    def let_in(self, tenant: str) -> bool:
        """Whether a tenant that was let in once still would be."""
        return self.tokens is None or self.tokens.knows(tenant)


def tenant_of(request: Request) -> str:
    """Whose request this is: the guard has proved it."""
    return str(request.state.tenant)


def noted(request: Request, **what: Any) -> None:
    """Onto the request's line in the log."""
    request.state.noted.update({key: value for key, value in what.items() if value is not None})


async def json_of(request: Request) -> dict[str, Any]:
    """The object that a body holds. ApiError on what is none, is too long or does not come."""
    return parse_json(await _bytes_of(request))


async def _bytes_of(request: Request) -> bytes:
    """The body, refused before it is read whole where it is too long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # also what keeps other sites' pages from asking in the name of who visits them: a browser asks us first, in vain
        raise ApiError(415, f"the body must be application/json, not {kind[:60] or 'unsaid'}")
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said[:12]) > MAX_BODY:
        raise _too_long()
    found = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                found += chunk
                if len(found) > MAX_BODY:
                    raise _too_long()
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {BODY_S:.0f} s") from None
    return bytes(found)


def _too_long() -> ApiError:
    return ApiError(413, f"the body is over the limit of {MAX_BODY} bytes")


def stopping() -> ApiError:
    """For who still waits when the gateway stops."""
    return ApiError(
        503, "the gateway is stopping; what it has accepted goes on after it", code="stopping", retry_after_s=2
    )


async def gone(request: Request) -> None:
    """Returns when the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(event: str, data: Any) -> bytes:
    """One server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data, ensure_ascii=True, default=str)}\n\n".encode()


ALIVE = b": alive\n\n"
GONE = (OSError, TimeoutError, ClientDisconnect)  # nobody reads any more


class EventStream(StreamingResponse):
    """Server-sent events of one tenant, to their end, the client's or the server's; `done` is awaited after all three."""

    def __init__(self, api: Api, events: AsyncGenerator[bytes, None], done: Callable[[], Awaitable[None]]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.api, self.events, self.done = api, events, done
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patient(message: Message) -> None:
            async with asyncio.timeout(SEND_S):
                await send(message)
            self.started = True

        pump = asyncio.ensure_future(self.stream_response(patient))
        others = [
            asyncio.ensure_future(self.listen_for_disconnect(receive)),
            asyncio.ensure_future(self.api.closing.wait()),
        ]
        try:
            await asyncio.wait({pump, *others}, return_when=asyncio.FIRST_COMPLETED)
            closing = others[1].done() and not pump.done()
        finally:
            for task in (pump, *others):
                task.cancel()
            await asyncio.gather(pump, *others, return_exceptions=True)
            await self.events.aclose()
            await self.done()
        if closing and self.started:
            last = sse("error", {"type": "error", **stopping().body})
            with contextlib.suppress(OSError, TimeoutError):
                await patient({"type": "http.response.body", "body": last, "more_body": False})
        elif not pump.cancelled() and (error := pump.exception()) is not None and not isinstance(error, GONE):
            raise error
