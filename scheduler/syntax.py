"""What a prompt asks for, read from its words: objects, attributes, relations, letters. For any English prompt.

No grammar and no tagger: closed lists of small words cut the text into chunks, the last word of a chunk is a thing and
those before it say what it is like. That errs in single prompts (a verb counts as a thing, "fire hydrant" as an attribute
and a thing), which features for a learner may. It knows nothing of the scene language, so what is learned from its counts
holds for prompts of other kinds too.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

import msgspec

MOST_CHARACTERS = 2000  # read of a prompt: no text encoder takes more in


class Syntax(msgspec.Struct, frozen=True, kw_only=True):
    """Counts. `objects`: things, "two cats" as 2; `letters`: characters to be written in the picture."""

    objects: int = 0
    attributes: int = 0
    relations: int = 0
    numbers: int = 0
    letters: int = 0
    text: bool = False
    style: int = 0
    words: int = 0


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ONE_TO_TWELVE = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {word: i for i, word in enumerate(_ONE_TO_TWELVE, 1)}
_NUMBERS |= {"dozen": 12, "pair": 2, "couple": 2}
_MOST_ALIKE = 12  # "a thousand stars" are not a thousand things to get right

_DETERMINERS = _words(
    """
    a an the this that these those some any each every its his her their my your our another no both all several
    many few more most
    """
)
# Each cuts the text, and says how what follows stands to what came before.
_RELATIONS = _words(
    """
    on in at above below under underneath over behind beside besides between inside outside near against around
    through along across from into onto within among amid beneath by before after towards toward without beyond
    off upon atop next holding wearing riding
    """
)
# Each cuts the text and says nothing more.
_BREAKS = _words(
    """
    and or but while as of for to is are was were be been being has have had do does it he she they them there who
    which what where when whose then than so if very too also not like made consisting featuring showing
    containing depicting
    """
)
_PLACES = _words(
    """
    top bottom left right upper lower centre center middle corner side front back foreground background edge half
    distance scene
    """
)
_STYLE = _words(
    """
    photo photos photograph photography picture image painting drawing illustration render rendering sketch art
    artwork style highly detailed detail details intricate realistic photorealistic hyperrealistic cinematic
    masterpiece trending artstation octane unreal engine quality best hd uhd hdr 4k 8k 16k focus concept digital
    resolution ultra lighting bokeh 3d cgi vray dslr close-up closeup wallpaper aesthetic
    """
)
_COLOURS = _words(
    """
    red green blue yellow orange purple white black grey gray brown pink gold golden silver violet turquoise cyan
    magenta beige teal
    """
)
_TEXT = _words(
    """
    word words letter letters lettering text texts caption slogan typography saying says said reads
    written titled spelled spelling calligraphy font headline
    """
)

_QUOTED = re.compile(r'"([^"]{1,200})"|(?<![^\W_])\'([^\']{1,200})\'(?![^\W_])')
_TOKEN = re.compile(r"\x00\d+\x00|[^\W_]+(?:['-][^\W_]+)*|[^\w\s]")
_CAPITALS = re.compile(r"[A-Z0-9]{1,24}")


@lru_cache(maxsize=4096)
def read_prompt(prompt: str) -> Syntax:
    """Count what the prompt asks for; never fails, whatever the text."""
    text = unicodedata.normalize("NFKC", prompt[:MOST_CHARACTERS]).translate(
        {0: " ", 0x201C: '"', 0x201D: '"', 0x2019: "'"}
    )
    quotes: list[str] = []

    def keep(match: re.Match[str]) -> str:
        quotes.append(match[1] or match[2])
        return f" \x00{len(quotes) - 1}\x00 "

    tokens = _TOKEN.findall(_QUOTED.sub(keep, text))
    count = dict.fromkeys(("objects", "attributes", "relations", "numbers", "style", "words"), 0)
    letters = sum(len(quote.replace(" ", "")) for quote in quotes)
    count["words"] = sum(len(quote.split()) for quote in quotes)
    asks_text = bool(quotes)
    chunk: list[str] = []
    number, written = 1, -1
    for i, token in enumerate(tokens):
        word = token.lower()
        if token[0] == "\x00":
            continue
        if i == written:
            count["words"] += 1
            continue
        count["words"] += token[0].isalnum()
        if word in _TEXT:
            asks_text = True
            if not quotes and i + 1 < len(tokens) and _CAPITALS.fullmatch(tokens[i + 1]):  # a sign that says STOP
                letters += len(tokens[i + 1])
                written = i + 1
        if word in _NUMBERS or word.isdecimal():
            _close(chunk, number, count)
            count["numbers"] += 1
            number = min(_NUMBERS.get(word) or int(word[:6]), _MOST_ALIKE) or 1
        elif word == "with" and not _starts_a_thing(tokens[i + 1 : i + 2]):
            # with stripes, with glasses: what it is like
            _close(chunk, number, count)
            number = 0
        elif (
            word in _RELATIONS
            or word == "with"
            or (word.endswith("ing") and chunk and _starts_a_thing(tokens[i + 1 : i + 2]))
        ):
            _close(chunk, number, count)
            count["relations"] += 1
            number = 1
        elif word in _DETERMINERS or word in _BREAKS or not token[0].isalnum():
            _close(chunk, number, count)
            number = 1
        else:
            chunk.append(word)
    _close(chunk, number, count)
    return Syntax(letters=letters, text=asks_text, **count)


def _close(chunk: list[str], number: int, count: dict[str, int]) -> None:
    """Count a finished chunk: its head is a thing unless it names a place, a style or the text to be written."""
    if not chunk:
        return
    *before, head = chunk
    count["style"] += sum(word in _STYLE for word in chunk)
    count["attributes"] += sum(word not in _STYLE and word not in _PLACES and word not in _TEXT for word in before)
    if head in _COLOURS or not number:  # "in red", "with stripes"
        count["attributes"] += 1
    elif head not in _STYLE and head not in _PLACES and head not in _TEXT:
        count["objects"] += number
    chunk.clear()


def _starts_a_thing(following: list[str]) -> bool:
    return bool(following) and (following[0].lower() in _DETERMINERS or following[0].lower() in _NUMBERS)
