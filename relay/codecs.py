"""Codecs: a latent as bytes. Little-endian, C order, no header: the handoff says which codec and shape.

fp32, fp16, bf16 are casts. int8 is affine per sample and channel: float32 scales (B, C), float32 offsets (B, C), then
uint8 q (B, C, h, w), with x = offset + scale q.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from relay.errors import BadRequest, HandoffRefused
from relay.program import CODECS, check_choice

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TINY = torch.finfo(torch.float32).tiny
# relative rounding error and half the smallest subnormal
_ROUNDING = {"fp32": (0.0, 0.0), "fp16": (2.0**-11, 2.0**-25), "bf16": (2.0**-8, 2.0**-134)}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's values as they lie in memory, little-endian on every platform that torch has wheels for."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def bytes_tensor(buffer: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `tensor_bytes`; the tensor owns its memory, whatever becomes of the buffer."""
    return torch.frombuffer(bytearray(buffer), dtype=dtype).view(*shape)


def encode(x: torch.Tensor, name: str) -> bytes:
    """Payload of x (B, C, h, w). BadRequest on values that the codec cannot hold."""
    check_choice("codec", name, CODECS)
    x = x.detach().float().cpu()
    if not torch.isfinite(x).all():
        raise BadRequest(f"codec {name} refuses a latent with non-finite values")
    if name == "int8":
        low = x.amin((2, 3), keepdim=True)
        scale = _scale(x)
        q = ((x.double() - low) / scale.double()).round().clamp(0, 255).to(torch.uint8)
        return tensor_bytes(scale) + tensor_bytes(low) + tensor_bytes(q)
    cast = x.to(DTYPES[name])
    if not torch.isfinite(cast).all():
        raise BadRequest(f"the latent reaches {x.abs().max():.4g}, out of {name}'s range: use codec fp32")
    return tensor_bytes(cast)


def decode(buffer: bytes | memoryview, name: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 latent (B, C, h, w) in memory of its own. HandoffRefused where length or values do not fit."""
    check_choice("codec", name, CODECS)
    if len(buffer) != payload_bytes(name, shape):
        raise HandoffRefused(f"{name} payload of {len(buffer)} bytes, but shape {tuple(shape)} needs another length")
    if name == "int8":
        table = 4 * shape[0] * shape[1]
        scale, low = (
            bytes_tensor(part, torch.float32, (*shape[:2], 1, 1)).double()
            for part in (buffer[:table], buffer[table : 2 * table])
        )
        # double, because scale * q may pass the float32 range where the sum does not
        x = (low + scale * bytes_tensor(buffer[2 * table :], torch.uint8, shape)).float()
    else:
        x = bytes_tensor(buffer, DTYPES[name], shape).float()
    if not torch.isfinite(x).all():
        raise HandoffRefused("the latent holds non-finite values")
    return x


def payload_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes that a latent of this shape takes."""
    if name == "int8":
        return prod(shape) + 8 * shape[0] * shape[1]
    return prod(shape) * DTYPES[name].itemsize


def error_bound(name: str, x: torch.Tensor) -> torch.Tensor:
    """Largest |decode(encode(x)) - x| per value, shaped like x."""
    x = x.detach().float().cpu()
    if name == "int8":
        rounding = torch.finfo(torch.float32).eps * x.abs().amax((2, 3), keepdim=True)
        return (_scale(x) * (0.5 + 1e-3) + rounding).expand_as(x)  # 1e-3: the scale itself is rounded to float32
    relative, absolute = _ROUNDING[name]
    return x.abs() * relative + absolute


def _scale(x: torch.Tensor) -> torch.Tensor:
    """int8 step (B, C, 1, 1): a 255th of the range, kept a normal number so that it can be divided by."""
    range_ = x.double().amax((2, 3), keepdim=True) - x.double().amin((2, 3), keepdim=True)
    return (range_ / 255).float().clamp_min(_TINY)
