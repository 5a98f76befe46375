"""The embedded CLIP: a small `CLIPModel` that knows scenes by caption and ten qualities by phrase.

It learns three things at once from rendered scenes. Clean pictures must find their captions among the batch's and among
hard negatives, the same captions with one attribute swapped between two objects. Every picture, clean or spoiled
(`experiments.training.degrade`), must lie between the two phrases of each quality as its severity says, through the very
q that the metric reads (`relay.metrics.clip_quality`). And heads that are not shipped read the scene off both sides'
embeddings: one head for pictures and captions, so that the two spaces say the same with the same directions.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from experiments.metric_matrix import measure
from experiments.training.degrade import KINDS, Layer, complete_all, layers, spoil_scenes
from experiments.training.export import save_half
from experiments.training.judge import _IGNORE, labels
from experiments.training.tokenizer import MAX_LENGTH, SPECIAL, build_tokenizer, vocabulary
from relay.metrics.clip import Clip
from relay.metrics.clip_quality import PHRASES_FILE, qualities
from relay.scenes.detector import CELL_HEADS, LETTER_ANCHORS
from relay.scenes.language import Scene
from relay.scenes.render import SIDE
from relay.scenes.sampling import caption, held_out, sample_scene, split_of
from relay.scenes.vocabulary import COLOURS, LETTERS, MAX_LETTERS, PLACES, SHAPES

WIDTH = 96
PHRASES = {kind: (f"high {kind} picture", f"low {kind} picture") for kind in KINDS}
# Targets of q: clean, and spoiled to the full. Not 1 and 0, so that a logit never has to run away.
HIGH, LOW = 0.95, 0.05
# A step draws a third of the pool's scenes, so each is met about three times, with other words and other degradations:
# drawing scenes anew for every step costs as much as learning from them.
REUSE = 9
CELLS = sum(CELL_HEADS.values())
FACTS = {"cells": 9 * CELLS, "letter": len(LETTER_ANCHORS) * 26, "background": 8, "length": MAX_LETTERS + 1, "ink": 8}


def build_clip_tokenizer() -> PreTrainedTokenizerFast:
    """The scene language's tokenizer with the phrases' words behind its own, so that its ids stay what they are."""
    from tokenizers import models

    words = [*vocabulary(), "high", "low", *KINDS]
    words += [word.capitalize() for word in ("high", "low", *KINDS)]
    core = build_tokenizer().backend_tokenizer
    core.model = models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unknown>")
    pad, start, unknown, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=MAX_LENGTH, clean_up_tokenization_spaces=False,
        pad_token=pad, bos_token=start, unk_token=unknown, eos_token=end,
    )  # fmt: skip


def build_clip(vocabulary_size: int) -> CLIPModel:
    """About 0.75 M parameters: pictures in 64 patches of 8 x 8 over four layers, texts of 40 tokens over two."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {
        "vocab_size": vocabulary_size, "max_position_embeddings": MAX_LENGTH, "num_hidden_layers": 2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3, "projection_dim": WIDTH,
    }  # fmt: skip
    vision = {"image_size": SIDE, "patch_size": 8, "num_hidden_layers": 4, "projection_dim": WIDTH}
    config = CLIPConfig(text_config=shared | text, vision_config=shared | vision, projection_dim=WIDTH)
    # In bf16 on a CPU the plain attention is much faster than torch's fused one (0.20 s a batch against 0.39 s).
    return CLIPModel._from_config(config, attn_implementation="eager")


@torch.no_grad()
def whiten(clip: CLIPModel, pictures: Tensor) -> None:
    """Start the patch filters as the principal components of patches, each scaled to the same variance.

    Flat colour is nearly all of a scene's variance: random filters see little else and take long to find noise or blur.
    """
    embeddings = clip.vision_model.embeddings
    side, width = embeddings.patch_size, WIDTH
    patches = F.unfold(pictures * 2 - 1, side, stride=side).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    filters = (vectors / (values + 1e-3 * values[-1]).sqrt()).T.flip(0)[:width]
    embeddings.patch_embedding.weight.copy_(0.3 * filters.view(width, 3, side, side))
    nn.init.normal_(embeddings.position_embedding.weight, std=0.1)


