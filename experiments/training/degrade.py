"""Ten visible ways to spoil a rendered scene, one for each quality that a metric names, graded from 0 to 1.

Four act on the objects before they are put on their background (detail, harmony, integrity, layout), six on the whole
picture. Each was made to look like itself alone: pixels become blocks (definition) or run together (sharpness), contrast
sinks into haze (clarity) or the colours get a cast (color), a half gets another texture (consistency), objects turn
into rounded flat blobs (detail), get two clashing tones (harmony), break in two (integrity) or leave their cells
(layout), and noise lies over everything (realism).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from relay.metrics.clip_quality import QUALITIES as KINDS
from relay.scenes.language import Scene
from relay.scenes.render import RGB, SIDE, cell_centre, letter_centres, render
from relay.scenes.sampling import complete

# A degradation that changed less than this (mean absolute, 0..1) did not happen: a flat circle has no detail to lose.
VISIBLE = 2e-3
_NEON = torch.tensor([(1.0, 0.0, 0.8), (0.6, 1.0, 0.0), (0.0, 1.0, 1.0), (1.0, 0.45, 0.75), (0.45, 0.3, 0.15)])


@dataclass
class Layer:
    """One object or letter of a scene: coverage (1, h, w) and colour (3, h, w) in 0..1, centre (x, y) in pixels."""

    alpha: Tensor
    colour: Tensor
    centre: tuple[float, float]


def layers(scenes: list[Scene], rng: np.random.Generator) -> list[list[Layer]]:
    """Each completed scene's objects, one letter each for a word, drawn as `render` draws them."""
    parts = [(i, replace(s, groups=(g,))) for i, s in enumerate(scenes) for g in s.groups]
    parts += [(i, s) for i, s in enumerate(scenes) if s.word]
    seed = int(rng.integers(2**31))
    drawn = render([part for _, part in parts], np.random.default_rng(seed)) / 2 + 0.5
    # The same strokes once more, black on white and without texture: what they cover.
    bare = [_black_on_white(part) for _, part in parts]
    paper = render(bare, np.random.default_rng(seed)) / 2 + 0.5
    white, black = RGB["white"][0], RGB["black"][0]
    coverage = ((white - paper.mean(1, keepdim=True)) / (white - black)).clamp(0, 1)
    found: list[list[Layer]] = [[] for _ in scenes]
    for (i, part), image, alpha in zip(parts, drawn, coverage, strict=True):
        ground = torch.tensor(RGB[part.background or "white"])[:, None, None]
        colour = (ground + (image - ground) / alpha.clamp(min=0.05)).clamp(0, 1)
        if not part.word:
            x, y = cell_centre(part.groups[0].place or "centre")
            found[i].append(Layer(alpha, colour, (x * SIDE, y * SIDE)))
            continue
        centres = [x * SIDE for x in letter_centres(len(part.word))]
        edges = [0, *(round((a + b) / 2) for a, b in pairwise(centres)), SIDE]
        for x, (left, right) in zip(centres, pairwise(edges), strict=True):
            own = torch.zeros_like(alpha)
            own[..., left:right] = alpha[..., left:right]
            found[i].append(Layer(own, colour, (x, SIDE / 2)))
    return found


def _black_on_white(scene: Scene) -> Scene:
    groups = tuple(replace(g, colour="black", texture="plain") for g in scene.groups)
    return Scene(groups, "white", scene.word, "black" if scene.word else None)


def compose(scene: Scene, objects: list[Layer]) -> Tensor:
    """Objects on their background: (3, h, w) in 0..1."""
    image = torch.tensor(RGB[scene.background or "white"])[:, None, None].repeat(1, SIDE, SIDE)
    for layer in objects:
        image = image + layer.alpha * (layer.colour - image)
    return image


