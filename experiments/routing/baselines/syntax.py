"""What the boosted tree and the noun count read of a prompt: its syntax, by `scheduler.syntax`, and its words."""

from __future__ import annotations

import re

import msgspec

from scheduler.syntax import Syntax, read_prompt

_WORD = re.compile(r"[^\W\d_]+|\d+|,")
FEATURES = (*(field.name for field in msgspec.structs.fields(Syntax)), "characters", "commas")


def noun_count(prompt: str) -> int:
    """How many things the prompt names, "two cats" as 2: syntax alone, no scene."""
    return read_prompt(prompt).objects


def words(prompt: str) -> list[str]:
    """Lower-case words, numbers and commas outside of quotation marks."""
    return _WORD.findall(re.sub(r'["“][^"”]*["”]', " ", prompt).lower())


def features(prompt: str) -> list[float]:
    """`FEATURES` of a prompt."""
    said = read_prompt(prompt)
    return [*map(float, msgspec.structs.astuple(said)), float(len(prompt)), float(prompt.count(","))]
