"""Random scenes and captions, seeded, in splits that never mix.

A scene belongs to the split that a hash of its canonical caption names, so a training run cannot meet a held-out
prompt whatever its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from relay.scenes.language import Group, Scene, with_article
from relay.scenes.vocabulary import (
    COLOURS,
    COUNTS,
    LETTERS,
    PLACE_WORDS,
    PLACES,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    SIZES,
    TEXTURE_WORDS,
    TEXTURES,
    neighbour,
)

DATA_VERSION = 1
COMPLEXITIES = ("1", "2", "3", "4", "letters")
_BUCKETS = 16  # 14 of 16 train, 1 validation, 1 test


def split_of(scene: Scene) -> str:
    """ "train", "validation" or "test": a property of the scene, not of the seed that drew it."""
    bucket = hashlib.blake2b(scene.text().encode(), digest_size=2).digest()[0] % _BUCKETS
    return {0: "validation", 1: "test"}.get(bucket, "train")


def sample_scene(rng: np.random.Generator, complexity: str | None = None) -> Scene:
    """One scene of a complexity class (default: any), attributes dropped now and then."""
    if complexity is None:
        complexity = COMPLEXITIES[rng.choice(5, p=[0.2, 0.2, 0.2, 0.25, 0.15])]
    background = COLOURS[rng.integers(8)]
    inks = [c for c in COLOURS if c != background]
    if complexity == "letters":
        word = "".join(LETTERS[i] for i in rng.integers(26, size=rng.choice([1, 2, 3], p=[0.25, 0.3, 0.45])))
        return Scene((), _maybe(rng, 0.9, background), word, _maybe(rng, 0.9, inks[rng.integers(7)]))
    cells = [PLACES[i] for i in rng.permutation(9)]
    groups: list[Group] = []
    left = int(complexity)
    while left:
        count = int(rng.integers(2, left + 1)) if left > 1 and rng.random() < 0.06 else 1
        group = Group(
            shape=SHAPES[rng.integers(8)],
            count=count,
            colour=_maybe(rng, 0.95, inks[rng.integers(7)]),
            texture=_maybe(rng, 0.8, TEXTURES[rng.integers(4)]),
            size=_maybe(rng, 0.8, SIZES[rng.integers(2)]),
            place=_maybe(rng, 0.85, cells.pop()) if count == 1 else None,
        )
        if group.place is None and any(g.place is None and g.shape == group.shape for g in groups):
            continue  # two unplaced groups of one shape would make one caption mean two scenes
        groups.append(group)
        left -= count
    return Scene(tuple(groups), _maybe(rng, 0.9, background))


def scene_stream(seed: int, split: str, complexity: str | None = None) -> Iterator[Scene]:
    """Endless scenes of one split; the same seed gives the same stream."""
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng, complexity)
        if split_of(scene) == split:
            yield scene


def held_out(
    count: int, split: str = "test", seed: int = 0, complexities: tuple[str, ...] = COMPLEXITIES
) -> list[Scene]:
    """`count` different held-out scenes spread evenly over the complexity classes, in class order."""
    scenes: list[Scene] = []
    for i, complexity in enumerate(complexities):
        share = count // len(complexities) + (i < count % len(complexities))
        seen: dict[str, Scene] = {}
        for scene in scene_stream(seed, split, complexity):
            if len(seen) == share:
                break
            seen.setdefault(scene.text(), scene)
        scenes += seen.values()
    return scenes


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many wordings of a scene: synonyms, attribute order, clause order of the place, background first."""
    if scene.word:
        body = _letter_caption(scene, rng)
    else:
        order = rng.permutation(len(scene.groups))
        clauses = _clauses([scene.groups[i] for i in order], rng)
        joined = ", ".join(clauses[:-1])
        last = " and " if rng.random() < 0.6 else ", "
        body = clauses[0] if len(clauses) == 1 else joined + last + clauses[-1]
    if scene.background:
        ground = f"on {with_article(scene.background)} background"
        if rng.random() < 0.15:
            body = f"{ground}, {body}"
        else:
            body += (", " if rng.random() < 0.5 else " ") + ground
    if rng.random() < 0.05 and not body.startswith("on "):
        body = "a picture of " + body
    return body[0].upper() + body[1:] if rng.random() < 0.1 else body


def _maybe(rng: np.random.Generator, probability: float, value: str) -> str | None:
    return value if rng.random() < probability else None


def _pick(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[0] if rng.random() < 0.7 else words[rng.integers(len(words))]


def _letter_caption(scene: Scene, rng: np.random.Generator) -> str:
    assert scene.word
    noun = "letter" if len(scene.word) == 1 else _pick(rng, ("word", "letters"))
    ink = f" in {scene.word_colour}" if scene.word_colour else ""
    if scene.word_colour and rng.random() < 0.3:
        return f'{with_article(scene.word_colour)} {noun} "{scene.word}"'
    return f'the {noun} "{scene.word}"{ink}'


def _clauses(groups: list[Group], rng: np.random.Generator) -> list[str]:
    clauses = []
    previous: Group | None = None
    for group in groups:
        clauses.append(_clause(group, previous, rng))
        previous = group
    return clauses


def _clause(group: Group, previous: Group | None, rng: np.random.Generator) -> str:
    adjectives = []
    if group.size:
        adjectives.append(_pick(rng, SIZE_WORDS[group.size]))
    if group.colour:
        adjectives.append(group.colour)
    texture = _pick(rng, TEXTURE_WORDS[group.texture]) if group.texture else ""
    if texture and not texture.startswith("with"):
        adjectives.append(texture)
    if rng.random() < 0.3:
        adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    noun = group.shape if group.count == 1 else PLURALS[group.shape]
    words = [*adjectives, noun] + ([texture] if texture.startswith("with") else [])
    phrase = " ".join(words)
    thing = with_article(phrase) if group.count == 1 else f"{COUNTS[group.count - 1]} {phrase}"
    if not group.place:
        return thing
    if previous and previous.place and rng.random() < 0.25:
        for relation in RELATIONS:
            if neighbour(previous.place, relation) == group.place:
                return f"{thing} {'to the ' if ' of ' in relation else ''}{relation}"
    where = f"{_pick(rng, ('at', 'in'))} the {_pick(rng, PLACE_WORDS[group.place])}"
    return f"{where} {thing}" if rng.random() < 0.15 else f"{thing} {where}"


def complete(scene: Scene, rng: np.random.Generator) -> Scene:
    """Fill in what the caption left open, as a drawing must: one object a group, each in a cell of its own.

    Texture is plain and the background white (black, ... where an object is white) when unsaid; colour, size and place are free.
    """
    used = {g.colour for g in scene.groups} | {scene.word_colour}
    background = scene.background or next(c for c in ("white", "black", *COLOURS) if c not in used)
    inks = [c for c in COLOURS if c != background]
    free = [p for p in rng.permutation(np.array(PLACES)).tolist() if p not in {g.place for g in scene.groups}]
    objects = []
    for group in scene.groups:
        colour = group.colour or inks[rng.integers(7)]
        for _ in range(group.count):
            size = group.size or SIZES[rng.integers(2)]
            place = group.place or free.pop()
            objects.append(
                replace(group, count=1, colour=colour, texture=group.texture or "plain", size=size, place=place)
            )
    ink = (scene.word_colour or inks[rng.integers(7)]) if scene.word else None
    return Scene(tuple(objects), background, scene.word, ink)
