"""Draw scenes: signed distances in torch, batched over scenes, anti-aliased by one pixel.

Coordinates are pixels of a square canvas; sizes are shares of its side, so any canvas size draws the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from relay.scenes.glyphs import STROKES
from relay.scenes.language import Scene
from relay.scenes.sampling import complete
from relay.scenes.vocabulary import PLACES, SHAPES, TEXTURES

SIDE = 64
RGB = {
    "red": (0.86, 0.12, 0.12), "green": (0.10, 0.65, 0.20), "blue": (0.12, 0.28, 0.88), "yellow": (0.98, 0.88, 0.10),
    "orange": (0.98, 0.52, 0.05), "purple": (0.55, 0.15, 0.70), "white": (0.97, 0.97, 0.97), "black": (0.05, 0.05, 0.05),
}  # fmt: skip
# The second tone of a texture: dark on light inks, light on dark ones, so a texture shows on every ink.
TONE = {
    "red": (1.0, 0.70, 0.66), "green": (0.72, 1.0, 0.66), "blue": (0.66, 0.80, 1.0), "yellow": (0.62, 0.50, 0.0),
    "orange": (0.58, 0.24, 0.0), "purple": (0.93, 0.70, 1.0), "white": (0.48, 0.48, 0.48), "black": (0.62, 0.62, 0.62),
}  # fmt: skip
RADIUS = {"small": 0.115, "large": 0.162}
PERIOD = 0.11
JITTER = 0.012
# Letters by word length: (width of a glyph box, height, stroke, gap between boxes) as shares of the side.
LETTER_BOX = {1: (0.38, 0.56, 0.10, 0.0), 2: (0.28, 0.48, 0.09, 0.14), 3: (0.19, 0.40, 0.075, 0.125)}


def cell_centre(place: str) -> tuple[float, float]:
    """(x, y) of a cell's centre as shares of the side."""
    i = PLACES.index(place)
    return (2 * (i % 3) + 1) / 6, (2 * (i // 3) + 1) / 6


def letter_centres(length: int) -> list[float]:
    """The x of each letter's centre, as shares of the side; y is always 0.5."""
    width, _, _, gap = LETTER_BOX[length]
    return [0.5 + (i - (length - 1) / 2) * (width + gap) for i in range(length)]


@dataclass
class _Shape:
    """All objects of a batch, one row each."""

    image: list[int]
    kind: list[int]
    texture: list[int]
    ink: list[tuple[float, ...]]
    tone: list[tuple[float, ...]]
    geometry: list[tuple[float, float, float]]  # x, y, radius in pixels


def render(scenes: list[Scene], rng: np.random.Generator, side: int = SIDE) -> Tensor:
    """Scenes to images (B, 3, side, side) in [-1, 1]. What a scene leaves open is drawn at random from `rng`."""
    drawn = [complete(scene, rng) for scene in scenes]
    images = torch.tensor([RGB[s.background] for s in drawn])[:, :, None, None].repeat(1, 1, side, side)  # type: ignore[index]
    for alpha, colour, index in _object_layers(drawn, rng, side):
        images[index] += alpha * (colour - images[index])
    letters = [i for i, scene in enumerate(drawn) if scene.word]
    for i in letters:
        alpha = _word_alpha(drawn[i], rng, side)
        ink = torch.tensor(RGB[drawn[i].word_colour])[:, None, None]  # type: ignore[index]
        images[i] += alpha * (ink - images[i])
    return images * 2 - 1


def _object_layers(scenes: list[Scene], rng: np.random.Generator, side: int):
    """Yield (alpha (n,1,side,side), colour (n,3,side,side), image index (n,)): one layer per object number."""
    for layer in range(max((len(s.groups) for s in scenes), default=0)):
        rows = _Shape([], [], [], [], [], [])
        for i, scene in enumerate(scenes):
            if layer < len(scene.groups):
                g = scene.groups[layer]
                x, y = cell_centre(g.place or "centre")
                dx, dy = rng.uniform(-JITTER, JITTER, size=2)
                rows.image.append(i)
                rows.kind.append(SHAPES.index(g.shape))
                rows.texture.append(TEXTURES.index(g.texture or "plain"))
                rows.ink.append(RGB[g.colour or "black"])
                rows.tone.append(TONE[g.colour or "black"])
                rows.geometry.append(((x + dx) * side, (y + dy) * side, RADIUS[g.size or "large"] * side))
        kind, texture = torch.tensor(rows.kind), torch.tensor(rows.texture)
        geometry = torch.tensor(rows.geometry, dtype=torch.float32)
        grid_y, grid_x = _grid(side)
        px = grid_x - geometry[:, 0, None, None]  # (n, side, side)
        py = grid_y - geometry[:, 1, None, None]
        radius = geometry[:, 2, None, None]
        distance = torch.empty_like(px)
        for k in kind.unique().tolist():
            chosen = kind == k
            distance[chosen] = _SDF[k](px[chosen] / radius[chosen], py[chosen] / radius[chosen]) * radius[chosen]
        alpha = (0.5 - distance).clamp(0, 1)
        tone = _texture_mask(texture, px, py, side)
        ink, second = torch.tensor(rows.ink)[:, :, None, None], torch.tensor(rows.tone)[:, :, None, None]
        colour = ink + tone[:, None] * (second - ink)
        yield alpha[:, None], colour, torch.tensor(rows.image)


@cache
def _grid(side: int) -> tuple[Tensor, Tensor]:
    axis = torch.arange(side, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def _texture_mask(texture: Tensor, px: Tensor, py: Tensor, side: int) -> Tensor:
    """Share of the second tone, (n, side, side): horizontal stripes, a grid of dots, or a chequer."""
    period = PERIOD * side
    wave_y = torch.sin(py * (2 * torch.pi / period))
    sharp = period / 5
    striped = (0.5 + wave_y * sharp).clamp(0, 1)
    near_x = (px / period - (px / period).round()).abs() * period
    near_y = (py / period - (py / period).round()).abs() * period
    dotted = (0.27 * period + 0.5 - torch.sqrt(near_x**2 + near_y**2)).clamp(0, 1)
    half_x, half_y = torch.sin(px * (torch.pi / period * 1.25)), torch.sin(py * (torch.pi / period * 1.25))
    checkered = (0.5 + half_x * half_y * sharp * 2).clamp(0, 1)
    layers = torch.stack([torch.zeros_like(px), striped, dotted, checkered])  # (4, n, side, side)
    return layers.gather(0, texture[None, :, None, None].expand(1, *px.shape))[0]


def _word_alpha(scene: Scene, rng: np.random.Generator, side: int) -> Tensor:
    """Coverage (1, side, side) of a word's strokes, centred with a little jitter."""
    assert scene.word
    width, height, stroke, _ = LETTER_BOX[len(scene.word)]
    dx, dy = rng.uniform(-JITTER, JITTER, size=2)
    segments = []
    for letter, x in zip(scene.word, letter_centres(len(scene.word)), strict=True):
        left, top = x + dx - width / 2, 0.5 + dy - height / 2
        for x0, y0, x1, y1 in STROKES[letter]:
            start, end = (left + x0 / 2 * width, top + y0 / 3 * height), (left + x1 / 2 * width, top + y1 / 3 * height)
            segments.append((*start, *end))
    s = torch.tensor(segments, dtype=torch.float32) * side
    grid_y, grid_x = _grid(side)
    ax, ay, bx, by = (s[:, i, None, None] for i in range(4))
    ex, ey = bx - ax, by - ay
    along = (((grid_x - ax) * ex + (grid_y - ay) * ey) / (ex**2 + ey**2)).clamp(0, 1)
    distance = torch.sqrt((grid_x - ax - along * ex) ** 2 + (grid_y - ay - along * ey) ** 2).amin(0)
    return (0.5 + stroke / 2 * side - distance).clamp(0, 1)[None]


# --- signed distances to shapes of unit radius; x to the right, y downwards (Quilez' 2D distance functions as the idea) ---


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(x**2 + y**2) - 0.92


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.80


def _polygon(points: list[tuple[float, float]]):  # noqa: ANN202
    def distance(x: Tensor, y: Tensor) -> Tensor:
        inside = torch.zeros_like(x, dtype=torch.bool)
        nearest = torch.full_like(x, 1e9)
        for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
            ex, ey = bx - ax, by - ay
            along = (((x - ax) * ex + (y - ay) * ey) / (ex**2 + ey**2)).clamp(0, 1)
            nearest = torch.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
            crosses = (torch.full_like(y, ay) > y) != (torch.full_like(y, by) > y)
            inside ^= crosses & (x < ex * (y - ay) / (ey if ey else 1e-9) + ax)
        return torch.where(inside, -1.0, 1.0) * torch.sqrt(nearest)

    return distance


def _cross(x: Tensor, y: Tensor) -> Tensor:
    ax, ay = x.abs(), y.abs()
    across, down = torch.maximum(ax - 0.98, ay - 0.34), torch.maximum(ax - 0.34, ay - 0.98)
    return torch.minimum(across, down)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.sqrt(x**2 + y**2) - 0.72).abs() - 0.26


def _star_points() -> list[tuple[float, float]]:
    angles = [-np.pi / 2 + i * np.pi / 5 for i in range(10)]
    radii = [1.12 if i % 2 == 0 else 0.45 for i in range(10)]
    return [(float(r * np.cos(a)), float(r * np.sin(a)) + 0.08) for a, r in zip(angles, radii, strict=True)]


def _heart_points() -> list[tuple[float, float]]:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [(float(a) / 16.5, float(b) / 16.5 - 0.05) for a, b in zip(x, y, strict=True)]


_SDF = [
    _circle,
    _square,
    _polygon([(0.0, -0.98), (1.02, 0.80), (-1.02, 0.80)]),
    _polygon(_star_points()),
    _polygon(_heart_points()),
    _cross,
    _ring,
    _polygon([(0.0, -1.08), (0.80, 0.0), (0.0, 1.08), (-0.80, 0.0)]),
]
