"""What may be asked of the gateway: one structure for every way in, checked in one place.

Honoured or refused, never ignored: a field that fixes the picture (`seed`, `steps`, `handoff`, `mode`, `program`,
`family`, guidance) is fixed for every recovery as well, and `allow_degraded` is false unless it was said or nothing was
fixed.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import msgspec

from relay.errors import BadRequest, RelayError

MAX_PROMPT = 2000  # characters
MAX_IMAGES = 16
MAX_STEPS = 200
MAX_SIDE = 4096  # pixels
MAX_SEED = 2**63 - 1 - MAX_IMAGES

Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Refusal(RelayError):
    """What is not done for its asker, with HTTP's status and when to try again."""

    def __init__(self, reason: str, status: int, retry_after_s: float | None = None):
        super().__init__(reason)
        self.status, self.retry_after_s = status, retry_after_s


class ImageRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One request of `images` pictures of one prompt; picture i uses seed + i."""

    prompt: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PROMPT)]
    negative_prompt: Annotated[str, msgspec.Meta(max_length=MAX_PROMPT)] | None = None
    images: Annotated[int, msgspec.Meta(ge=1, le=MAX_IMAGES)] = 1
    seed: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEED)] | None = None
    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)] | None = None
    height: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)] | None = None
    family: str | None = None
    mode: str | None = None
    steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)] | None = None
    handoff: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)] | None = None
    small_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)] | None = None
    guidance: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    program: Annotated[str, msgspec.Meta(max_length=1000)] | None = None
    preference: Fraction = 0.5  # 0: quality, 1: speed
    allow_degraded: bool | None = None
    deadline_ms: Annotated[int, msgspec.Meta(ge=1, le=24 * 3600 * 1000)] | None = None
    device: str | None = None  # the device node whose user asks
    keep_on_device: bool = True  # with `device`: the picture stays there; False where its asker is elsewhere
    cache: bool | None = None  # true: start from a cached latent where one is alike; false: neither that nor be kept
    previews: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)] = 0  # a picture of the latent every so many steps

    @property
    def fixes(self) -> bool:
        """Whether anything that decides the picture was said."""
        said = (
            self.seed,
            self.mode,
            self.steps,
            self.handoff,
            self.small_steps,
            self.guidance,
            self.program,
            self.family,
        )
        return any(value is not None for value in said)

    @property
    def fixes_start(self) -> bool:
        """Whether it says what a cached start would change: it then begins from noise unless it asks for the cache."""
        said = (self.seed, self.mode, self.steps, self.handoff, self.small_steps, self.guidance, self.program)
        return any(value is not None for value in said)

    @property
    def may_degrade(self) -> bool:
        return not self.fixes if self.allow_degraded is None else self.allow_degraded

    @property
    def pins(self) -> bool:
        """Whether the program was said, so that nothing but its nodes is left to choose."""
        said = (self.mode, self.steps, self.handoff, self.small_steps, self.guidance, self.program)
        return any(value is not None for value in said)

    @property
    def words(self) -> dict[str, Any]:
        """What `RelayPipeline.plan` takes."""
        return {
            "num_inference_steps": self.steps, "handoff": self.handoff, "mode": self.mode, "small_steps": self.small_steps,
            "guidance_scale": self.guidance, "program": self.program, "width": self.width, "height": self.height,
        }  # fmt: skip


def read_request(body: Any) -> ImageRequest:
    """BadRequest names the field and what is wrong with it."""
    try:
        request = msgspec.convert(body, ImageRequest)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)) from None
    if not request.prompt.strip():
        raise BadRequest("the prompt is empty; say what the picture shall show")
    return request


def new_seed() -> int:
    return secrets.randbelow(2**31 - MAX_IMAGES)


def new_id(kind: str) -> str:
    """Not to be guessed: an id is part of what keeps one tenant's jobs from another."""
    return f"{kind}-{secrets.token_hex(10)}"
