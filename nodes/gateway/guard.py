"""Before and after every HTTP request: who asks, under which id, and one line in the log about it.

Pure ASGI, so that it neither buffers a stream nor hides that a client has gone.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nodes.gateway.api import Api
from nodes.gateway.http_errors import ApiError
from nodes.gateway.tokens import LOCAL, parse_address
from nodes.logs import about, fields
from nodes.requests import new_id

log = logging.getLogger("relay.http")
OPEN = ("/healthz", "/readyz", "/docs", "/openapi.json")  # no token needed: they tell of no tenant


class Guard:
    def __init__(self, app: ASGIApp, api: Api):
        self.app, self.api = app, api
        configured = [parse_address(api.config.http)[0]] if api.config.http else []
        self.hosts = {"localhost", *configured}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = new_id("http"), time.perf_counter(), 0
        noted: dict[str, Any] = {}
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, tenant=None, noted=noted)

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        with about(http=request_id):
            try:
                try:
                    state["tenant"] = self._let_in(scope)
                except ApiError as refused:
                    noted["code"] = refused.code
                    await refused.response()(scope, receive, tell)
                else:
                    await self.app(scope, receive, tell)
            except (ClientDisconnect, ConnectionError):
                status = status or 499
            except Exception:
                log.exception("%s", scope["path"][:200])
                if not status:
                    ours = ApiError(500, f"an error of the gateway's own; its log tells it under {request_id}")
                    await ours.response()(scope, receive, tell)
            finally:
                self._log(scope, status, time.perf_counter() - started, state["tenant"], noted)

    def _let_in(self, scope: Scope) -> str:
        """The tenant. ApiError where it is nobody's request."""
        headers, path, tokens = Headers(scope=scope), scope["path"], self.api.tokens
        if tokens is None:
            self._check_host(headers.get("host", ""))
            return LOCAL
        if path in OPEN:
            return ""
        said = headers.get("authorization", "")
        if not said and path.startswith("/v1/jobs/") and path.endswith("/image"):
            query = {name: values[-1] for name, values in parse_qs(scope["query_string"].decode("latin-1")).items()}
            if "signature" in query:
                tenant = tokens.tenant_of_link(path, query.get("expires", ""), query["signature"])
                if tenant is None:
                    raise ApiError(
                        401, "this address is not valid any more: ask for the job again", code="link_expired"
                    )
                return tenant
        scheme, _, token = said.partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, "a token is needed: Authorization: Bearer TOKEN", code="no_token")
        tenant = tokens.tenant_of(token.strip())
        if tenant is None:
            raise ApiError(401, "this token is not known here")
        return tenant

    def _check_host(self, host: str) -> None:
        """Without tokens, what keeps others out is that only this machine can connect. A page in a browser here could, under
        its own name resolved to this address: so the name that was asked for must be this machine's."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.removeprefix("[").removesuffix("]").lower()
        try:
            ours = ipaddress.ip_address(name).is_loopback
        except ValueError:
            ours = name in self.hosts or name.endswith(".localhost")
        if not ours:
            message = f"host {host[:100]!r} is not this machine's: without tokens only it is served"
            raise ApiError(403, message, code="foreign_host")

    def _log(self, scope: Scope, status: int, seconds: float, tenant: str | None, noted: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.api.metrics.answered(scope["method"], route, status, seconds)
        quiet = route in ("/healthz", "/readyz", "/metrics") and status < 400
        log.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %d", scope["method"][:16], scope["path"][:200], status,
            extra=fields(tenant=tenant or None, status=status, seconds=round(seconds, 6), **noted),
        )  # fmt: skip
