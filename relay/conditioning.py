"""Conditioning: prompts as the embeddings that diffusers' own pipelines feed their denoisers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any

import msgspec
import torch

from relay.errors import BadRequest
from relay.fingerprint import thumbnail_distance

PROBE_PROMPT = "a red circle"
THUMBNAIL_TOLERANCE = 0.05  # relative RMS; bf16 encoders stay below 0.01, another encoder is at 1


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of B prompts. Negatives are there only where some leg is guided, `time_ids` only for SDXL."""

    prompt_embeds: torch.Tensor  # (B, L, D)
    pooled: torch.Tensor  # (B, P)
    negative_embeds: torch.Tensor | None = None  # (B, L, D)
    negative_pooled: torch.Tensor | None = None  # (B, P)
    time_ids: torch.Tensor | None = None  # (B, 6) float32: original height, width, crop top, left, target height, width

    def __len__(self) -> int:
        return len(self.prompt_embeds)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by name, in a fixed order."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: tensor for name, tensor in named if tensor is not None}

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        """Embeddings on `device` in `dtype`; time ids stay float32, for bf16 does not hold every size."""
        return Conditioning(
            **{k: v.to(device, v.dtype if k == "time_ids" else dtype) for k, v in self.tensors().items()}
        )

    def select(self, indices: Sequence[int] | torch.Tensor) -> Conditioning:
        """The given rows, in the given order; a row may be taken more than once."""
        return Conditioning(**{k: v[torch.as_tensor(indices, device=v.device)] for k, v in self.tensors().items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of several; BadRequest where they do not hold the same tensors."""
        names = parts[0].tensors().keys()
        if any(part.tensors().keys() != names for part in parts):
            raise BadRequest("guided and unguided conditioning cannot share a batch: encode both with guidance")
        return Conditioning(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})

    def digest(self) -> str:
        """blake2b-128 over names, dtypes, shapes and bytes, as hex."""
        digest = blake2b(digest_size=16)
        for name, tensor in self.tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def prompt_digest(prompts: Sequence[str], negative: Sequence[str] | None) -> str:
    """blake2b-128 of the texts, as hex: what stands for the conditioning where the receiver encodes it again."""
    texts = json.dumps([list(prompts), None if negative is None else list(negative)])
    return blake2b(texts.encode(), digest_size=16).hexdigest()


class TextEncoder:
    """Prompts to conditioning, through the `encode_prompt` of a diffusers pipeline that holds only the text side.

    `t5_tokens`: SD3's `max_sequence_length`; default 256 with a T5 and 0 without one, where diffusers' own default
    appends 256 zero tokens that cost attention and say nothing.
    """

    def __init__(self, pipeline: Any, device: torch.device | str = "cpu", t5_tokens: int | None = None):
        self.pipeline = pipeline
        self.device = torch.device(device)
        self.is_sd3 = hasattr(pipeline, "tokenizer_3")
        if t5_tokens is None:
            t5_tokens = 256 if self.is_sd3 and pipeline.text_encoder_3 is not None else 0
        self.t5_tokens = t5_tokens

    @torch.inference_mode()
    def encode(
        self, prompts: Sequence[str], negative: Sequence[str] | None, guidance: bool, size: tuple[int, int]
    ) -> Conditioning:
        """Conditioning of B prompts, for images of `size` (width, height); negatives only if `guidance`.

        `negative` None is the pipelines' own default: "" for SD3; zeros or "" for SDXL, as its config says.
        Equal prompts are encoded once.
        """
        pairs = list(zip(prompts, negative if negative is not None else [None] * len(prompts), strict=True))
        unique = list(dict.fromkeys(pairs))
        texts = [prompt for prompt, _ in unique]
        options: dict[str, Any] = {"prompt_3": None, "max_sequence_length": self.t5_tokens} if self.is_sd3 else {}
        embeds, negative_embeds, pooled, negative_pooled = self.pipeline.encode_prompt(
            texts,
            prompt_2=None,
            device=self.device,
            do_classifier_free_guidance=guidance,
            negative_prompt=None if negative is None else [text for _, text in unique],
            **options,
        )
        if not guidance:
            negative_embeds = negative_pooled = None
        time_ids = None
        if not self.is_sd3:
            width, height = size
            time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(unique), dtype=torch.float32)
            time_ids = time_ids.to(self.device)
        conditioning = Conditioning(embeds, pooled, negative_embeds, negative_pooled, time_ids)
        return conditioning.select([unique.index(pair) for pair in pairs])


class ConditioningFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says "same text conditioning": token count, widths, and a thumbnail of a probe prompt's embeddings."""

    tokens: int
    width: int
    pooled_width: int
    thumbnail: tuple[float, ...]  # 32 means over the prompt embeddings, 32 over the pooled ones


def conditioning_fingerprint(encoder: TextEncoder) -> ConditioningFingerprint:
    """Fingerprint of a text side; compared only where embeddings are shipped."""
    probe = encoder.encode([PROBE_PROMPT], None, False, (64, 64))
    means = [
        torch.nn.functional.adaptive_avg_pool1d(part.float().cpu().reshape(1, 1, -1), 32).flatten()
        for part in (probe.prompt_embeds, probe.pooled)
    ]
    _, tokens, width = probe.prompt_embeds.shape
    return ConditioningFingerprint(tokens, width, probe.pooled.shape[1], tuple(torch.cat(means).tolist()))


def compatible(ours: ConditioningFingerprint, theirs: ConditioningFingerprint) -> str | None:
    """None where the two text sides agree, else the reason why not."""
    for name in ("tokens", "width", "pooled_width"):
        if getattr(ours, name) != getattr(theirs, name):
            return f"conditioning {name} {getattr(theirs, name)}, expected {getattr(ours, name)}"
    if len(ours.thumbnail) != len(theirs.thumbnail):
        return "conditioning thumbnail of another length"
    distance = thumbnail_distance(ours.thumbnail, theirs.thumbnail)
    if not distance <= THUMBNAIL_TOLERANCE:
        return f"conditioning thumbnails {distance:.3f} apart, tolerance {THUMBNAIL_TOLERANCE}: other text encoders"
    return None