class _Readers(nn.Module):
    """What is not shipped: `facts` reads a whole scene off an embedding, `cell` one cell and `quality` the ten qualities
    off a picture's patches."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = nn.Linear(WIDTH, sum(FACTS.values()))
        self.cell = nn.Linear(WIDTH, CELLS)
        self.quality = nn.Linear(WIDTH, len(KINDS))


def said_labels(truth: dict[str, Tensor], scenes: list[Scene]) -> dict[str, Tensor]:
    """The completed scenes' labels without what their captions leave open."""
    kept = {name: value.clone() for name, value in truth.items()}
    for i, scene in enumerate(scenes):
        if scene.background is None:
            kept["background"][i] = _IGNORE
        if scene.word and scene.word_colour is None:
            kept["ink"][i] = _IGNORE
        if scene.word:
            continue
        groups = {PLACES.index(g.place): g for g in scene.groups if g.place}
        for cell in range(len(PLACES)):
            if cell in groups:
                for name in ("shape", "colour", "texture", "size"):
                    if getattr(groups[cell], name) is None:
                        kept[name][i, cell] = _IGNORE
            else:
                for name in CELL_HEADS:
                    kept[name][i, cell] = _IGNORE
        if all(g.place for g in scene.groups):
            kept["present"][i, [c for c in range(len(PLACES)) if c not in groups]] = 0
    return kept


def swapped(scene: Scene, rng: np.random.Generator) -> Scene:
    """A hard negative: one attribute swapped between two objects; where nothing can be swapped, one thing is another."""
    groups = list(scene.groups)
    pairs = [
        (i, j, name)
        for i in range(len(groups))
        for j in range(i)
        for name in ("colour", "shape", "texture", "size", "place")
        if None not in (a := getattr(groups[i], name), b := getattr(groups[j], name))
        and a != b
        # Two objects that differ in one thing alone: swapping that is the same scene.
        and replace(groups[i], **{name: b}) != groups[j]
    ]
    if scene.word:
        at = int(rng.integers(len(scene.word)))
        other = LETTERS[(LETTERS.index(scene.word[at]) + int(rng.integers(1, 26))) % 26]
        return replace(scene, word=scene.word[:at] + other + scene.word[at + 1 :])
    if pairs:
        i, j, name = pairs[int(rng.integers(len(pairs)))]
        a, b = getattr(groups[i], name), getattr(groups[j], name)
        groups[i], groups[j] = replace(groups[i], **{name: b}), replace(groups[j], **{name: a})
        return replace(scene, groups=tuple(groups))
    at = int(rng.integers(len(groups)))
    group = groups[at]
    free = [c for c in COLOURS if c not in (group.colour, scene.background)]
    if group.colour and rng.random() < 0.5:
        groups[at] = replace(group, colour=free[int(rng.integers(len(free)))])
    else:
        groups[at] = replace(group, shape=SHAPES[(SHAPES.index(group.shape) + int(rng.integers(1, 8))) % 8])
    return replace(scene, groups=tuple(groups))


def choose_kinds(rng: np.random.Generator) -> dict[str, float]:
    """One to three degradations, each with a severity, strong ones more often: they teach what to look for."""
    count = rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])
    return {KINDS[k]: float(0.2 + 0.8 * rng.random() ** 0.7) for k in rng.permutation(len(KINDS))[:count]}


