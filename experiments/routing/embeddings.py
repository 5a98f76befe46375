"""Prompt embeddings for the routers that are compared: a family's own text encoder, run once and kept in a file.

Only real tokens are kept, end to end (no padding), so prompts of a T5 with 256 places cost what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relay.files import replacing

if TYPE_CHECKING:
    from relay.family import Family

BATCH = 64


@dataclass(frozen=True)
class Embeddings:
    """Of N prompts: `tokens` (all real tokens of all prompts, D), `ends` (N,) where each prompt's end, `pooled` (N, P)."""

    prompts: tuple[str, ...]
    tokens: NDArray[np.float16]
    ends: NDArray[np.int64]
    pooled: NDArray[np.float32]

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

    def rows(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Where the given prompts stand; KeyError for one that was not embedded."""
        where = {prompt: i for i, prompt in enumerate(self.prompts)}
        return np.array([where[prompt] for prompt in prompts], dtype=np.int64)

    def padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Tokens (B, L, D) of the given rows with zeros after each prompt's end, and which are real (B, L)."""
        starts = np.concatenate([[0], self.ends[:-1]])
        lengths = (self.ends - starts)[rows]
        out = np.zeros((len(rows), int(lengths.max()), self.width), dtype=np.float32)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            out[i, :length] = self.tokens[starts[row] : starts[row] + length]
        return out, np.arange(out.shape[1]) < lengths[:, None]


def embed(family: Family, prompts: Sequence[str]) -> Embeddings:
    """Run the family's text side over the prompts."""
    tokens: list[NDArray[np.float16]] = []
    pooled = []
    size = family.spec.sizes.default
    for at in range(0, len(prompts), BATCH):
        part = list(prompts[at : at + BATCH])
        found = family.text.encode(part, None, False, size)
        embeds = found.prompt_embeds.float().cpu().numpy()
        real = _real_tokens(family, part, embeds.shape[1])
        tokens += [row[there].astype(np.float16) for row, there in zip(embeds, real, strict=True)]
        pooled.append(found.pooled.float().cpu().numpy())
    ends = np.cumsum([len(each) for each in tokens])
    return Embeddings(tuple(prompts), np.concatenate(tokens), ends, np.concatenate(pooled))


def embeddings_of(family_name: str, prompts: Sequence[str], folder: Path) -> Embeddings:
    """The prompts' embeddings out of `folder`, made there where they are not."""
    prompts = tuple(dict.fromkeys(prompts))
    digest = blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()
    path = folder / f"{Path(family_name).stem}-{digest}.npz"
    if not path.exists():
        from relay.family import Family

        made = embed(Family.load(family_name), prompts)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(file, tokens=made.tokens, ends=made.ends, pooled=made.pooled)
    with np.load(path) as stored:
        return Embeddings(prompts, stored["tokens"], stored["ends"], stored["pooled"])


def _real_tokens(family: Family, prompts: list[str], places: int) -> NDArray[np.bool_]:
    """(B, places): which embeddings stand for a token of the prompt; CLIP's come first, a T5's after them."""
    pipeline: Any = family.text.pipeline
    clip = getattr(pipeline, "tokenizer", None) or pipeline.tokenizer_2
    first = places - family.text.t5_tokens
    masks = [_mask(clip, prompts, first)]
    if family.text.t5_tokens:
        t5 = getattr(pipeline, "tokenizer_3", None)
        masks.append(_mask(t5, prompts, family.text.t5_tokens))
    return np.concatenate(masks, axis=1)


def _mask(tokenizer: Any, prompts: list[str], places: int) -> NDArray[np.bool_]:
    counts = [len(ids) for ids in tokenizer(prompts, truncation=True, max_length=places)["input_ids"]]
    return np.arange(places) < np.array(counts)[:, None]
