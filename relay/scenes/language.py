"""The scene language: a caption says what an image must show, and the reader says back exactly that.

`Scene` is the meaning of a caption: what is unsaid is None. `parse` reads a caption, `Scene.text` writes the
canonical one; `relay.scenes.sampling` writes varied ones. The language knows nothing of pixels or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from relay.errors import BadRequest
from relay.scenes.vocabulary import (
    COLOURS,
    COUNTS,
    LETTERS,
    MAX_LETTERS,
    MAX_OBJECTS,
    PLACE_WORDS,
    PLURALS,
    RELATIONS,
    SHAPES,
    SIZE_WORDS,
    TEXTURE_WORDS,
    neighbour,
)

EXAMPLES = (
    "a large red striped heart at the top left and a small blue circle at the bottom, on a yellow background",
    'the word "CAT" in red on a white background',
)


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Group:
    """`count` alike objects; an attribute that was not named is None. Only a single object has a place."""

    shape: str
    count: int = 1
    colour: str | None = None
    texture: str | None = None
    size: str | None = None
    place: str | None = None

    def text(self) -> str:
        words = [w for w in (self.size, self.colour, self.texture) if w]
        words.append(self.shape if self.count == 1 else PLURALS[self.shape])
        phrase = with_article(" ".join(words)) if self.count == 1 else f"{COUNTS[self.count - 1]} {' '.join(words)}"
        return phrase + (f" at the {self.place}" if self.place else "")


@dataclass(frozen=True)
class Scene:
    """What an image must show: groups of objects, or one word of 1 to 3 capitals, on a background."""

    groups: tuple[Group, ...] = ()
    background: str | None = None
    word: str | None = None
    word_colour: str | None = None

    @property
    def objects(self) -> int:
        return sum(group.count for group in self.groups)

    @property
    def complexity(self) -> str:
        """The complexity class: "letters", or the number of objects as "1" to "4"."""
        return "letters" if self.word else str(self.objects)

    def text(self) -> str:
        """The canonical caption; `parse(scene.text()) == scene`."""
        ground = f"on {with_article(self.background)} background" if self.background else ""
        if self.word:
            noun = "letter" if len(self.word) == 1 else "word"
            ink = f" in {self.word_colour}" if self.word_colour else ""
            return f'the {noun} "{self.word}"{ink}' + (f" {ground}" if ground else "")
        parts = [group.text() for group in self.groups]
        body = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        return body + (f", {ground}" if ground else "")


def _flat(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {said: meant for meant, variants in words.items() for said in variants}


_SIZE, _TEXTURE, _PLACE = _flat(SIZE_WORDS), _flat(TEXTURE_WORDS), _flat(PLACE_WORDS)
_SHAPE = {**{s: (s, False) for s in SHAPES}, **{p: (s, True) for s, p in PLURALS.items()}}
_COUNT = {"a": 1, "an": 1, "one": 1, "the": 1} | {word: i + 1 for i, word in enumerate(COUNTS) if i}
_FILLER = {"a", "an", "at", "in", "to", "the", "picture", "of", "image", "drawing"}
_KNOWN = {w for d in (_SIZE, _TEXTURE, _PLACE, RELATIONS) for said in d for w in said.split()}
_KNOWN |= set(_SHAPE) | set(_COUNT) | set(COLOURS) | _FILLER | {"on", "and", "background", "word", "letter", "letters"}

# Longest phrases first, so that "top left" is one token; a quoted word keeps its capitals.
_PHRASES = sorted([*_SIZE, *_TEXTURE, *_PLACE, *RELATIONS], key=len, reverse=True)
_TOKEN = re.compile(r'"[^"]*"|' + "|".join(re.escape(p) + r"\b" for p in _PHRASES) + r"|[^\W\d_]+|\d+|[^\s\w]")


def parse(caption: str) -> Scene:
    """Read a caption. Raises `BadRequest` (one line, with a prompt that works) for anything outside the language."""
    if not caption.strip():
        raise BadRequest(f"the prompt is empty; try: {EXAMPLES[0]}")
    quoted = re.sub(r"[“”]", '"', caption.strip().rstrip("."))
    lowered = "".join(part if i % 2 else part.lower() for i, part in enumerate(re.split(r'("[^"]*")', quoted)))
    tokens = _TOKEN.findall(lowered)
    unknown = [t for t in tokens if not t.startswith('"') and t not in {",", "-", ":"} and not _knows(t)]
    if unknown:
        words = ", ".join(f"'{w}'" for w in dict.fromkeys(unknown))
        raise BadRequest(f"the scene language has no word {words}; try: {EXAMPLES[0]}")
    return _Reader(tokens).scene()


def _knows(token: str) -> bool:
    return token in _KNOWN or all(word in _KNOWN for word in token.split())


class _Reader:
    """Reads a token list from left to right; one clause per object, ended by a comma, "and" or the next article."""

    def __init__(self, tokens: list[str]):
        self.tokens = [t for t in tokens if t not in {"-", ":"}]

    def scene(self) -> Scene:
        background, rest = self._background(self.tokens)
        quotes = [t for t in rest if t.startswith('"')]
        if quotes or any(t in {"word", "letter", "letters"} for t in rest):
            return self._letters(rest, quotes, background)
        groups: list[Group] = []
        for clause in self._clauses(rest):
            groups.append(self._group(clause, groups))
        return self._checked(Scene(tuple(groups), background))

    def _background(self, tokens: list[str]) -> tuple[str | None, list[str]]:
        if "background" not in tokens:
            return None, tokens
        end = tokens.index("background")
        if end == 0 or tokens[end - 1] not in COLOURS:
            raise BadRequest(f"the background needs a colour ({', '.join(COLOURS)}); try: {EXAMPLES[0]}")
        start = end - 1
        while start > 0 and tokens[start - 1] in {"on", "a", "an", "the"}:
            start -= 1
        if "background" in tokens[end + 1 :]:
            raise BadRequest(f"the prompt names two backgrounds; try: {EXAMPLES[0]}")
        return tokens[end - 1], [*tokens[:start], ",", *tokens[end + 1 :]]

    def _letters(self, tokens: list[str], quotes: list[str], background: str | None) -> Scene:
        words = [q.strip('"').strip() for q in quotes]
        good = len(words) == 1 and 1 <= len(words[0]) <= MAX_LETTERS and all(c in LETTERS for c in words[0])
        if not good:
            raise BadRequest(
                f"one word of 1 to {MAX_LETTERS} capitals in double quotes can be drawn; try: {EXAMPLES[1]}"
            )
        colours = [t for t in tokens if t in COLOURS]
        rest = [t for t in tokens if t not in _FILLER | set(COLOURS) | {",", "on", "word", "letter", "letters"}]
        rest = [t for t in rest if not t.startswith('"')]
        if rest or len(colours) > 1:
            said = " ".join(rest) or " and ".join(colours)
            raise BadRequest(f"a word has one colour and a background, not '{said}'; try: {EXAMPLES[1]}")
        return self._checked(Scene((), background, words[0], colours[0] if colours else None))

    def _clauses(self, tokens: list[str]) -> list[list[str]]:
        clauses: list[list[str]] = [[]]
        for token in tokens:
            if token in {",", "and"}:
                clauses.append([])
            else:
                clauses[-1].append(token)
        clauses = [c for c in clauses if any(t not in _FILLER for t in c)]
        if not clauses:
            raise BadRequest(f"the prompt names no object; try: {EXAMPLES[0]}")
        return clauses

    def _group(self, clause: list[str], before: list[Group]) -> Group:
        said = " ".join(clause)
        found: dict[str, str] = {}
        count, plural = 1, False

        def take(kind: str, value: str) -> None:
            if kind in found:
                raise BadRequest(f"'{said}' names two {kind}s; put a comma between objects; try: {EXAMPLES[0]}")
            found[kind] = value

        for token in clause:
            if token in _SHAPE:
                name, plural = _SHAPE[token]
                take("shape", name)
            elif token in COLOURS:
                take("colour", token)
            elif token in _TEXTURE:
                take("texture", _TEXTURE[token])
            elif token in _SIZE:
                take("size", _SIZE[token])
            elif token in _PLACE:
                take("place", _PLACE[token])
            elif token in RELATIONS:
                take("place", self._related(token, before, said))
            elif token in _COUNT and token not in _FILLER:
                count = max(count, _COUNT[token])
            elif token not in _FILLER:
                raise BadRequest(f"'{token}' cannot stand in '{said}'; try: {EXAMPLES[0]}")
        if "shape" not in found:
            raise BadRequest(f"'{said}' names no shape ({', '.join(SHAPES)}); try: {EXAMPLES[0]}")
        if plural != (count > 1):
            raise BadRequest(f"'{said}': the number and the noun do not agree; say e.g. 'two red circles'")
        if count > 1 and "place" in found:
            raise BadRequest(f"'{said}': only a single object can have a place; name the objects one by one")
        return Group(count=count, **found)

    def _related(self, relation: str, before: list[Group], said: str) -> str:
        anchor = before[-1].place if before else None
        if anchor is None:
            raise BadRequest(f"'{said}': '{relation}' needs an object with a place named just before it")
        place = neighbour(anchor, relation)
        if place is None:
            raise BadRequest(f"'{said}': there is no room {relation.removesuffix(' it')} the {anchor}")
        return place

    def _checked(self, scene: Scene) -> Scene:
        if scene.objects > MAX_OBJECTS:
            raise BadRequest(f"the prompt names {scene.objects} objects; at most {MAX_OBJECTS} can be drawn")
        places = [g.place for g in scene.groups if g.place]
        if len(set(places)) < len(places):
            raise BadRequest("the prompt puts two objects at one place; give each its own")
        colours = [g.colour for g in scene.groups] + [scene.word_colour]
        if scene.background and scene.background in colours:
            raise BadRequest(f"something {scene.background} cannot be seen on a {scene.background} background")
        return scene