class ClipTask:
    name = "clip"
    learning_rate = 1.5e-3
    muon_learning_rate = 3e-3
    batch_size = 72  # pictures: each scene once clean and twice spoiled

    def __init__(self, weights: Path, seed: int, quick: bool = False):
        self.tokenizer = build_clip_tokenizer()
        torch.manual_seed(seed)
        self.modules: dict[str, Any] = {"clip": build_clip(len(self.tokenizer)), "readers": _Readers()}
        self.weights, self.seed = weights, seed
        self.pool: tuple[int, list[tuple[Scene, Scene, list[Layer]]]] = (-1, [])
        rng = np.random.default_rng(19)
        self.scenes = held_out(10 if quick else 100, "validation")
        self.captions = [caption(s, rng) for s in self.scenes]
        self.negatives = [caption(swapped(s, rng), rng) for s in self.scenes]
        self.clean = spoil_scenes(complete_all(self.scenes, rng), [{}] * len(self.scenes), rng)[0]
        drawn = complete_all([sample_scene(rng) for _ in range(20 if quick else 200)], rng)
        whiten(self.modules["clip"], torch.cat(spoil_scenes(drawn, [choose_kinds(rng) for _ in drawn], rng)[:2]))

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices inside the layers."""
        clip = self.modules["clip"]
        towers = (clip.text_model.encoder, clip.vision_model.encoder)
        return [p for tower in towers for p in tower.parameters() if p.ndim == 2]

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((5, self.seed, step))
        pool = self._pool(step // REUSE)
        chosen = [pool[i] for i in rng.choice(len(pool), self.batch_size // 3, replace=False)]
        scenes, drawn, objects = (list(column) for column in zip(*chosen, strict=True))
        once = spoil_scenes(drawn, [choose_kinds(rng) for _ in drawn], rng, objects)
        twice = spoil_scenes(drawn, [choose_kinds(rng) for _ in drawn], rng, objects)
        captions = [caption(s, rng) for s in scenes] + [caption(swapped(s, rng), rng) for s in scenes]
        clip, readers = self.modules["clip"], self.modules["readers"]
        vision = clip.vision_model(pixel_values=(torch.cat([once[0], once[1], twice[1]]) * 2 - 1).to(device))
        pictures = clip.visual_projection(vision.pooler_output).float()
        texts = self._texts(clip, captions, device)
        phrases = self._texts(clip, [text for pair in PHRASES.values() for text in pair], device)
        n, scale = len(scenes), clip.logit_scale.float().exp()

        done = torch.cat([torch.zeros_like(once[2]), once[2], twice[2]]).to(device)
        wanted = HIGH + (LOW - HIGH) * done
        apart = F.normalize(phrases[0::2], dim=1) - F.normalize(phrases[1::2], dim=1)
        quality = _miss(scale * F.normalize(pictures, dim=1) @ apart.T, wanted)
        patchwise = _miss(readers.quality(vision.last_hidden_state[:, 1:].mean(1)).float(), wanted)

        logits = scale * F.normalize(pictures[:n], dim=1) @ F.normalize(texts, dim=1).T
        own = torch.arange(n, device=device)
        contrast = (F.cross_entropy(logits, own) + F.cross_entropy(logits[:, :n].T, own)) / 2
        harder = F.softplus(logits.diagonal(n) - logits.diagonal(0)).mean()

        truth = labels(drawn)
        facts = _read(readers.facts(pictures[:n]), truth) + _read(readers.facts(texts[:n]), said_labels(truth, scenes))
        patches = vision.last_hidden_state[:n, 1:].transpose(1, 2).reshape(n, WIDTH, SIDE // 8, SIDE // 8)
        cells = readers.cell(F.adaptive_avg_pool2d(patches, 3).flatten(2).transpose(1, 2)).float()
        dense = _read_cells(cells, truth)
        logs = {
            "quality": quality.item(),
            "patchwise": patchwise.item(),
            "contrast": contrast.item(),
            "facts": facts.item(),
            "cells": dense.item(),
        }
        return 6 * quality + 2 * patchwise + contrast + harder + 0.3 * facts + 0.3 * dense, logs

    def _pool(self, number: int) -> list[tuple[Scene, Scene, list[Layer]]]:
        """What `REUSE` steps in a row draw from: as many scenes as one batch of pictures, said, completed and drawn."""
        if self.pool[0] != number:
            rng = np.random.default_rng((6, self.seed, number))
            scenes: list[Scene] = []
            while len(scenes) < self.batch_size:
                scene = sample_scene(rng)
                if split_of(scene) == "train":
                    scenes.append(scene)
            drawn = complete_all(scenes, rng)
            self.pool = number, list(zip(scenes, drawn, layers(drawn, rng), strict=True))
        return self.pool[1]

    def _texts(self, clip: CLIPModel, texts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        # Causal and read at the end token, so what lies behind it needs no mask.
        return clip.text_projection(clip.text_model(input_ids=tokens.input_ids.to(device)).pooler_output).float()

    @torch.inference_mode()
    def validate(self, modules: dict[str, Any]) -> dict[str, float]:
        """Own caption ahead of its hard negative, and ahead of all others; how far each quality's own degradation moves it."""
        clip = Clip(modules["clip"], self.tokenizer)
        pictures = clip.images(self.clean)
        texts, negatives = clip.texts(self.captions), clip.texts(self.negatives)
        cosines = pictures @ texts.T
        figures = {
            "beats_negative": float((cosines.diagonal() > (pictures * negatives).sum(1)).float().mean()),
            "finds_caption": float((cosines.argmax(1) == torch.arange(len(texts))).float().mean()),
        }
        found = measure(lambda images: qualities(clip, clip.images(images), PHRASES), self.scenes[::5], (0.5, 1.0))
        figures |= {f"drop_{k}": found["drops"][k][k] for k in KINDS}
        return figures | {f"ratio_{k}": found["ratio"][k] for k in KINDS}

    def load_shipped(self, weights: Path) -> None:
        """The model goes on; the readers are not shipped and start anew."""
        shipped = CLIPModel.from_pretrained(weights / "scene-clip", torch_dtype=torch.float32)
        self.modules["clip"].load_state_dict(shipped.state_dict())

    def export(self, modules: dict[str, Any], provenance: dict[str, Any]) -> None:
        save_half(_Shipped(modules["clip"], self.tokenizer), self.weights / "scene-clip", provenance)


