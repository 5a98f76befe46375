"""Every message that travels between nodes: one data class each, and how all of them lie on the wire.

    frame 0   magic b"RELAY", u16 major, u16 minor   little-endian, 9 bytes
    frame 1   msgpack of one message, {"type": NAME, field: value, ...}
    frame 2.. payloads, raw bytes, as many as the message's docstring says (`payloads`); behind those of a data message
              one more may follow, of zeros, which brings it to a real family's size on a scaled link

Versions: nodes talk to each other if their major is the same. A minor adds fields with defaults and messages that an
older node may leave unanswered: unknown fields are ignored, missing ones take their default, an unknown type is refused
by name. Who sent a message is read from its connection's key; no field says it.

Control and data use separate sockets. On the control sockets (gateway ROUTER, node DEALER) travel small messages
without payload; on the data sockets (gateway and edge ROUTER, everyone else's DEALER) those that carry latents, images
or embeddings.

base.py: what all share. presence.py, work.py, bulk.py, judging.py, asking.py: the messages. wire.py: frames and back. No
file here knows a socket.
"""

from __future__ import annotations

from nodes.messages.asking import Accepted, Ask, CancelJob, Feedback, Probe, Probed, Refused, Submit, Told
from nodes.messages.base import (
    MAX_FRAMES,
    MAX_HEADER,
    MAX_PAYLOAD,
    ROLES,
    ForeignVersion,
    Message,
    MessageRefused,
    Numbered,
)
from nodes.messages.bulk import Checkpoint, Embeddings, Fetch, Latent, NotHere, Preview, Result, Seen
from nodes.messages.judging import JudgeHere, JudgeThis, KeptPicture, Scores, ToJudge
from nodes.messages.presence import Heartbeat, HeartbeatSeen, Holding, Leaving, PeerStats, Register, Registered
from nodes.messages.wire import MAGIC, MAJOR, MESSAGES, MINOR, decode, encode, name_of, seen_of, size_of
from nodes.messages.work import Allow, Assign, Busy, CacheUse, Cancel, Drain, Failed, Progress, Release, Source, Taken

__all__ = [
    "MAGIC",
    "MAJOR",
    "MAX_FRAMES",
    "MAX_HEADER",
    "MAX_PAYLOAD",
    "MESSAGES",
    "MINOR",
    "ROLES",
    "Accepted",
    "Allow",
    "Ask",
    "Assign",
    "Busy",
    "CacheUse",
    "Cancel",
    "CancelJob",
    "Checkpoint",
    "Drain",
    "Embeddings",
    "Failed",
    "Feedback",
    "Fetch",
    "ForeignVersion",
    "Heartbeat",
    "HeartbeatSeen",
    "Holding",
    "JudgeHere",
    "JudgeThis",
    "KeptPicture",
    "Latent",
    "Leaving",
    "Message",
    "MessageRefused",
    "NotHere",
    "Numbered",
    "PeerStats",
    "Preview",
    "Probe",
    "Probed",
    "Progress",
    "Refused",
    "Register",
    "Registered",
    "Release",
    "Result",
    "Scores",
    "Seen",
    "Source",
    "Submit",
    "Taken",
    "ToJudge",
    "Told",
    "decode",
    "encode",
    "name_of",
    "seen_of",
    "size_of",
]
