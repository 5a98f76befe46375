"""Handoff: what carries a latent from one leg to the next, as an object and as bytes.

Frame layout, integers little-endian:

    0        6   magic b"RELAY\\0"
    6        2   u16 version
    8        8   u64 length of the whole message
    16       4   u32 length of the header, H
    20       H   msgpack header (`Header`): everything but the tensors
    20 + H       latent, as the program's codec writes it
    ...          conditioning tensors in the header's order, in their own dtype ("ship" only)
    end - 32 32  blake2b-256 of everything before

The checksum proves that a message is whole, not who sent it: that is the connection's business.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import msgspec
import torch

from relay import codecs, conditioning
from relay.conditioning import Conditioning, ConditioningFingerprint, prompt_digest
from relay.errors import HandoffRefused, RelayError
from relay.fingerprint import Fingerprint, compatible
from relay.program import Program

if TYPE_CHECKING:
    from relay.family import Family

MAGIC, VERSION = b"RELAY\0", 1
MAX_HEADER, MAX_TOTAL = 1 << 20, 256 << 20
_PREFIX = struct.Struct("<6sHQI")
_CHECKSUM = 32
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Frame(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    dtype: str
    shape: tuple[int, ...]


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    program: str
    leg_index: int
    shape: tuple[int, int, int, int]
    codec: str
    sigmas_walked: list[float]
    index: int
    sigma: float
    fingerprint: Fingerprint
    conditioning_digest: str
    conditioning_fingerprint: ConditioningFingerprint | None
    conditioning: list[Frame]
    prompts: list[str]
    negative_prompts: list[str] | None
    seeds: list[int | None]
    width: int
    height: int
    meta: dict[str, str]


@dataclass
class Handoff:
    """A latent somewhere along a program.

    `leg_index` legs are done. `sigmas_walked` is the whole list of the leg that was walked last and `index` the
    position reached in it: at its end that leg is `leg_index - 1` and leg `leg_index` comes next; before its end leg
    `leg_index` is under way, which is a checkpoint. The receiver does the matching.
    """

    program: str
    leg_index: int
    latent: torch.Tensor  # (B, C, h, w) float32, noisy at `sigma`
    sigmas_walked: list[float]
    index: int
    fingerprint: Fingerprint
    codec: str
    prompts: list[str]
    width: int
    height: int
    negative_prompts: list[str] | None = None
    seeds: list[int | None] = field(default_factory=list)
    conditioning: Conditioning | None = None  # inside only where the program ships it
    conditioning_digest: str = ""  # of the tensors where they are shipped, else of the prompts
    conditioning_fingerprint: ConditioningFingerprint | None = None
    meta: dict[str, str] = field(default_factory=dict)
    received: bool = field(default=False, compare=False)  # it came as bytes, so the codec has done its rounding

    @property
    def sigma(self) -> float:
        return self.sigmas_walked[self.index]

    @property
    def under_way(self) -> bool:
        """Whether leg `leg_index` has been begun."""
        return self.index < len(self.sigmas_walked) - 1

    def to_bytes(self) -> bytes:
        """The message; BadRequest where the codec cannot hold the latent."""
        tensors = self.conditioning.tensors() if self.conditioning is not None else {}
        header = msgspec.msgpack.encode(
            Header(
                **{name: getattr(self, name) for name in _PLAIN},
                shape=tuple(self.latent.shape),  # type: ignore[arg-type]
                conditioning=[
                    Frame(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                    for name, tensor in tensors.items()
                ],
            )
        )
        frames = [codecs.encode(self.latent, self.codec), *map(codecs.tensor_bytes, tensors.values())]
        total = _PREFIX.size + len(header) + sum(map(len, frames)) + _CHECKSUM
        body = b"".join([_PREFIX.pack(MAGIC, VERSION, total, len(header)), header, *frames])
        return body + blake2b(body, digest_size=_CHECKSUM).digest()

    @classmethod
    def from_bytes(cls, buffer: bytes | bytearray | memoryview) -> Handoff:
        """Inverse of `to_bytes`, up to the codec's rounding. HandoffRefused, before a byte is used, on anything off."""
        message = memoryview(buffer).cast("B")
        header_length = _check_envelope(message)
        try:
            header = msgspec.msgpack.decode(message[_PREFIX.size : _PREFIX.size + header_length], type=Header)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise HandoffRefused(f"handoff header cannot be read: {error}") from None
        _check_header(header)

        frames, offset = [], _PREFIX.size + header_length
        for length in _frame_lengths(header):
            frames.append(message[offset : offset + length])
            offset += length
        if offset != len(message) - _CHECKSUM:
            raise HandoffRefused("handoff frames do not fill the message that its header describes")
        tensors = {
            frame.name: codecs.bytes_tensor(data, _DTYPES[frame.dtype], frame.shape)
            for frame, data in zip(header.conditioning, frames[1:], strict=True)
        }
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise HandoffRefused("handoff conditioning holds non-finite values")
        shipped = Conditioning(**tensors) if tensors else None
        digest = shipped.digest() if shipped else prompt_digest(header.prompts, header.negative_prompts)
        if digest != header.conditioning_digest:
            raise HandoffRefused("handoff conditioning is not what its digest says")
        return cls(
            **{name: getattr(header, name) for name in _PLAIN if name != "sigma"},
            latent=codecs.decode(frames[0], header.codec, header.shape),
            conditioning=shipped,
            received=True,
        )