def spoil_scenes(
    scenes: list[Scene],
    wanted: list[dict[str, float]],
    rng: np.random.Generator,
    drawn: list[list[Layer]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and spoiled pictures (B, 3, 64, 64) in 0..1 of completed scenes, and what was done: severities (B, 10).

    `wanted` names each picture's degradations with their severity in (0, 1]; one that left nothing to see counts as 0.
    `drawn` are the scenes' layers where they are drawn already: drawing costs more than spoiling.
    """
    clean, spoiled = [], []
    done = torch.zeros(len(scenes), len(KINDS))
    for i, (scene, objects, kinds) in enumerate(zip(scenes, drawn or layers(scenes, rng), wanted, strict=True)):
        clean.append(compose(scene, objects))
        image = clean[-1]
        for kind in [k for k in OBJECT_KINDS if k in kinds]:
            objects = OBJECT_KINDS[kind](objects, kinds[kind], rng)  # noqa: PLW2901
            before, image = image, compose(scene, objects)
            done[i, KINDS.index(kind)] = kinds[kind] * _seen(before, image)
        for kind in [k for k in PICTURE_KINDS if k in kinds]:
            before, image = image, PICTURE_KINDS[kind](image[None], kinds[kind], rng)[0].clamp(0, 1)
            done[i, KINDS.index(kind)] = kinds[kind] * _seen(before, image)
        spoiled.append(image)
    return torch.stack(clean), torch.stack(spoiled), done


def complete_all(scenes: list[Scene], rng: np.random.Generator) -> list[Scene]:
    return [complete(scene, rng) for scene in scenes]


def _seen(before: Tensor, after: Tensor) -> float:
    return float((after - before).abs().mean() > VISIBLE)


# --- objects ---


def _detail(objects: list[Layer], s: float, rng: np.random.Generator) -> list[Layer]:
    """Texture fades to its mean and the outline to a rounded blob with a sharp edge."""
    sigma = 1.5 + 2.0 * s
    spoiled = []
    for layer in objects:
        soft = _gaussian(layer.alpha[None], sigma)[0]
        edge = soft - 0.5 * soft.max()
        alpha = (0.5 + edge * sigma * 2.5).clamp(0, 1)
        mean = (layer.colour * layer.alpha).sum((1, 2), keepdim=True) / layer.alpha.sum().clamp(min=1e-3)
        # Where the blob is larger than the object there is no colour of its own to keep.
        colour = layer.colour + min(1.0, 0.4 + s) * (mean - layer.colour)
        colour = torch.where(layer.alpha > 0.5, colour, mean)
        spoiled.append(Layer(alpha, colour, layer.centre))
    return spoiled


def _harmony(objects: list[Layer], s: float, rng: np.random.Generator) -> list[Layer]:
    """Every object is painted over in two neon tones that meet in a line through its centre."""
    spoiled = []
    for layer in objects:
        first, second = (_NEON[i][:, None, None] for i in rng.permutation(len(_NEON))[:2])
        paint = torch.where(_side_of(layer.centre, rng.uniform(0, 2 * np.pi)) > 0, first, second)
        spoiled.append(replace(layer, colour=layer.colour + (0.35 + 0.6 * s) * (paint - layer.colour)))
    return spoiled


def _integrity(objects: list[Layer], s: float, rng: np.random.Generator) -> list[Layer]:
    """Every object is cut in two, the halves pulled apart and slid along the cut."""
    spoiled = []
    for layer in objects:
        angle = rng.uniform(0, 2 * np.pi)
        normal, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        far = (1.2 + 1.8 * s) * normal + (1.5 + 2.5 * s) * along
        dx, dy = (int(v) for v in np.round(far))
        half = (_side_of(layer.centre, angle) > 0).float()[None]
        one, other = _shift(layer.alpha * half, dx, dy), _shift(layer.alpha * (1 - half), -dx, -dy)
        colour = torch.where(one > other, _shift(layer.colour, dx, dy), _shift(layer.colour, -dx, -dy))
        spoiled.append(Layer(torch.maximum(one, other), colour, layer.centre))
    return spoiled


def _layout(objects: list[Layer], s: float, rng: np.random.Generator) -> list[Layer]:
    """Every object leaves its cell, by up to half of the way to the next, without touching another or the frame."""
    length = 5.0 + 5.5 * s
    moved: list[Layer] = []
    taken = torch.zeros(1, SIDE, SIDE)
    for layer in objects:
        _, rows, columns = torch.nonzero(layer.alpha > 0.3, as_tuple=True)
        low = -np.array([int(columns.min()), int(rows.min())])
        high = SIDE - 1 - np.array([int(columns.max()), int(rows.max())])
        best: tuple[float, Layer] | None = None
        for angle in rng.uniform(0, 2 * np.pi, size=10):
            d = np.round(length * np.array([np.cos(angle), np.sin(angle)])).clip(low, high).astype(int)
            dx, dy = int(d[0]), int(d[1])
            alpha = _shift(layer.alpha, dx, dy)
            cost = float((alpha * taken).sum()) + 3 * max(0.0, length - float(np.hypot(dx, dy)))
            if best is None or cost < best[0]:
                best = cost, Layer(alpha, _shift(layer.colour, dx, dy), (layer.centre[0] + dx, layer.centre[1] + dy))
            if cost < 3:
                break
        assert best
        moved.append(best[1])
        taken = torch.maximum(taken, best[1].alpha)
    return moved


# --- pictures (1, 3, h, w) ---


def _consistency(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """One half gets diagonal hatching, as if another hand had drawn it."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    slope = 1 if rng.random() < 0.5 else -1
    hatch = (0.5 + 1.5 * torch.sin((x + slope * y) * (2 * torch.pi / 7) + rng.uniform(0, 6))).clamp(0, 1)
    cut, axis = rng.uniform(0.35, 0.65) * SIDE, x if rng.random() < 0.5 else y
    half = axis < cut if rng.random() < 0.5 else axis > cut
    weight = (0.2 + 0.4 * s) * hatch * half
    # Towards black on light ground, towards white on dark: seen on any colour.
    return image + weight * ((image.mean(1, keepdim=True) < 0.5).float() - image)


def _color(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Saturation sinks and a cast of a random hue lies over everything."""
    grey = image.mean(1, keepdim=True)
    hue = rng.uniform(0, 2 * np.pi)
    cast = torch.tensor([np.cos(hue + k * 2 * np.pi / 3) for k in range(3)], dtype=torch.float32)[:, None, None]
    return image + (0.2 + 0.4 * s) * (grey - image) + (0.1 + 0.2 * s) * cast


def _clarity(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Grey haze takes the contrast."""
    return image + (0.3 + 0.4 * s) * (rng.uniform(0.6, 0.8) - image)


def _sharpness(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    return _gaussian(image, 0.7 + 1.3 * s)


def _definition(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    """Fewer pixels, shown as blocks."""
    side = round(SIDE / (1.7 + 2.3 * s))
    return F.interpolate(F.interpolate(image, (side, side), mode="area"), (SIDE, SIDE), mode="nearest")


def _realism(image: Tensor, s: float, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(image.shape)).float()
    return image + (0.05 + 0.2 * s) * noise


def _gaussian(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (B, C, h, w); borders repeat."""
    reach = int(3 * sigma + 1)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).repeat(image.shape[1], 1, 1)
    image = F.pad(image, (reach,) * 4, mode="replicate")
    image = F.conv2d(image, kernel[:, :, None, :], groups=image.shape[1])
    return F.conv2d(image, kernel[:, :, :, None], groups=image.shape[1])


def _shift(image: Tensor, dx: int, dy: int) -> Tensor:
    """(C, h, w) moved by whole pixels to the right and down; what comes in is zero."""
    padded = F.pad(image, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)))
    top, left = max(-dy, 0), max(-dx, 0)
    return padded[:, top : top + SIDE, left : left + SIDE]


def _side_of(centre: tuple[float, float], angle: float) -> Tensor:
    """Signed distance (h, w) to the line through a centre."""
    axis = torch.arange(SIDE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return (x - centre[0]) * float(np.cos(angle)) + (y - centre[1]) * float(np.sin(angle))


OBJECT_KINDS: dict[str, Callable[[list[Layer], float, np.random.Generator], list[Layer]]] = {
    "detail": _detail, "harmony": _harmony, "integrity": _integrity, "layout": _layout,
}  # fmt: skip
PICTURE_KINDS: dict[str, Callable[[Tensor, float, np.random.Generator], Tensor]] = {
    "consistency": _consistency, "color": _color, "clarity": _clarity,
    "sharpness": _sharpness, "definition": _definition, "realism": _realism,
}  # fmt: skip
