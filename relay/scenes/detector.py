"""The scene judge's eyes: a small CNN that says what an image shows, cell by cell.

Trained on rendered scenes alone (`experiments.training.judge`), so it has never seen what it is to judge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from relay.errors import FamilyError
from relay.scenes.language import Group
from relay.scenes.render import SIDE, cell_centre, letter_centres
from relay.scenes.vocabulary import COLOURS, LETTERS, MAX_LETTERS, PLACES, SHAPES, SIZES, TEXTURES

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "scene-judge" / "model.safetensors"
CELL_HEADS = {"present": 2, "shape": len(SHAPES), "colour": len(COLOURS), "texture": len(TEXTURES), "size": len(SIZES)}
IMAGE_HEADS = {"background": len(COLOURS), "length": MAX_LETTERS + 1, "ink": len(COLOURS)}
# One anchor a letter: the first is a one-letter word's, the next two a two-letter word's, the last three a long one's.
LETTER_ANCHORS = [(x, 0.5) for length in (1, 2, 3) for x in letter_centres(length)]


@dataclass(frozen=True)
class Seen:
    """What the detector saw in one image: every object with all its attributes, the background, the word."""

    objects: tuple[Group, ...]
    background: str
    word: str
    ink: str


class SceneDetector(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] to logits per head: (B, 9, n) a cell, (B, 6, 26) a letter, (B, n) an image."""

    def __init__(self, width: int = 48):
        super().__init__()

        def conv(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU()]

        self.fine = nn.Sequential(*conv(3, width, 2), *conv(width, width), *conv(width, width))  # 32 x 32
        self.coarse = nn.Sequential(
            *conv(width, 2 * width, 2), *conv(2 * width, 2 * width), *conv(2 * width, 2 * width)
        )
        points = 2 * width * 25
        self.cell = nn.Sequential(nn.Linear(points, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU())
        self.letter = nn.Sequential(nn.Linear(points, 256), nn.SiLU(), nn.Linear(256, 26))
        self.whole = nn.Sequential(nn.Linear(2 * width * 16, 128), nn.SiLU())
        self.cell_heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in CELL_HEADS.items()})
        self.image_heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in IMAGE_HEADS.items()})
        cells = torch.tensor([cell_centre(p) for p in PLACES])
        self.cell_grid: Tensor
        self.letter_grid: Tensor
        self.register_buffer("cell_grid", _grid_around(cells, 0.13, 0.13), persistent=False)
        anchors = torch.tensor(LETTER_ANCHORS)
        self.register_buffer("letter_grid", _grid_around(anchors, 0.12, 0.24), persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.coarse(self.fine(images))
        cells = self.cell(self._sample(features, self.cell_grid))
        logits = {name: head(cells) for name, head in self.cell_heads.items()}
        logits["letter"] = self.letter(self._sample(features, self.letter_grid))
        whole = self.whole(F.adaptive_avg_pool2d(features, 4).flatten(1))
        return logits | {name: head(whole) for name, head in self.image_heads.items()}

    @staticmethod
    def _sample(features: Tensor, grid: Tensor) -> Tensor:
        """Features (B, C, h, w) at grid (K, 25, 2) to (B, K, 25 C)."""
        batch, channels = features.shape[:2]
        taken = F.grid_sample(features.float(), grid[None].expand(batch, -1, -1, -1), align_corners=False)
        return taken.permute(0, 2, 3, 1).reshape(batch, grid.shape[0], 25 * channels)

    @torch.inference_mode()
    def see(self, images: Tensor, batch: int = 64) -> list[Seen]:
        """What each image (B, 3, h, w) in [-1, 1] shows; square images of another size are resized to 64 x 64."""
        if images.shape[-2:] != (SIDE, SIDE):
            images = F.interpolate(images, (SIDE, SIDE), mode="area" if images.shape[-1] > SIDE else "bilinear")
        seen: list[Seen] = []
        for chunk in images.float().clamp(-1, 1).split(batch):
            best = {name: logits.argmax(-1).tolist() for name, logits in self(chunk).items()}
            seen += [_read({name: values[i] for name, values in best.items()}) for i in range(len(chunk))]
        return seen


def _grid_around(centres: Tensor, reach_x: float, reach_y: float) -> Tensor:
    """5 x 5 points around each centre (K, 2) in shares of the side, as grid_sample's coordinates (K, 25, 2)."""
    steps = torch.linspace(-1, 1, 5)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    offsets = torch.stack([x.flatten() * reach_x, y.flatten() * reach_y], 1)
    return (centres[:, None] + offsets[None]) * 2 - 1


def _read(best: dict) -> Seen:
    length = best["length"]
    first = length * (length - 1) // 2
    word = "".join(LETTERS[best["letter"][first + i]] for i in range(length))
    objects = [] if length else [i for i in range(len(PLACES)) if best["present"][i]]
    groups = tuple(
        Group(
            SHAPES[best["shape"][i]],
            1,
            COLOURS[best["colour"][i]],
            TEXTURES[best["texture"][i]],
            SIZES[best["size"][i]],
            PLACES[i],
        )
        for i in objects
    )
    return Seen(groups, COLOURS[best["background"]], word, COLOURS[best["ink"]] if length else "")


@cache
def load_detector(path: Path = WEIGHTS) -> SceneDetector:
    """The shipped detector on the CPU, in fp32."""
    from safetensors.torch import load_file

    if not path.exists():
        raise FamilyError(f"the scene judge's weights are missing at {path}; train them with `relay-train part judge`")
    detector = SceneDetector()
    detector.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
    return detector.eval()
