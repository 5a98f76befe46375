"""A transformers `CLIPModel` with its tokenizer and picture preparation: what several metrics embed with.

Pictures are resized and normalised in torch as the checkpoint's `preprocessor_config.json` asks (CLIP's own figures
where it has none), so a batch of float pictures needs no detour through 8 bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from relay.metrics.missing import MissingModel, absent, hub_file

if TYPE_CHECKING:
    from torch import Tensor

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Unit embeddings of pictures and texts, and the logit scale between them."""

    def __init__(
        self, model: Any, tokenizer: Any, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
    ):
        self.model, self.tokenizer, self.mean, self.std = model.eval(), tokenizer, tuple(mean), tuple(std)
        self.side: int = model.config.vision_config.image_size

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied by, about 100 for OpenAI's models."""
        return float(self.model.logit_scale.detach().exp())

    def images(self, images: Tensor, batch: int = 64) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 to unit embeddings (B, D), on the CPU in fp32."""
        import torch

        found = []
        parameter = next(self.model.parameters())
        with torch.inference_mode():
            for chunk in images.split(batch):
                pixels = prepare(chunk, self.side, self.mean, self.std).to(parameter.device, parameter.dtype)
                pooled = self.model.vision_model(pixel_values=pixels).pooler_output
                found.append(_unit(self.model.visual_projection(pooled)))
        return torch.cat(found)

    def texts(self, texts: Sequence[str], batch: int = 64) -> Tensor:
        """Texts to unit embeddings (B, D), on the CPU in fp32; what exceeds the context is cut off."""
        import torch

        found = []
        context = self.model.config.text_config.max_position_embeddings
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            for i in range(0, len(texts), batch):
                chunk = list(texts[i : i + batch])
                tokens = self.tokenizer(chunk, padding=True, truncation=True, max_length=context, return_tensors="pt")
                pooled = self.model.text_model(
                    input_ids=tokens.input_ids.to(device), attention_mask=tokens.attention_mask.to(device)
                ).pooler_output
                found.append(_unit(self.model.text_projection(pooled)))
        return torch.cat(found)


def _unit(features: Tensor) -> Tensor:
    import torch.nn.functional as F

    return F.normalize(features.float(), dim=-1).cpu()


def prepare(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) in 0..1 to (B, 3, side, side): shortest side resized bicubically, centre kept, normalised."""
    import torch
    import torch.nn.functional as F

    height, width = images.shape[-2:]
    if (height, width) != (side, side):
        ratio = side / min(height, width)
        size = (max(side, round(height * ratio)), max(side, round(width * ratio)))
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        images = images[..., top : top + side, left : left + side]
    shift, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return (images - shift) / scale


def missing_clip(path: str, tokenizer: str | None = None, text: bool = True) -> str | None:
    """One line where a checkpoint, or the tokenizer that it is asked with, is not here, else None."""
    said = absent(path, "config.json", "a transformers CLIPModel")
    if said or not text:
        return said
    return absent(tokenizer or path, "tokenizer_config.json", "its tokenizer")


@cache
def load_clip(path: str, device: str = "cpu", tokenizer: str | None = None, text: bool = True) -> Clip:
    """Load once per process; without `text` it embeds pictures alone and needs no tokenizer.

    Raises `MissingModel` with one line where it is not here or is no CLIPModel.
    """
    import torch
    from transformers import AutoTokenizer, CLIPModel

    if said := missing_clip(path, tokenizer, text):
        raise MissingModel(said)
    try:
        model, lacking = CLIPModel.from_pretrained(path, torch_dtype=torch.float32, output_loading_info=True)
        words = AutoTokenizer.from_pretrained(tokenizer or path) if text else None
        # transformers fills in what a checkpoint lacks at random: such a model must not score anything.
        if lacking["missing_keys"] or lacking["mismatched_keys"]:
            raise ValueError("it lacks weights of a CLIPModel")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise MissingModel(f"{path} cannot be read as a transformers CLIPModel: {error}") from None
    config = hub_file(path, "preprocessor_config.json")
    values = json.loads(config.read_text()) if config else {}
    return Clip(model.to(device), words, values.get("image_mean", OPENAI_MEAN), values.get("image_std", OPENAI_STD))
