"""What a body may say, field by field, and how it becomes an `ImageRequest`. Honoured or refused, never ignored."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nodes.gateway.http_errors import ApiError
from nodes.requests import MAX_IMAGES, MAX_PROMPT, MAX_SEED, MAX_SIDE, MAX_STEPS, ImageRequest, read_request

AUTO = "auto"
Body = TypeVar("Body", bound=BaseModel)
MAX_PARTIAL = 3
# OpenAI's words for quality as a preference: 0 is all quality, 1 is all speed.
PREFERENCES = {
    "auto": 0.5,
    "standard": 0.5,
    "medium": 0.5,
    "low": 1.0,
    "high": 0.2,
    "hd": 0.2,
    "xhigh": 0.1,
    "max": 0.0,
}
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
# Fields of OpenAI's that are not done here, and what they may say because it is what happens anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": ("auto", "opaque"), "moderation": ("auto",), "output_format": ("png",), "output_compression": (100,),
    "style": (), "complexity": (), "frame_count": (), "frame_duration_ms": (), "svg": (),
}  # fmt: skip
EXAMPLES: dict[str, dict[str, Any]] = {
    "plain": {
        "summary": "One picture; program and nodes are chosen for you",
        "value": {"model": "mini-sd3", "prompt": "a large red heart at the top left and a small blue circle"},
    },
    "pinned": {
        "summary": "Everything that decides the picture is said: the same picture every time",
        "value": {
            "model": "mini-sd3", "prompt": "a green star", "seed": 7, "steps": 28, "handoff": 14, "guidance": 3.0,
            "size": "64x64", "n": 2, "response_format": "url",
        },
    },
    "again": {
        "summary": "A picture again, from what its answer said",
        "value": {
            "prompt": "a green star", "seed": 7,
            "program": "mini-sd3/large:28:0-14/small:28:14-28/match=direct/codec=fp16/guidance=3,3/conditioning=encode",
        },
    },
    "stream": {
        "summary": "Watch it come into being, fast rather than fine",
        "value": {"prompt": "a green star", "stream": True, "partial_images": 2, "quality": "low"},
    },
}  # fmt: skip


def _said(text: str, **limits: Any) -> Any:
    return Field(default=None, description=text, **limits)


class ImagesBody(BaseModel):
    """The body of `POST /v1/images/generations` and of `POST /v1/jobs`. A field that is null counts as not said."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="What the picture shall show.")]
    model: str | None = _said("A family on offer (`GET /v1/models`), or `auto`: any of them.", max_length=200)
    n: int | None = _said("Pictures; picture i uses seed + i. Default 1.", ge=1, le=MAX_IMAGES)
    size: str | None = _said(
        f"`WIDTHxHEIGHT` in pixels, at most {MAX_SIDE} a side and what the family can decode; `auto` (default): the family's.",
        max_length=20,
    )
    quality: Quality | None = _said(
        "OpenAI's words for `preference`: "
        + ", ".join(f"{word} {value:g}" for word, value in PREFERENCES.items())
        + "."
    )
    response_format: Literal["b64_json", "url"] | None = _said(
        "How the picture comes: inside the answer (`b64_json`, default), or as an address that works for an hour without a"
        " token (`url`). On `/v1/jobs` always an address."
    )
    stream: bool | None = _said(
        "Answer with server-sent events instead of one object. Not on `/v1/jobs`, see its events."
    )
    partial_images: int | None = _said(
        "At most so many previews on the way: in the stream, or among a job's events. Default 0.", ge=0, le=MAX_PARTIAL
    )
    user: str | None = _said("Your own name for the end user; goes into the log only, as prompts do.", max_length=256)
    safety_identifier: str | None = _said("As `user`.", max_length=256)

    seed: int | None = _said(
        "Fixes the noise; with the program the picture. Default: a random one, reported.", ge=0, le=MAX_SEED
    )
    steps: int | None = _said("Length T of the large member's schedule.", ge=1, le=MAX_STEPS)
    handoff: int | None = _said(
        "Steps the large member takes: 0 (the small one alone) to T (the large one alone).", ge=0, le=MAX_STEPS
    )
    small_steps: int | None = _said(
        "Steps the small member takes; default: what its schedule leaves.", ge=1, le=MAX_STEPS
    )
    mode: Literal["full-cloud", "relay", "edge-only"] | None = _said("Large member alone, relay, small member alone.")
    program: str | None = _said(
        "A whole program in its text form, as answers report it, in place of steps, handoff, mode and guidance.",
        max_length=1000,
    )
    guidance: float | None = _said("Classifier-free guidance of every member.", ge=0, le=100, allow_inf_nan=False)
    negative_prompt: str | None = _said(
        "What the picture shall not show; needs guidance above 1.", max_length=MAX_PROMPT
    )
    preference: float | None = _said(
        "0: quality, 1: speed, for what you leave open. Default 0.5.", ge=0, le=1, allow_inf_nan=False
    )
    allow_degraded: bool | None = _said(
        "Whether another program may finish when no node can go on with this one; the answer then says `degraded`."
        " Default: only where nothing that decides the picture was said."
    )
    cache: bool | None = _said(
        "true: the picture may start from a cached latent of a similar prompt of yours (of anybody's, where the deployment"
        " shares its cache), even where seed, steps or handoff are said; its answer then tells `start`. false: it neither"
        " starts from one nor leaves any. Default: not where anything that decides the picture is said."
    )
    deadline_ms: int | None = _said(
        "An error instead of a picture after so many milliseconds.", ge=1, le=24 * 3600 * 1000
    )
    device: str | None = _said("The device node whose small member finishes the picture.", min_length=1, max_length=63)

    background: Any = _said("Refused unless `auto` or `opaque`: pictures are opaque.")
    moderation: Any = _said("Refused unless `auto`: nothing is moderated here.")
    output_format: Any = _said("Refused unless `png`.")
    output_compression: Any = _said("Refused unless 100: PNG loses nothing.")
    style: Any = _said("Refused: say it in the prompt.")
    complexity: Any = _said("Refused: see `steps` and `preference`.")
    frame_count: Any = _said("Refused: pictures stand still.")
    frame_duration_ms: Any = _said("Refused: pictures stand still.")
    svg: Any = _said("Refused: pictures are PNG.")


