"""Askers, `relay submit` or a device's own user: questions and answers; probes of `relay doctor`."""

from __future__ import annotations

from typing import Any, ClassVar

from nodes.messages.base import Message, Numbered


class Submit(Numbered, frozen=True, kw_only=True, tag="submit"):
    """Client or device -> gateway (client -> device for its own user): one request of `images` pictures."""

    senders: ClassVar = ("client", "device")
    request: dict[str, Any]  # nodes.requests.ImageRequest
    idempotency_key: str | None = None


class Accepted(Numbered, frozen=True, kw_only=True, tag="accepted"):
    """It is in the ledger: it will end in pictures or an error."""

    senders: ClassVar = ("gateway", "device")
    request: str
    jobs: tuple[str, ...]


class Refused(Numbered, frozen=True, kw_only=True, tag="refused"):
    """It is not done, and why. `status` is HTTP's; `retry_after_s` where trying again makes sense. `what`, `job`, `ref`:
    of the message that is refused, as far as they could be read."""

    senders: ClassVar = ("gateway", "edge", "device")
    reason: str
    status: int = 400
    retry_after_s: float | None = None
    what: str = ""  # its name on the wire
    job: str = ""


class Ask(Numbered, frozen=True, kw_only=True, tag="ask"):
    """Client or device -> gateway: something to read (`what`: job, image, status, trace, jobs), answered by `Told`."""

    senders: ClassVar = ("client", "device")
    what: str
    job: str = ""
    wait_s: float = 0.0  # for a job: answer when it ends or this is over


class CancelJob(Numbered, frozen=True, kw_only=True, tag="cancel-job"):
    """Asker -> gateway."""

    senders: ClassVar = ("client", "device")
    job: str


class Feedback(Numbered, frozen=True, kw_only=True, tag="feedback"):
    """Asker -> gateway: what it thinks of a job's picture, 0 (useless) to 1 (just right); answered by `Told`."""

    senders: ClassVar = ("client", "device")
    job: str
    rating: float
    comment: str | None = None


class Told(Numbered, frozen=True, kw_only=True, tag="told"):
    """The answer to `Ask`. Payload: the image where that was asked for."""

    senders: ClassVar = ("gateway", "device")
    payloads: ClassVar = (0, 1)
    what: str
    value: Any = None


class Probe(Message, frozen=True, kw_only=True, tag="probe"):
    """Anyone -> anyone, `relay doctor --peer`: comes back as `Probed` with as many payload bytes as it brought."""

    senders: ClassVar = ("client", "edge", "device", "gateway")
    payloads: ClassVar = (0, 1)
    sequence: int


class Probed(Message, frozen=True, kw_only=True, tag="probed"):
    """The answer to `Probe`."""

    senders: ClassVar = ("gateway", "edge", "device")
    payloads: ClassVar = (0, 1)
    sequence: int
    name: str
    version: str
