"""The families' text encoder: transformers' CLIP text model, pre-trained as a scene parser, then frozen.

A denoising loss alone leaves the text side a bag of words. So the encoder first learns to say what the caption says:
linear heads read the caption's groups, background and letters off the states that diffusers feeds to the denoisers
(`hidden_states[-2]`, padded to 40 tokens, no mask). They read at eight fixed positions behind the longest caption: the
model is causal and padding is never masked, so these padding tokens have seen the whole caption and serve as its
summary, one position an object.

SD3 wants two such encoders; its second one here is a one-layer, 32-wide model whose states are little more than the
tokens themselves. `StableDiffusion3Pipeline.from_pretrained(folder)` also insists on a third, a T5 (diffusers 0.42: not
optional). The folder holds a silent one: its last norm has weight zero, so it says zeros, which is exactly what the
pipeline feeds for an absent T5. Our own calls leave it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from experiments.training.export import replace_folder, save_half
from experiments.training.tokenizer import MAX_LENGTH, build_tokenizer
from relay.scenes.language import Scene, parse
from relay.scenes.sampling import caption, held_out, sample_scene, split_of
from relay.scenes.vocabulary import COLOURS, LETTERS, MAX_LETTERS, MAX_OBJECTS, PLACES, SHAPES, SIZES, TEXTURES

WIDTH, SECOND_WIDTH = 128, 32
FIRST_SLOT = MAX_LENGTH - MAX_OBJECTS - 1 - MAX_LETTERS  # 32
# What each slot says: the name of a head and its number of classes; class 0 is "not said" (or "no such object").
GROUP_HEADS = {"count": 5, "shape": 9, "colour": 9, "texture": 5, "size": 3, "place": 10}
HEADS = {
    **{f"{name}_{i}": n for i in range(MAX_OBJECTS) for name, n in GROUP_HEADS.items()},
    "background": 9,
    **{f"letter_{i}": 27 for i in range(MAX_LETTERS)},
    "ink": 9,
}
POOLED_HEADS = {"background": 9, "objects": 5, "letters": 4, "ink": 9}


def build_text_encoders(vocabulary_size: int) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    def build(width: int, layers: int, heads: int) -> CLIPTextModelWithProjection:
        config = CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="gelu",
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        )
        return CLIPTextModelWithProjection(config)

    return build(WIDTH, 5, 4), build(SECOND_WIDTH, 1, 2)


def slot_of(head: str) -> int:
    """The token position that a head reads."""
    name, _, number = head.rpartition("_")
    if name in GROUP_HEADS:
        return FIRST_SLOT + int(number)
    if name == "letter":
        return FIRST_SLOT + MAX_OBJECTS + 1 + int(number)
    return FIRST_SLOT + MAX_OBJECTS + (1 if head == "ink" else 0)


def targets(scene: Scene) -> dict[str, int]:
    """What the heads must say of a scene whose groups are in caption order."""
    said = dict.fromkeys(HEADS, 0)

    def index(words: tuple[str, ...] | str, word: str | None) -> int:
        return words.index(word) + 1 if word else 0

    for i, group in enumerate(scene.groups):
        said[f"count_{i}"] = group.count
        said[f"shape_{i}"] = index(SHAPES, group.shape)
        said[f"colour_{i}"] = index(COLOURS, group.colour)
        said[f"texture_{i}"] = index(TEXTURES, group.texture)
        said[f"size_{i}"] = index(SIZES, group.size)
        said[f"place_{i}"] = index(PLACES, group.place)
    for i, letter in enumerate(scene.word or ""):
        said[f"letter_{i}"] = index(LETTERS, letter)
    said["background"], said["ink"] = index(COLOURS, scene.background), index(COLOURS, scene.word_colour)
    return said


def build_silent_t5(vocabulary_size: int) -> T5EncoderModel:
    """A T5 encoder as wide as the two CLIP models together whose every output is zero."""
    config = T5Config(
        vocab_size=vocabulary_size, d_model=WIDTH + SECOND_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5EncoderModel(config)
    nn.init.zeros_(model.encoder.final_layer_norm.weight)
    return model


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.ModuleDict({name: nn.Linear(WIDTH, n) for name, n in HEADS.items()})
        self.pooled = nn.ModuleDict({name: nn.Linear(WIDTH + SECOND_WIDTH, n) for name, n in POOLED_HEADS.items()})


class TextTask:
    name = "text"
    learning_rate = 1e-3
    batch_size = 64

    def __init__(self, folders: list[Path], seed: int, quick: bool = False):
        self.tokenizer = build_tokenizer()
        first, second = build_text_encoders(len(self.tokenizer))
        self.modules: dict[str, Any] = {"first": first, "second": second, "heads": _Heads()}
        self.folders, self.seed = folders, seed
        rng = np.random.default_rng(11)
        self.held_out = [caption(scene, rng) for scene in held_out(50 if quick else 1500, "validation")]

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((2, self.seed, step))
        captions: list[str] = []
        while len(captions) < self.batch_size:
            scene = sample_scene(rng)
            if split_of(scene) == "train":
                captions.append(caption(scene, rng))
        losses, right, states = self._read(self.modules, captions, device)
        size = states.float().square().mean()
        return sum(losses) + 1e-2 * (size - 1).relu(), {"right": right.float().mean().item(), "size": size.item()}

    def _read(self, modules: dict[str, Any], captions: list[str], device: torch.device):  # noqa: ANN202
        """Losses of all heads, whether each caption was read without an error, and the states."""
        ids = self.tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt").input_ids
        first = modules["first"](ids.to(device), output_hidden_states=True)
        second = modules["second"](ids.to(device), output_hidden_states=True)
        states = first.hidden_states[-2]
        scenes = [parse(c) for c in captions]
        said = [targets(scene) for scene in scenes]
        losses, right = [], torch.ones(len(captions), dtype=torch.bool, device=device)
        for name, head in modules["heads"].slots.items():
            truth = torch.tensor([s[name] for s in said], device=device)
            logits = head(states[:, slot_of(name)]).float()
            losses.append(F.cross_entropy(logits, truth))
            right &= logits.argmax(1) == truth
        pooled = torch.cat([first.text_embeds, second.text_embeds], 1)
        summary = {
            "background": [s["background"] for s in said],
            "objects": [scene.objects for scene in scenes],
            "letters": [len(scene.word or "") for scene in scenes],
            "ink": [s["ink"] for s in said],
        }
        for name, head in modules["heads"].pooled.items():
            losses.append(F.cross_entropy(head(pooled).float(), torch.tensor(summary[name], device=device)))
        return losses, right, states

    @torch.inference_mode()
    def validate(self, modules: dict[str, Any]) -> dict[str, float]:
        device = next(modules["first"].parameters()).device
        right = [
            self._read(modules, self.held_out[i : i + len(self.held_out) // 5], device)[1]
            for i in range(0, len(self.held_out), len(self.held_out) // 5)
        ]
        by_class = torch.cat(right).float().view(5, -1).mean(1).tolist()
        return {"right": sum(by_class) / 5, **{f"right_{c}": v for c, v in zip("1234L", by_class, strict=True)}}

    def load_shipped(self, weights: Path) -> None:
        """The encoders go on; the heads that read them are not shipped and start anew."""
        for name, part in (("first", "text_encoder"), ("second", "text_encoder_2")):
            shipped = CLIPTextModelWithProjection.from_pretrained(
                weights / "mini-sd3" / part, torch_dtype=torch.float32
            )
            self.modules[name].load_state_dict(shipped.state_dict())

    def export(self, modules: dict[str, Any], provenance: dict[str, Any]) -> None:
        for folder in self.folders:
            encoders = {"text_encoder": "first", "text_encoder_2": "second"}
            if "sdxl" in folder.name:
                encoders = {"text_encoder_2": "first"}
            for part, name in encoders.items():
                save_half(modules[name], folder / part, provenance)
                save_tokenizer(self.tokenizer, folder / part.replace("text_encoder", "tokenizer"))
            if "sdxl" not in folder.name:
                save_half(
                    build_silent_t5(len(self.tokenizer)), folder / "text_encoder_3", {"trained": "never: it is silent"}
                )
                save_tokenizer(self.tokenizer, folder / "tokenizer_3")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    partial = folder.with_suffix(".part")
    tokenizer.save_pretrained(partial)
    replace_folder(partial, folder)