FIELDS = tuple(ImagesBody.model_fields)
SCHEMA = ImagesBody.model_json_schema()
OPENAPI_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA, "examples": EXAMPLES}}}
}


def parse_json(data: bytes) -> dict[str, Any]:
    """The object a body holds. ApiError on anything that is not one, or that two readers could understand differently."""
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except UnicodeError:
        raise ApiError(400, "the body is not UTF-8 text", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(found).__name__}", code="invalid_json")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in {before for before, _ in pairs[:i]})
        raise ValueError(f"{twice[:64]!r} is said twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def read_body(said: dict[str, Any]) -> ImagesBody:
    """The body, checked. ApiError names the field."""
    if unknown := [name for name in said if name not in FIELDS]:
        shown = ", ".join(repr(name[:64]) for name in unknown[:5])
        raise ApiError(
            400,
            f"unknown field {shown}: known are {', '.join(FIELDS)}",
            code="unknown_parameter",
            param=unknown[0][:64],
        )
    given = {name: value for name, value in said.items() if value is not None}
    for name, neutral in NEUTRAL.items():
        # 100 == 100.0 == True in Python, not in JSON
        if name in given and not any(given[name] == each and type(given[name]) is type(each) for each in neutral):
            way_out = " or ".join(["leave it out", *(f"say {json.dumps(each)}" for each in neutral)])
            raise ApiError(
                400, f"{name} {json.dumps(given[name])[:64]} cannot be done here: {way_out}", code="unsupported_parameter",
                param=name,
            )  # fmt: skip
    return validated(ImagesBody, given)


def validated(model: type[Body], given: dict[str, Any]) -> Body:
    """A body's fields, checked. ApiError names the first that is wrong."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors(include_input=False)]
        codes = {"missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}
        code = codes.get(error.errors()[0]["type"], "invalid_value")
        message = "; ".join(f"{name}: {text[:1].lower()}{text[1:]}" for name, text in wrong[:5])
        raise ApiError(400, message, code=code, param=wrong[0][0]) from None


def to_request(body: ImagesBody, families: Collection[str], jobs: bool) -> ImageRequest:
    """What the gateway is asked for; `jobs`: without waiting. ApiError on what contradicts itself."""
    if body.model not in (None, AUTO, *families):
        shown = ", ".join([*families, AUTO])
        raise ApiError(
            404, f"there is no model {body.model!r} here: choose {shown}", code="model_not_found", param="model"
        )
    if body.quality not in (None, "auto") and body.preference is not None:
        raise _contradiction("preference", "quality and preference say the same thing: give one of them")
    if jobs and body.stream:
        raise _contradiction("stream", "a job does not stream its answer: read its /events")
    if jobs and body.response_format == "b64_json":
        raise _contradiction("response_format", "a job's answer comes before its picture: leave it out, or say url")
    if body.partial_images and not (body.stream or jobs):
        raise _contradiction("partial_images", "partial images need stream: true")
    width, height = _size(body.size)
    return read_request(
        {
            "prompt": body.prompt, "negative_prompt": body.negative_prompt, "images": body.n or 1, "seed": body.seed,
            "width": width, "height": height, "family": None if body.model == AUTO else body.model, "mode": body.mode,
            "steps": body.steps, "handoff": body.handoff, "small_steps": body.small_steps, "guidance": body.guidance,
            "program": body.program, "allow_degraded": body.allow_degraded, "deadline_ms": body.deadline_ms,
            "preference": PREFERENCES[body.quality or "auto"] if body.preference is None else body.preference,
            "device": body.device, "keep_on_device": False, "cache": body.cache,
        }
    )  # fmt: skip


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, AUTO):
        return None, None
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "")
    if not found or not all(1 <= int(side) <= MAX_SIDE for side in found.groups()):
        raise ApiError(
            400, f"size {size!r} is not WIDTHxHEIGHT with sides of 1 to {MAX_SIDE}; say e.g. 64x64, or auto",
            code="invalid_value", param="size",
        )  # fmt: skip
    return int(found[1]), int(found[2])


def _contradiction(param: str, message: str) -> ApiError:
    return ApiError(400, message, code="contradiction", param=param)
