"""A message as frames, and back."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Union, get_args

import msgspec

from nodes.messages.asking import Accepted, Ask, CancelJob, Feedback, Probe, Probed, Refused, Submit, Told
from nodes.messages.base import MAX_FRAMES, MAX_HEADER, MAX_PAYLOAD, ForeignVersion, Message, MessageRefused
from nodes.messages.bulk import Checkpoint, Embeddings, Fetch, Latent, NotHere, Preview, Result, Seen
from nodes.messages.judging import JudgeHere, JudgeThis, KeptPicture, Scores, ToJudge
from nodes.messages.presence import Heartbeat, HeartbeatSeen, Leaving, Register, Registered
from nodes.messages.work import Allow, Assign, Busy, Cancel, Drain, Failed, Progress, Release, Taken

MAGIC, MAJOR, MINOR = b"RELAY", 1, 0
HEAD = struct.Struct("<5sHH")

Any_ = Union[  # noqa: UP007  # a tagged union for msgspec
    Register, Registered, Heartbeat, HeartbeatSeen, Leaving, Assign, Taken, Busy, Progress, Failed, Cancel, Release, Allow, Drain,
    Fetch, Latent, Embeddings, Checkpoint, Preview, Result, Seen, NotHere, JudgeHere, ToJudge, JudgeThis, KeptPicture, Scores,
    Submit, Accepted, Refused, Ask, CancelJob, Feedback, Told, Probe, Probed,
]  # fmt: skip
MESSAGES: tuple[type[Message], ...] = get_args(Any_)
_DECODER = msgspec.msgpack.Decoder(Any_)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message, payloads: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """The frames of a message. Payloads are passed through, not copied. MessageRefused if `decode` would refuse its size."""
    low, high = type(message).payloads
    assert low <= len(payloads) <= high, f"{type(message).__name__} with {len(payloads)} payloads"
    header = _ENCODER.encode(message)
    _check_sizes(header, payloads)
    return [HEAD.pack(MAGIC, MAJOR, MINOR), header, *payloads]


def decode(frames: Sequence[bytes | memoryview]) -> tuple[Message, list[bytes | memoryview]]:
    """The message and its payloads. MessageRefused says what is wrong; nothing is allocated for what is too long."""
    if not 2 <= len(frames) <= MAX_FRAMES:
        raise MessageRefused(f"a message has 2 to {MAX_FRAMES} frames, not {len(frames)}")
    head, header, *payloads = frames
    if len(head) != HEAD.size or bytes(head[:5]) != MAGIC:
        raise MessageRefused("not a relay message")
    _, major, minor = HEAD.unpack(head)
    if major != MAJOR:
        raise ForeignVersion(
            f"the peer speaks version {major}.{minor}, this node {MAJOR}.{MINOR}: upgrade the older one"
        )
    _check_sizes(header, payloads)
    try:
        message: Message = _DECODER.decode(header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageRefused(f"not a message of version {major}.{minor}: {error}") from None
    low, high = type(message).payloads
    if not low <= len(payloads) <= high:
        raise MessageRefused(f"{name_of(message)} came with {len(payloads)} payloads")
    return message, payloads


def _check_sizes(header: bytes | memoryview, payloads: Sequence[bytes | memoryview]) -> None:
    if len(header) > MAX_HEADER:
        raise MessageRefused(f"a header of {len(header)} bytes is over the limit of {MAX_HEADER}")
    for payload in payloads:
        if (size := size_of(payload)) > MAX_PAYLOAD:
            raise MessageRefused(f"a payload of {size} bytes is over the limit of {MAX_PAYLOAD}")


def size_of(frame: bytes | memoryview) -> int:
    """Bytes of a frame; `len` counts the elements of a memoryview, whatever their size."""
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def name_of(message: Message) -> str:
    """Its name on the wire."""
    return str(type(message).__struct_config__.tag)


def seen_of(message: Latent | Embeddings | Checkpoint | Result) -> Seen:
    """What acknowledges it."""
    leg, index = getattr(message, "leg", 0), getattr(message, "index", 0)
    return Seen(job=message.job, attempt=message.attempt, what=name_of(message), leg=leg, index=index)