class _Shipped:
    """Model, tokenizer, picture preparation and phrases as one folder, for `save_half` to replace in one step."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer

    def to(self, *where: Any) -> _Shipped:
        return _Shipped(self.model.to(*where), self.tokenizer)

    def save_pretrained(self, folder: Path, **options: Any) -> None:
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)
        half = [0.5, 0.5, 0.5]
        prepared = {
            "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": SIDE},
            "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": half, "image_std": half, "resample": 3,
            "do_convert_rgb": True,
        }  # fmt: skip
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=1) + "\n")
        (folder / PHRASES_FILE).write_text(json.dumps(PHRASES, indent=1) + "\n")


def _miss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Weighted mean divergence of sigmoid(logits) (B, 10) from the wanted q: 0 where every q is as wanted."""
    # A kind is met in few pictures: each of these weighs as much as several clean ones.
    weight = 1 + 3 * (wanted < HIGH).float()
    entropy = -(wanted * wanted.log() + (1 - wanted) * (1 - wanted).log())
    return F.binary_cross_entropy_with_logits(logits, wanted, weight) - (weight * entropy).mean()


def _read(facts: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of a scene's facts (B, all) over the kinds of labels."""
    parts = dict(zip(FACTS, facts.float().split(list(FACTS.values()), 1), strict=True))
    losses = [_cross_entropy(parts[name], truth[name]) for name in ("background", "length", "ink")]
    losses.append(_cross_entropy(parts["letter"].reshape(-1, 26), truth["letter"]))
    return _read_cells(parts["cells"].reshape(len(facts), 9, CELLS), truth) + torch.stack(losses).mean()


def _read_cells(cells: Tensor, truth: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of (B, 9, all cell heads)."""
    parts = zip(CELL_HEADS, cells.split(list(CELL_HEADS.values()), 2), strict=True)
    return torch.stack([_cross_entropy(logits.flatten(0, 1), truth[name]) for name, logits in parts]).mean()


def _cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    truth = truth.flatten().to(logits.device)
    if not (truth != _IGNORE).any():
        return logits.sum() * 0
    return F.cross_entropy(logits, truth, ignore_index=_IGNORE)
