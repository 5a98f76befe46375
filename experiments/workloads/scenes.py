"""Prompts in the scene language, by class. Scenes are endless; a scene's split is `relay.scenes.sampling.split_of`.

Classes: "1" to "4" (that many objects), "letters", and two narrower ones whose prompts keep their number as complexity:

    objects      the same as "1", "2", "3", "4"
    attributes   two objects, each with size, colour and texture said, all of which differ: what binding is measured on
    relations    two to four objects, at least one placed by another one ("to the left of it")
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec

from experiments.workloads.prompts import Prompt, check_ask, generator
from relay.errors import BadRequest
from relay.scenes.language import Scene
from relay.scenes.sampling import COMPLEXITIES, caption, scene_stream
from relay.scenes.vocabulary import RELATIONS

_COMPLEXITY = {"attributes": "2", "relations": None}  # what is drawn, to choose from
KINDS = tuple(_COMPLEXITY)
MOST = (
    2000  # prompts a class: of single objects only about 5,000 scenes are held out, and drawing the last takes for ever
)
_WORDINGS = 12  # tries to word a scene with a relation before the next scene is taken


class Scenes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Scene prompts, evenly spread over `classes`, in class order."""

    classes: tuple[str, ...] = COMPLEXITIES
    name: str = "scenes"

    def __post_init__(self) -> None:
        known = (*COMPLEXITIES, "objects", *KINDS)
        for each in self.classes:
            if each not in known:
                raise BadRequest(
                    f"workload {self.name}: unknown class {each!r} in `classes`: choose of {', '.join(known)}"
                )
        if not self.classes:
            raise BadRequest(f"workload {self.name}: `classes` is empty: choose of {', '.join(known)}")

    def prompts(self, split: str, count: int, seed: int) -> list[Prompt]:
        check_ask(self.name, split, count)
        parts = [p for each in self.classes for p in (COMPLEXITIES[:4] if each == "objects" else (each,))]
        classes = tuple(dict.fromkeys(parts))
        if count > MOST * len(classes):
            raise BadRequest(
                f"workload {self.name}: at most {MOST} prompts a class, not {count} of {len(classes)} classes"
            )
        found: dict[str, Prompt] = {}  # by canonical caption; for the number classes the scenes are those of `held_out`
        for i, each in enumerate(classes):
            until = len(found) + count // len(classes) + (i < count % len(classes))
            scenes = scene_stream(seed, split, _COMPLEXITY.get(each, each))
            while len(found) < until:
                scene = next(scenes)
                if scene.text() not in found and (text := _wording(scene, seed, each)):
                    found[scene.text()] = Prompt(text, scene.complexity, scene.text(), _key(split, text))
        return list(found.values())


def _wording(scene: Scene, seed: int, kind: str) -> str | None:
    """A caption that fits the kind, None where the scene has none."""
    rng = generator(seed, scene.text())
    if kind not in KINDS:
        return caption(scene, rng)
    if kind == "attributes":
        one, *rest = scene.groups
        if len(rest) != 1:
            return None
        said = [(getattr(one, key), getattr(rest[0], key)) for key in ("shape", "size", "colour", "texture")]
        return caption(scene, rng) if all(a and b and a != b for a, b in said) else None
    if len(scene.groups) < 2:
        return None
    wordings = (caption(scene, rng) for _ in range(_WORDINGS))
    return next((text for text in wordings if any(relation in text.lower() for relation in RELATIONS)), None)


def _key(split: str, text: str) -> str:
    return f"scenes/{split}/{blake2b(text.encode(), digest_size=6).hexdigest()}"