_PLAIN = tuple(name for name in Header.__struct_fields__ if name not in ("shape", "conditioning"))


def accept(handoff: Handoff, family: Family) -> Program:
    """The handoff's program, once `family` is shown to share its latent space; HandoffRefused otherwise."""
    program = Program.parse(handoff.program)
    if program.family != family.name:
        raise HandoffRefused(f"handoff of family {program.family}, but this is {family.name}")
    reason = compatible(family.fingerprint, handoff.fingerprint)
    if reason is None and handoff.conditioning is not None:
        if handoff.conditioning_fingerprint is None:
            reason = "shipped conditioning without a fingerprint"
        else:
            reason = conditioning.compatible(family.conditioning_fingerprint, handoff.conditioning_fingerprint)
    if reason is not None:
        raise HandoffRefused(f"handoff is foreign to family {family.name}: {reason}")
    return program


def _check_envelope(message: memoryview) -> int:
    """Length of the header, once size, magic, version, lengths and checksum hold."""
    if not _PREFIX.size + _CHECKSUM < len(message) <= MAX_TOTAL:
        raise HandoffRefused(f"handoff of {len(message)} bytes: too short to be one, or above {MAX_TOTAL >> 20} MiB")
    magic, version, total, header_length = _PREFIX.unpack(message[: _PREFIX.size])
    if magic != MAGIC:
        raise HandoffRefused("not a handoff: the magic is missing")
    if version != VERSION:
        raise HandoffRefused(f"handoff of version {version}, but this program reads version {VERSION}")
    if total != len(message):
        raise HandoffRefused(f"handoff of {len(message)} bytes says it has {total}: it was cut or extended")
    if header_length > min(MAX_HEADER, total - _PREFIX.size - _CHECKSUM):
        raise HandoffRefused(f"handoff header of {header_length} bytes does not fit")
    if blake2b(message[:-_CHECKSUM], digest_size=_CHECKSUM).digest() != message[-_CHECKSUM:]:
        raise HandoffRefused("handoff checksum does not match: it was damaged or changed")
    return header_length


def _check_header(header: Header) -> None:
    """Refuse a header whose parts contradict each other."""
    try:
        program = Program.parse(header.program)
    except RelayError as error:
        raise HandoffRefused(f"handoff: {error}") from None
    sigmas, shape, print_ = header.sigmas_walked, header.shape, header.fingerprint
    images = shape[0]
    if min(shape) < 1:
        raise HandoffRefused(f"handoff latent of shape {shape} is empty")
    if not (len(sigmas) > 1 and all(a > b for a, b in pairwise(sigmas)) and sigmas[-1] >= 0):
        raise HandoffRefused("handoff sigmas do not descend")
    if not (math.isfinite(sigmas[0]) and 0 <= header.index < len(sigmas) and header.sigma == sigmas[header.index]):
        raise HandoffRefused("handoff sigma and index do not lie on its list of sigmas")
    leg = header.leg_index - (header.index == len(sigmas) - 1)
    if not (0 <= leg < len(program.legs) and len(sigmas) == program.legs[leg].steps + 1):
        raise HandoffRefused(f"handoff at leg {header.leg_index} does not lie on its program {program}")
    under_way = header.index < len(sigmas) - 1  # a checkpoint may be finer than the wire: it stands for no handoff
    if header.codec != program.codec and not (under_way and header.codec == "fp32"):
        raise HandoffRefused(f"handoff codec {header.codec} is not its program's, {program}")
    if header.conditioning and program.conditioning != "ship":  # shipped conditioning may also travel apart, and ahead
        raise HandoffRefused(f"handoff conditioning is not its program's, {program}")
    pixels = (shape[3] * print_.factor, shape[2] * print_.factor)
    if shape[1] != print_.channels or pixels != (header.width, header.height):
        raise HandoffRefused(
            f"handoff latent {shape} is not {print_.channels} channels of {header.width}x{header.height} pixels"
        )
    negative = header.prompts if header.negative_prompts is None else header.negative_prompts
    if any(len(each) != images for each in (header.prompts, header.seeds, negative)):
        raise HandoffRefused(f"handoff of {images} latents does not bring as many prompts and seeds")
    frames = {frame.name: frame for frame in header.conditioning}
    for frame in frames.values():
        ranks = {"prompt_embeds": 3, "pooled": 2, "negative_embeds": 3, "negative_pooled": 2, "time_ids": 2}
        if ranks.get(frame.name) != len(frame.shape) or frame.dtype not in _DTYPES:
            raise HandoffRefused(f"handoff conditioning {frame.name} of {frame.dtype} {frame.shape} is not known")
        if min(frame.shape) < 1 or frame.shape[0] != images:
            raise HandoffRefused(f"handoff conditioning {frame.name} is not for {images} latents")
    complete = {"prompt_embeds", "pooled"} <= frames.keys()
    if len(frames) != len(header.conditioning) or (frames and not complete):
        raise HandoffRefused("handoff conditioning is incomplete or doubled")
    if sum(_frame_lengths(header)) > MAX_TOTAL:
        raise HandoffRefused("handoff frames do not fill the message that its header describes")


def _frame_lengths(header: Header) -> list[int]:
    shipped = [prod(frame.shape) * _DTYPES[frame.dtype].itemsize for frame in header.conditioning]
    return [codecs.payload_bytes(header.codec, header.shape), *shipped]
