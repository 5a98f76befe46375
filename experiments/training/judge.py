"""The scene judge's detector, trained on rendered scenes with noise, blur and changed brightness; never on generated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.training.export import replace_folder, write_provenance
from relay.scenes.detector import CELL_HEADS, LETTER_ANCHORS, SceneDetector
from relay.scenes.judge import compare
from relay.scenes.language import Scene
from relay.scenes.render import render
from relay.scenes.sampling import complete, held_out, sample_scene, split_of
from relay.scenes.vocabulary import COLOURS, LETTERS, PLACES, SHAPES, SIZES, TEXTURES

_WORDS: dict[str, tuple[str, ...]] = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}
_IGNORE = -100


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """Per-cell labels (B, 9), letters (B, 6), and image labels (B,) of completed scenes; -100 where nothing is to learn."""
    cells = {name: torch.full((len(scenes), 9), 0 if name == "present" else _IGNORE) for name in CELL_HEADS}
    letters = torch.full((len(scenes), len(LETTER_ANCHORS)), _IGNORE)
    background, length, ink = [], [], []
    for i, scene in enumerate(scenes):
        for group in scene.groups:
            at = PLACES.index(group.place or "centre")
            cells["present"][i, at] = 1
            for name, words in _WORDS.items():
                cells[name][i, at] = words.index(getattr(group, name))
        word = scene.word or ""
        first = len(word) * (len(word) - 1) // 2
        for j, letter in enumerate(word):
            letters[i, first + j] = LETTERS.index(letter)
        if word:
            cells["present"][i] = _IGNORE
        background.append(COLOURS.index(scene.background or "white"))
        length.append(len(word))
        ink.append(COLOURS.index(scene.word_colour) if scene.word_colour else _IGNORE)
    return cells | {
        "letter": letters,
        "background": torch.tensor(background),
        "length": torch.tensor(length),
        "ink": torch.tensor(ink),
    }


def spoil(images: Tensor) -> Tensor:
    """Blur some, brighten or darken some, add noise to all: what an image may suffer without showing anything else."""
    n = len(images)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.6)
    images = images + share * (blurred - images)
    gain = 1 + 0.1 * torch.randn(n, 1, 1, 1)
    shift = 0.05 * torch.randn(n, 3, 1, 1)
    noise = torch.randn_like(images) * (0.12 * torch.rand(n, 1, 1, 1))
    return (images * gain + shift + noise).clamp(-1, 1)


class JudgeTask:
    name = "judge"
    learning_rate = 2e-3
    batch_size = 64

    def __init__(self, weights: Path, seed: int):
        self.modules: dict[str, nn.Module] = {"detector": SceneDetector()}
        self.weights, self.seed = weights, seed
        rng = np.random.default_rng(13)
        self.scenes = [complete(s, rng) for s in held_out(2000, "validation")]
        self.clean = render(self.scenes, rng)

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((3, self.seed, step))
        scenes: list[Scene] = []
        while len(scenes) < self.batch_size:
            scene = sample_scene(rng)
            if split_of(scene) == "train":
                scenes.append(complete(scene, rng))
        truth = labels(scenes)
        logits = self.modules["detector"](spoil(render(scenes, rng)).to(device))
        losses = {
            name: F.cross_entropy(out.float().flatten(0, -2), truth[name].flatten().to(device), ignore_index=_IGNORE)
            for name, out in logits.items()
        }
        return sum(losses.values(), torch.zeros((), device=device)), {"shape": losses["shape"].item()}

    @torch.inference_mode()
    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        detector = modules["detector"]
        assert isinstance(detector, SceneDetector)
        return accuracy(detector, self.clean, self.scenes)

    def load_shipped(self, weights: Path) -> None:
        tensors = load_file(weights / "scene-judge" / "model.safetensors")
        self.modules["detector"].load_state_dict({k: v.float() for k, v in tensors.items()}, strict=False)

    def export(self, modules: dict[str, nn.Module], provenance: dict[str, Any]) -> None:
        folder = self.weights / "scene-judge"
        partial = folder.with_suffix(".part")
        partial.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.half().contiguous() for k, v in modules["detector"].state_dict().items()}
        save_file(tensors, partial / "model.safetensors")
        write_provenance(partial, provenance)
        replace_folder(partial, folder)


def accuracy(detector: SceneDetector, images: Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Share right per attribute, over completed scenes and their images (B, 3, 64, 64) in [-1, 1]."""
    verdicts = [
        compare(scene, what) for scene, what in zip(scenes, detector.see(images.to(_device(detector))), strict=True)
    ]
    kinds = sorted({kind for v in verdicts for kind in v.parts})
    rates = {}
    for kind in kinds:
        right, asked = (sum(v.parts[kind][i] for v in verdicts if kind in v.parts) for i in (0, 1))
        if kind == "extra":
            rates["extra_objects"] = float(asked)
        else:
            rates[kind] = right / asked
    return rates | {"strict": sum(v.strict for v in verdicts) / len(verdicts)}


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
