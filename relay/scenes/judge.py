"""The scene judge: does an image show what its prompt asked for?

In the manner of GenEval (Ghosh et al. 2023): a detector says what is there, plain rules compare it with what was said.
Only what the prompt says is scored. A missing object makes all its attributes wrong, an unasked extra one counts as
one more wrong attribute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING

from relay.scenes.language import Group, Scene

if TYPE_CHECKING:
    from torch import Tensor

    from relay.scenes.detector import Seen

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "attribute_binding", "letters")


@dataclass(frozen=True)
class Verdict:
    """One image's score. `attributes`: share of what was asked that is right; `strict`: all right and nothing extra.

    `parts` holds (right, asked) per kind: presence, shape, colour, texture, size, background, extra, letter, ink.
    `categories` holds GenEval's, each True or False where the prompt asks for it.
    """

    attributes: float
    strict: bool
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    categories: dict[str, bool] = field(default_factory=dict)


def judge(images: Tensor, scenes: list[Scene], batch: int = 64) -> list[Verdict]:
    """Score images (B, 3, h, w) in [-1, 1] against what was asked of each."""
    from relay.scenes.detector import load_detector

    seen = load_detector().see(images, batch)
    return [compare(scene, what) for scene, what in zip(scenes, seen, strict=True)]


def compare(asked: Scene, seen: Seen) -> Verdict:
    """The rules, without a model: what was asked against what was seen."""
    parts: dict[str, tuple[int, int]] = {}

    def count(kind: str, right: bool) -> None:
        so_far = parts.get(kind, (0, 0))
        parts[kind] = (so_far[0] + right, so_far[1] + 1)

    if asked.background:
        count("background", asked.background == seen.background)
    categories = _judge_word(asked, seen, count) if asked.word else _judge_objects(asked, seen, count)
    right, total = (sum(values) for values in zip(*parts.values(), strict=True))
    return Verdict(right / total, right == total, parts, categories)


def _judge_word(asked: Scene, seen: Seen, count) -> dict[str, bool]:  # noqa: ANN001
    assert asked.word
    for i, letter in enumerate(asked.word):
        count("letter", seen.word[i : i + 1] == letter)
    for _ in range(len(seen.word) - len(asked.word)):
        count("extra", False)
    if asked.word_colour:
        count("ink", asked.word_colour == seen.ink)
    for _ in seen.objects:
        count("extra", False)
    return {"letters": seen.word == asked.word}


def _judge_objects(asked: Scene, seen: Seen, count) -> dict[str, bool]:  # noqa: ANN001
    wanted = [group for group in asked.groups for _ in range(group.count)]
    pairs = match_objects(wanted, list(seen.objects))
    right: dict[str, list[bool]] = {"shape": [], "colour": [], "texture": [], "size": []}
    for want, got in pairs:
        count("presence", got is not None)
        for kind, answers in right.items():
            if (value := getattr(want, kind)) is not None:
                answers.append(got is not None and getattr(got, kind) == value)
                count(kind, answers[-1])
    extra = len(seen.objects) - sum(got is not None for _, got in pairs) + len(seen.word)
    for _ in range(extra):
        count("extra", False)
    shapes = all(right["shape"])
    categories = {"counting": len(seen.objects) == len(wanted), "colours": all(right["colour"])}
    if len(wanted) <= 2:
        categories["single_object" if len(wanted) == 1 else "two_objects"] = shapes
    if any(want.place for want in wanted):
        categories["position"] = all(got is not None and got.shape == want.shape for want, got in pairs if want.place)
    if len(wanted) > 1:
        categories["attribute_binding"] = all(all(answers) for answers in right.values())
    return categories


def match_objects(wanted: list[Group], seen: list[Group]) -> list[tuple[Group, Group | None]]:
    """Pair what was asked with what was seen: a placed object with what stands there, the others as well as can be."""
    by_place = {got.place: got for got in seen}
    pairs: dict[int, Group | None] = {i: by_place.get(w.place) for i, w in enumerate(wanted) if w.place}
    free = [got for got in seen if got not in pairs.values()]
    open_ = [i for i, w in enumerate(wanted) if not w.place]
    slots: list[Group | None] = [*free, *[None] * max(0, len(open_) - len(free))]
    best = max(permutations(slots, len(open_)), key=lambda p: sum(map(_agreement, [wanted[i] for i in open_], p)))
    pairs |= dict(zip(open_, best, strict=True))
    return [(w, pairs[i]) for i, w in enumerate(wanted)]


def _agreement(want: Group, got: Group | None) -> int:
    if got is None:
        return 0
    return (
        1
        + 2 * (want.shape == got.shape)
        + sum(getattr(want, kind) in (None, getattr(got, kind)) for kind in ("colour", "texture", "size"))
    )
