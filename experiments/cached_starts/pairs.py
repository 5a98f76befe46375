"""Pairs of prompts over the whole range of similarity: another wording, a few attributes changed, another scene.

Random pairs of scenes are rarely alike, and a cache is asked about those that are; so each prompt is given the source,
among some of each kind, that lies in the bin of similarity whose turn it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.prepare import prompts_of
from experiments.workloads import load_workload
from experiments.workloads.prompts import generator
from relay.errors import BadRequest
from relay.scenes.language import Group, Scene, parse
from relay.scenes.sampling import caption
from relay.scenes.vocabulary import COLOURS, LETTERS, PLACES, SHAPES, SIZES, TEXTURES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from relay.family import Family

BINS = (-1.0, 0.3, 0.5, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0 + 1e-6)  # of cosine; the paper's thresholds among them
WORDINGS, EDITS, OTHERS = 3, 9, 60  # sources to choose from, of each kind


@dataclass(frozen=True)
class Pair:
    """A prompt and the prompt whose latent it starts from. `index` counts within the split."""

    index: int
    split: str
    prompt: str
    scene: Scene
    source: str
    source_scene: Scene
    kind: str  # wording | edit | other
    similarity: float


def embed(family: Family, texts: Sequence[str]) -> NDArray[np.float32]:
    """Unit vectors (B, P) whose dot products are similarities: the pooled embeddings, as edge nodes compare them."""
    pooled = family.text.encode(list(texts), None, False, family.spec.sizes.default).pooled.float().cpu().numpy()
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def make_pairs(family: Family, split: str, count: int, seed: int = 0) -> list[Pair]:
    """`count` prompts of a split, each with one source; the same for the same family, split, count and seed."""
    spec = {"name": "scenes", "split": split, "seed": seed}
    targets = prompts_of(load_workload("scenes"), spec | {"count": count})
    others = prompts_of(load_workload("scenes"), spec | {"count": OTHERS * 2, "seed": seed + 1})
    other_vectors = embed(family, [each.text for each in others])
    found = []
    for index, target in enumerate(targets):
        scene, rng = parse(target.scene or target.text), generator(seed, f"{split} {index}")
        sources = _near(scene, target.text, rng)
        picked = rng.permutation(len(others))[:OTHERS]
        sources += [("other", parse(others[i].scene or others[i].text), others[i].text) for i in picked]
        near = len(sources) - len(picked)
        vectors = embed(family, [target.text, *(text for _, _, text in sources[:near])])
        alike = np.concatenate([vectors[1:], other_vectors[picked]]) @ vectors[0]
        chosen = _in_bin(alike, index % (len(BINS) - 1), rng)
        kind, source_scene, source = sources[chosen]
        found.append(Pair(index, split, target.text, scene, source, source_scene, kind, float(alike[chosen])))
    return found


def _in_bin(alike: NDArray[np.float32], turn: int, rng: np.random.Generator) -> int:
    """One whose similarity lies in the bin, at random; the nearest to its middle where none does."""
    low, high = BINS[turn], BINS[turn + 1]
    inside = np.flatnonzero((alike >= low) & (alike < high))
    return int(rng.choice(inside) if len(inside) else np.argmin(np.abs(alike - (low + high) / 2)))


def _near(scene: Scene, text: str, rng: np.random.Generator) -> list[tuple[str, Scene, str]]:
    """Other wordings of a scene, and scenes that differ from it in one to three attributes."""
    found = [("wording", scene, said) for said in {caption(scene, rng) for _ in range(WORDINGS)} if said != text]
    for i in range(EDITS):
        changed = edited(scene, 1 + i % 3, rng)
        found.append(("edit", changed, caption(changed, rng)))
    return found


def edited(scene: Scene, changes: int, rng: np.random.Generator) -> Scene:
    """A scene of the same class that differs in so many attributes (fewer where two changes meet)."""
    for _ in range(50):
        changed = scene
        for _ in range(changes):
            changed = _changed(changed, rng)
        try:
            if changed != scene and parse(changed.text()) == changed:
                return changed
        except BadRequest:
            continue
    raise BadRequest(f"no scene was found that is like {scene.text()!r}")


def _changed(scene: Scene, rng: np.random.Generator) -> Scene:
    def pick(values: Sequence[str], but: Sequence[str | None]) -> str:
        return str(rng.choice([value for value in values if value not in but]))

    if rng.random() < 0.15:
        inks = [scene.word_colour, scene.background, *(group.colour for group in scene.groups)]
        return replace(scene, background=pick(COLOURS, inks))
    if scene.word:
        if rng.random() < 0.4:
            return replace(scene, word_colour=pick(COLOURS, [scene.word_colour, scene.background]))
        at = int(rng.integers(len(scene.word)))
        return replace(
            scene, word=scene.word[:at] + pick(LETTERS, [scene.word[at]]) + scene.word[at + 1 :]
        )  # fmt: skip
    number = int(rng.integers(len(scene.groups)))
    group = scene.groups[number]
    taken = [each.place for each in scene.groups]
    key = str(rng.choice(["shape", "colour", "texture", "size", "place"] if group.count == 1 else ["shape", "colour"]))
    values: dict[str, tuple[Sequence[str], Sequence[str | None]]] = {
        "shape": (SHAPES, [group.shape]), "colour": (COLOURS, [group.colour, scene.background]),
        "texture": (TEXTURES, [group.texture]), "size": (SIZES, [group.size]), "place": (PLACES, taken),
    }  # fmt: skip
    changed: dict[str, Any] = {key: pick(*values[key])}
    other: Group = replace(group, **changed)
    return replace(scene, groups=(*scene.groups[:number], other, *scene.groups[number + 1 :]))
