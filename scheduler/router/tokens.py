"""What the router reads: the hidden states of the family's own text encoder, one vector per token, nothing pooled.

The encoder is the first one that the family's text side has (`text_encoder`, else `text_encoder_2`, ...): of several it
is the smallest, and families that share it are encoded once. Its layer is the last but one, the one that SD3's and
SDXL's denoisers read too. Start, end and padding are special: no expert may select them. RouteT2I (arXiv 2411.13787)
reads prompt tokens and does not say whose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import FamilyError

if TYPE_CHECKING:
    import torch

    from relay.checkpoints import Component
    from relay.family_spec import FamilySpec


@dataclass(frozen=True)
class Tokens:
    """A batch of B prompts, padded to the longest of them (L tokens)."""

    states: torch.Tensor  # (B, L, D) float32
    mask: torch.Tensor  # (B, L) bool: the prompt's own tokens, neither start, end nor padding
    texts: list[list[str]]  # each prompt's tokens, special ones too, without padding
    spans: list[list[tuple[int, int]]]  # where each token stands in its prompt, (0, 0) for special ones

    def take(self, rows: Sequence[int]) -> Tokens:
        """The given rows, without columns that only others need."""
        length = max((len(self.texts[i]) for i in rows), default=1)
        index = list(rows)
        return Tokens(
            self.states[index, :length], self.mask[index, :length],
            [self.texts[i] for i in index], [self.spans[i] for i in index],
        )  # fmt: skip


class TokenReader:
    """Prompts to `Tokens`. `TokenReader.of(spec)` loads a family's text encoder, on the CPU."""

    def __init__(
        self, tokenizer: Any, states: Callable[[torch.Tensor], torch.Tensor], width: int, most: int, digest: str
    ):
        """`states`: ids (B, L) to (B, L, width); `most` tokens it takes; `digest` says which encoder it is."""
        self.tokenizer, self.states, self.width, self.digest = tokenizer, states, width, digest
        self.longest = min(int(tokenizer.model_max_length), most)
        names = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        self._special = {token for token in names if token is not None}
        self._fast = bool(getattr(tokenizer, "is_fast", False))

    @staticmethod
    def of(spec: FamilySpec) -> TokenReader:
        """The reader of a family; FamilyError where its text side is not on this machine."""
        part, tokenizer = _parts(spec)
        return _load(part[0], part[1], tokenizer[0], tokenizer[1])

    @staticmethod
    def around(tokenizer: Any, encoder: Any, digest: str) -> TokenReader:
        """Around any text encoder of transformers."""

        def states(ids: torch.Tensor) -> torch.Tensor:
            return encoder(ids, output_hidden_states=True).hidden_states[-2].float()

        most = getattr(encoder.config, "max_position_embeddings", None) or tokenizer.model_max_length
        return TokenReader(tokenizer, states, encoder.config.hidden_size, most, digest)

    def read(self, prompts: Sequence[str]) -> Tokens:
        """Tokens of B prompts; what lies beyond the encoder's length is cut off, as the family's own pipeline does."""
        import torch

        said: dict[str, Any] = {"return_offsets_mapping": True} if self._fast else {}
        rows = self.tokenizer(list(prompts), truncation=True, max_length=self.longest, **said)
        ids: list[list[int]] = rows["input_ids"]
        length = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        padded = torch.tensor([row + [pad] * (length - len(row)) for row in ids])
        own = [[token not in self._special for token in row] for row in ids]
        mask = torch.tensor([row + [False] * (length - len(row)) for row in own])
        with torch.inference_mode():
            states = self.states(padded)
        texts = [self.tokenizer.convert_ids_to_tokens(row) for row in ids]
        spans = rows["offset_mapping"] if self._fast else [[(0, 0)] * len(row) for row in ids]
        return Tokens(states.clone(), mask, texts, [[tuple(span) for span in row] for row in spans])


def _parts(spec: FamilySpec) -> tuple[tuple[Component, str], tuple[Component, str]]:
    """(component, class) of the first text encoder that the family has, and of its tokenizer."""
    import msgspec

    from relay.checkpoints import read_json

    index = read_json(spec.text, "model_index.json")
    for suffix in ("", "_2", "_3"):
        name = f"text_encoder{suffix}"
        if name in index and index[name][1] and name not in spec.text.omit:
            found = [(name, index[name][1]), (f"tokenizer{suffix}", index[f"tokenizer{suffix}"][1])]
            parts = [(msgspec.structs.replace(spec.text, subfolder=folder), cls) for folder, cls in found]
            return parts[0], parts[1]
    raise FamilyError(f"family {spec.name} has no text encoder whose tokens a router could read")


@lru_cache(maxsize=4)
def _load(part: Component, cls: str, tokenizer: Component, tokenizer_cls: str) -> TokenReader:
    import transformers

    from relay.checkpoints import load_model, load_tokenizer, read_json, weight_files
    from scheduler.router.clip_text import ACTIVATIONS, CLASSES, ClipText

    digest, reads = _digest(part), load_tokenizer(getattr(transformers, tokenizer_cls), tokenizer)
    config = read_json(part, "config.json")
    if cls in CLASSES and config.get("hidden_act", "quick_gelu") in ACTIVATIONS:
        clip = ClipText(config, _tensors(weight_files(part)))
        return TokenReader(reads, clip, config["hidden_size"], config["max_position_embeddings"], digest)
    return TokenReader.around(reads, load_model(getattr(transformers, cls), part, "fp32"), digest)


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise FamilyError(f"{files[0].parent} cannot be loaded: {str(error).splitlines()[0]}") from None


def encoder_digest(spec: FamilySpec) -> str:
    """Which text encoder a family reads with, without loading it."""
    return _digest(_parts(spec)[0][0])


def _digest(part: Component) -> str:
    """16 hex digits over the encoder's weight files: a router reads the states of this encoder and of no other."""
    from relay.checkpoints import weight_files

    digest = blake2b(digest_size=8)
    files = weight_files(part)
    if not files:
        raise FamilyError(f"the text encoder at {part} is not on this machine")
    for file in files:
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
