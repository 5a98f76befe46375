"""Errors over HTTP, in the shape that OpenAI's clients read: {"error": {"message", "type", "param", "code"}}.

    400 what was asked cannot be done as asked      413 the body is too long
    401 no token, or a wrong one                    415 the body is not JSON
    404 no such job, picture or model               429 too many jobs or streams: Retry-After
    408 the body did not come                       499 the job was cancelled
    409 an idempotency key of another request       502 nodes tried and could not; 503 stopping; 504 too late; 507 disk full

`x-should-retry: false` tells OpenAI's clients not to repeat what was already tried for as long as was asked.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from nodes.requests import Refusal
from relay.errors import BadRequest, RelayError

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {
    400: "invalid_request", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed",
    408: "body_timeout", 409: "conflict", 410: "image_gone", 413: "request_too_large", 415: "not_json",
    429: "too_many_requests", 499: "cancelled", 500: "internal_error", 502: "nodes_failed", 503: "not_available",
    504: "deadline_passed", 507: "storage_full",
}  # fmt: skip
FINAL = (409, 502, 504)  # trying the same again brings the same, or costs as much again


class ApiError(RelayError):
    """An answer that is an error. `relay`: what an asker can still use, e.g. the state of the jobs."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None,
        retry_after_s: float | None = None, relay: dict[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.param, self.retry_after_s, self.relay = status, param, retry_after_s, relay
        self.code = code or CODES.get(status, "error")

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error | ({"relay": self.relay} if self.relay else {})}

    @property
    def headers(self) -> dict[str, str]:
        found = {}
        if self.retry_after_s is not None:
            found["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status in FINAL:
            found["x-should-retry"] = "false"
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413, 415):
            found["Connection"] = "close"  # what is left of the body is not read
        return found

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: RelayError) -> ApiError:
    """Any error of ours as HTTP says it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refusal):
        code = {409: "idempotency_conflict", 429: "queue_full"}.get(error.status)
        return ApiError(error.status, str(error), code=code, retry_after_s=error.retry_after_s)
    if isinstance(error, BadRequest):
        return ApiError(400, str(error))
    return ApiError(503, str(error))


def of_http(status: int, detail: str, path: str) -> ApiError:
    """What the router refuses before any of our code is asked."""
    said = {404: f"there is nothing at {path[:200]}", 405: f"{path[:200]} does not take this method"}
    return ApiError(status, said.get(status, detail))
