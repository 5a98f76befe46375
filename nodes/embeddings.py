"""Conditioning on its way to another node: safetensors, with what proves it in the metadata. Nothing is unpickled."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from relay.errors import HandoffRefused

if TYPE_CHECKING:
    from relay.conditioning import Conditioning
    from relay.family import Family
    from relay.request import Job


def pack(cond: Conditioning, family: Family, job: Job) -> bytes:
    """The embeddings of one image's prompt."""
    import msgspec
    from safetensors.torch import save

    from relay.conditioning import prompt_digest

    said = {
        "digest": cond.digest(),
        "prompts": prompt_digest(job.prompts, job.negatives),
        "fingerprint": json.dumps(msgspec.to_builtins(family.conditioning_fingerprint)),
    }
    return save({name: tensor.contiguous().cpu() for name, tensor in cond.tensors().items()}, said)


def unpack(data: bytes | memoryview, family: Family, job: Job) -> Conditioning:
    """HandoffRefused where they are damaged, of another prompt, or of another text side than this family's."""
    import msgspec
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from relay.conditioning import Conditioning, ConditioningFingerprint, compatible, prompt_digest

    raw = bytes(data)
    try:
        tensors = load(raw)
        length = int.from_bytes(raw[:8], "little")
        said = json.loads(raw[8 : 8 + length])["__metadata__"]
        theirs = msgspec.convert(json.loads(said["fingerprint"]), ConditioningFingerprint)
        cond = Conditioning(**tensors)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise HandoffRefused(f"embeddings cannot be read: {error}") from None
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise HandoffRefused("embeddings hold non-finite values")
    if cond.digest() != said.get("digest"):
        raise HandoffRefused("embeddings are not what their digest says")
    if said.get("prompts") != prompt_digest(job.prompts, job.negatives):
        raise HandoffRefused("embeddings are of another prompt")
    if reason := compatible(family.conditioning_fingerprint, theirs):
        raise HandoffRefused(f"embeddings are foreign to family {family.name}: {reason}")
    return cond
