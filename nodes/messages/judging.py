"""Judging: pictures to score, and their scores."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from nodes.messages.base import Message


class JudgeHere(Message, frozen=True, kw_only=True, tag="judge-here"):
    """Judge -> gateway, data socket, every second and when it becomes free. `ask`: the number of this asking for a
    picture, 0 while it is busy; each number is answered once, with `ToJudge`."""

    senders: ClassVar = ("judge",)
    session: str  # new at every start of the process
    ask: int
    doing: str
    judged: int = 0
    columns: tuple[str, ...] = ()  # scores that it can give
    memory_bytes: int = 0
    last_error: str | None = None


class ToJudge(Message, frozen=True, kw_only=True, tag="to-judge"):
    """Gateway -> judge: a picture (payload: PNG), what it shall show and the program that drew it. Answered with `Scores`."""

    senders: ClassVar = ("gateway",)
    payloads: ClassVar = (1, 1)
    job: str
    prompt: str
    program: str


class JudgeThis(Message, frozen=True, kw_only=True, tag="judge-this"):
    """Gateway -> the device that finished a job: its scores, or its picture for judging, as the device's config allows.
    Answered with `Scores` or `KeptPicture`."""

    senders: ClassVar = ("gateway",)
    job: str


class KeptPicture(Message, frozen=True, kw_only=True, tag="kept-picture"):
    """Device -> gateway, data socket: a picture (payload: PNG) that it keeps and shares for judging."""

    senders: ClassVar = ("device",)
    payloads: ClassVar = (1, 2)
    job: str


class Scores(Message, frozen=True, kw_only=True, tag="scores"):
    """Whoever was asked to judge a job -> gateway. `missing`: metric -> why it gave none. `reason`: why there are none."""

    senders: ClassVar = ("judge", "device")
    job: str
    scores: dict[str, float] = msgspec.field(default_factory=dict)
    missing: dict[str, str] = msgspec.field(default_factory=dict)
    seconds: float = 0.0  # that scoring took
    reason: str = ""
