"""What a bandit has learned, as a file: versioned, checksummed, whole or not at all.

    relay-bandit 1\\n
    {"features": 1, "arguments": [...], "time_scale_s": 1.0, "learned": 812, "bytes": 7136, "checksum": "..."}\\n
    BYTES                   Vowpal Wabbit's own model

The checksum is over header (its own field empty) and model. Vowpal Wabbit itself loads a truncated model without a word.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from relay.errors import BadRequest
from relay.files import write_atomically

_MAGIC = b"relay-bandit 1\n"
_START = b"relay-bandit "


class BanditFile(msgspec.Struct, frozen=True, kw_only=True):
    features: int
    arguments: list[str]
    time_scale_s: float
    learned: int
    model: bytes


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    features: int
    arguments: list[str]
    time_scale_s: float
    learned: int
    bytes: int
    checksum: str = ""


def write_bandit(path: Path, file: BanditFile) -> None:
    """On the disk when this returns. OSError where the disk does not take it; what was there before stays."""
    header = _Header(
        features=file.features, arguments=file.arguments, time_scale_s=file.time_scale_s, learned=file.learned,
        bytes=len(file.model),
    )  # fmt: skip
    signed = msgspec.structs.replace(header, checksum=_checksum(header, file.model))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _MAGIC + msgspec.json.encode(signed) + b"\n" + file.model, sync=True)


def read_bandit(path: Path) -> BanditFile:
    """BadRequest, in one line, on a file that is damaged, foreign, or of another version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadRequest(f"{path} cannot be read: {error.strerror}") from None
    if not data.startswith(_MAGIC):
        said = "is of another version of the program" if data.startswith(_START) else "is no bandit's file"
        raise BadRequest(f"{path} {said}: start without it")
    head, found, model = data[len(_MAGIC) :].partition(b"\n")
    try:
        header = msgspec.json.decode(head, type=_Header)
    except msgspec.DecodeError:
        raise BadRequest(f"{path} is damaged: its header cannot be read; start without it") from None
    unsigned = msgspec.structs.replace(header, checksum="")
    if not found or len(model) != header.bytes or _checksum(unsigned, model) != header.checksum:
        raise BadRequest(f"{path} is damaged: its checksum does not fit; start without it")
    return BanditFile(
        features=header.features, arguments=header.arguments, time_scale_s=header.time_scale_s, learned=header.learned,
        model=model,
    )  # fmt: skip


def _checksum(header: _Header, model: bytes) -> str:
    return hashlib.blake2b(msgspec.json.encode(header) + b"\n" + model, digest_size=20).hexdigest()
