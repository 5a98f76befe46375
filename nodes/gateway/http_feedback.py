"""`POST /v1/jobs/{id}/feedback`: what who asked for a picture thinks of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from nodes.gateway.api import Api, json_of, noted, tenant_of
from nodes.gateway.http_errors import ApiError
from nodes.gateway.http_models import validated
from nodes.gateway.verdicts import MAX_COMMENT
from nodes.requests import Refusal

JobId = Annotated[str, Path(description="As `POST /v1/jobs` or a picture's `relay.job` said it.", max_length=100)]


class FeedbackBody(BaseModel):
    """The body of `POST /v1/jobs/{id}/feedback`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rating: Annotated[
        float,
        Field(ge=0, le=1, allow_inf_nan=False, description="0: useless, 1: just right; of five stars, four are 0.75."),
    ]
    comment: Annotated[
        str | None,
        Field(default=None, max_length=MAX_COMMENT, description="Kept with the job; nothing learns from it."),
    ]


BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": FeedbackBody.model_json_schema(), "example": {"rating": 0.75, "comment": "the heart is blue"},
            }
        },
    }
}  # fmt: skip


def routes(api: Api) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

    @router.post("/{job}/feedback", summary="Rate a picture", openapi_extra=BODY)
    async def feedback(request: Request, job: JobId) -> Response:
        """One rating a job: a second one replaces the first, the same again changes nothing. It stands in the job's
        `report.feedback`, and what chooses programs may learn from it. 409 where the job has no picture (yet)."""
        body = validated(FeedbackBody, await json_of(request))
        noted(request, job=job)
        try:
            kept = await api.dispatcher.verdicts.rated(tenant_of(request), job, body.rating, body.comment)
        except Refusal as refused:
            code = "not_done" if refused.status == 409 else None
            raise ApiError(refused.status, str(refused), code=code, retry_after_s=refused.retry_after_s) from None
        return JSONResponse({"object": "image.feedback", "job": job, **kept})

    return router
