"""Prompt and Workload: what every source of prompts offers, and which split a text belongs to.

A split is a property of the prompt, never of the seed or the file, so a policy cannot be trained on what it is judged on.
"""

from __future__ import annotations

import unicodedata
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np

from relay.errors import BadRequest
from relay.scenes.language import Scene, parse
from relay.scenes.sampling import split_of

SPLITS = ("train", "validation", "test")
ALL = "all"  # a whole file, for runs nothing is learned from; the name goes with the rows
_BUCKETS = ("train",) * 8 + ("validation",) * 4 + ("test",) * 4  # a file of some hundred lines still has a test split


class Prompt(msgspec.Struct, frozen=True):
    """One prompt and where it comes from."""

    text: str
    complexity: str  # "1" to "4" objects, "letters", or "?" where the text is no scene
    scene: str | None  # canonical caption of what the image must show, where that is known
    key: str  # stable name within its source: scenes/test/8f3a..., prompts.txt:12, coco:1077


@runtime_checkable
class Workload(Protocol):
    """A source of prompts. Same split, count and seed: same prompts; splits share no prompt."""

    @property
    def name(self) -> str: ...

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        """`count` different prompts of a split; BadRequest where the source has fewer."""
        ...


def normalised(text: str) -> str:
    """What two writings of one prompt share: case, width of characters, spacing and closing stop are dropped."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .")


def split_of_text(text: str) -> str:
    """The split of a free text: half train, a quarter validation, a quarter test, by a hash of its normalised form."""
    return _BUCKETS[blake2b(normalised(text).encode(), digest_size=2).digest()[0] % len(_BUCKETS)]


def scene_of(text: str) -> Scene | None:
    """The scene that a text describes, None where it is outside the scene language."""
    try:
        return parse(text)
    except BadRequest:
        return None


def prompt_split(scene: Scene | None, text: str) -> str:
    """A scene's split is the scenes' own, so that a file cannot bring held-out scenes into training, or the reverse."""
    return split_of(scene) if scene else split_of_text(text)


def check_ask(name: str, split: str, count: int, splits: tuple[str, ...] = SPLITS) -> None:
    """Refuse a split or a count that no workload has."""
    if split not in splits:
        raise BadRequest(f"workload {name}: unknown split {split!r}: choose one of {', '.join(splits)}")
    if count < 1:
        raise BadRequest(f"workload {name}: count must be at least 1, not {count}")


def generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own per purpose: one seed gives times, prompts and preferences that say nothing of each other."""
    if seed < 0:
        raise BadRequest(f"seed must be at least 0, not {seed}")
    return np.random.default_rng([seed, int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest())])
