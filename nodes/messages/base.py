"""What all messages share: their base, the limits and the roles."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from relay.errors import RelayError

# Bytes of frame 1. Decoding takes up to 80 times as much memory (an empty list per byte), and the garbage collector's time.
MAX_HEADER = 1 << 18
MAX_PAYLOAD = 256 << 20  # bytes of one payload: a latent of 4096 x 4096 with its embeddings, and room
MAX_FRAMES = 2 + 4

ROLES = ("gateway", "edge", "device", "client", "judge")


class MessageRefused(RelayError):
    """Bytes that are no message of this version, or one that its sender may not send; the text says which."""


class ForeignVersion(MessageRefused):
    """A message of another major version."""


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """`senders`: the roles that may send it. `payloads`: how many frames follow the header, at least and at most."""

    senders: ClassVar[tuple[str, ...]] = ()
    payloads: ClassVar[tuple[int, int]] = (0, 0)


class Numbered(Message, frozen=True, kw_only=True):
    """A question of an asker's, or the answer to one, which repeats its number. 0: not numbered."""

    ref: int = 0
