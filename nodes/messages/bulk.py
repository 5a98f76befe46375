"""Bulk, on the data sockets: latents, embeddings, checkpoints, pictures, and what acknowledges them."""

from __future__ import annotations

from typing import Any, ClassVar

from nodes.messages.base import Message


class Fetch(Message, frozen=True, kw_only=True, tag="fetch"):
    """Whoever walks on -> whoever has the latent, data socket: answered with `Latent` as soon as it is there, or with
    `Embeddings`. `leg`: -1 for those, -2 for the job's checkpoint."""

    senders: ClassVar = ("edge", "device")
    job: str
    attempt: int
    leg: int


class Latent(Message, frozen=True, kw_only=True, tag="latent"):
    """The answer to `Fetch`, or a put. Payload: one handoff (relay.handoff, which proves itself)."""

    senders: ClassVar = ("edge", "device", "gateway")
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int
    leg: int


class Embeddings(Message, frozen=True, kw_only=True, tag="embeddings"):
    """Edge -> the walker of a later leg, once and ahead of the latent: embeddings of a program that ships conditioning.
    Payload: as relay.handoff writes conditioning."""

    senders: ClassVar = ("edge",)
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int


class Checkpoint(Message, frozen=True, kw_only=True, tag="checkpoint"):
    """Node -> gateway, or the edge that keeps them, data socket, at low priority. Payload: one handoff under way (latent,
    sigmas, index)."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (1, 2)
    job: str
    attempt: int
    leg: int
    index: int


class Preview(Message, frozen=True, kw_only=True, tag="preview"):
    """Node -> gateway, data socket. Payload: a small PNG of what the latent shows."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (1, 1)
    job: str
    attempt: int
    leg: int
    step: int


class Result(Message, frozen=True, kw_only=True, tag="result"):
    """Node -> gateway, data socket: the picture (payload: PNG; none with `keep_image`) and how it came about."""

    senders: ClassVar = ("edge", "device")
    payloads: ClassVar = (0, 2)
    job: str
    attempt: int
    width: int
    height: int
    report: dict[str, Any]


class Seen(Message, frozen=True, kw_only=True, tag="seen"):
    """The receiver of a `Latent`, `Embeddings`, a `Checkpoint` or a `Result` has it. Times across hosts come from these,
    by the sender's clock: send to seen, less the round trip, over the bytes is a throughput."""

    senders: ClassVar = ("edge", "device", "gateway")
    job: str
    attempt: int
    what: str
    leg: int = 0
    index: int = 0


class NotHere(Message, frozen=True, kw_only=True, tag="not-here"):
    """The answer to a `Fetch` or an embedding of a job that is not known here (any more)."""

    senders: ClassVar = ("edge", "gateway")
    job: str
    attempt: int
    leg: int
