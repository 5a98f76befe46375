"""Program: all that fixes picture and bytes besides prompt, seed and size, as data and as one line of text.

Knows nothing of sigmas: whether a program's legs fit its members' schedules is `relay.matching`'s to say.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from relay.errors import BadRequest

Matching = Literal["direct", "nearest", "exact"]
Codec = Literal["fp32", "fp16", "bf16", "int8"]
ConditioningMode = Literal["encode", "ship"]
Mode = Literal["full-cloud", "relay", "edge-only", "other"]

MATCHINGS: tuple[str, ...] = get_args(Matching)
CODECS: tuple[str, ...] = get_args(Codec)
CONDITIONING_MODES: tuple[str, ...] = get_args(ConditioningMode)
MAX_SCHEDULE = 4096  # steps; the longest schedule that sigma matching may choose

_NAME = re.compile(r"[a-z0-9._-]+")
_LEG = re.compile(r"([a-z0-9._-]+):(\d+):(\d+)-(\d+)")
_OPTIONS = ("match", "codec", "guidance", "conditioning")
_SHAPE = "FAMILY/MEMBER:T:FIRST-LAST[/...]/match=M/codec=C/guidance=G[,G]/conditioning=encode|ship"


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse (BadRequest) a value that is not one of `choices`."""
    if value not in choices:
        raise BadRequest(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


@dataclass(frozen=True)
class Leg:
    """One member and the stretch [first, last] it walks of its own schedule of `steps_total` steps."""

    member: str
    steps_total: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.member):
            raise BadRequest(f"a member's name is made of a-z 0-9 . _ -, not {self.member!r}")
        if not 0 <= self.first < self.last <= self.steps_total <= MAX_SCHEDULE:
            raise BadRequest(f"leg {self} needs 0 <= first < last <= T <= {MAX_SCHEDULE}")

    @property
    def steps(self) -> int:
        return self.last - self.first

    def __str__(self) -> str:
        return f"{self.member}:{self.steps_total}:{self.first}-{self.last}"


@dataclass(frozen=True)
class Program:
    """Family, legs, matching, guidance (one per leg), codec and conditioning.

    `str(program)` is the canonical text form and `Program.parse` its exact inverse. BadRequest on anything inconsistent.
    """

    family: str
    legs: tuple[Leg, ...]
    matching: Matching
    guidance: tuple[float, ...]
    codec: Codec = "fp16"
    conditioning: ConditioningMode = "encode"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.family):
            raise BadRequest(f"a family's name is made of a-z 0-9 . _ -, not {self.family!r}")
        check_choice("matching", self.matching, MATCHINGS)
        check_choice("codec", self.codec, CODECS)
        check_choice("conditioning", self.conditioning, CONDITIONING_MODES)
        if not self.legs:
            raise BadRequest("a program needs at least one leg")
        if len(self.guidance) != len(self.legs):
            raise BadRequest(f"{len(self.legs)} legs need as many guidance values, not {len(self.guidance)}")
        for value in self.guidance:
            if not (math.isfinite(value) and value >= 0):
                raise BadRequest(f"guidance must be a finite number of at least 0, not {value}")
        *before, final = self.legs
        if final.last != final.steps_total:
            raise BadRequest(f"the last leg {final} must end at its T, {final.steps_total}, where sigma is 0")
        for leg in before:
            if leg.last == leg.steps_total:
                raise BadRequest(f"leg {leg} ends at sigma 0 and leaves the next leg nothing to do")

    @property
    def mode(self) -> Mode:
        match tuple(leg.member for leg in self.legs):
            case ("large",):
                return "full-cloud"
            case ("small",):
                return "edge-only"
            case ("large", "small"):
                return "relay"
        return "other"

    @property
    def steps(self) -> dict[str, int]:
        """Steps that each member takes; `large` and `small` are always there."""
        steps = {"large": 0, "small": 0}
        for leg in self.legs:
            steps[leg.member] = steps.get(leg.member, 0) + leg.steps
        return steps

    def taken(self, skipped: int) -> dict[str, int]:
        """Steps that each member takes where a cached start spares `skipped` of the first leg's."""
        steps = self.steps
        steps[self.legs[0].member] -= skipped
        return steps

    def __str__(self) -> str:
        guidance = ",".join(_number(value) for value in self.guidance)
        return (
            f"{self.family}/{'/'.join(map(str, self.legs))}/match={self.matching}/codec={self.codec}"
            f"/guidance={guidance}/conditioning={self.conditioning}"
        )

    @classmethod
    def parse(cls, text: str) -> Program:
        """The program whose canonical text this is; BadRequest on any other text."""
        family, *parts = text.split("/")
        legs = [_LEG.fullmatch(part) for part in parts[: -len(_OPTIONS)]]
        options = [part.partition("=") for part in parts[-len(_OPTIONS) :]]
        if not legs or not all(legs) or tuple(key for key, _, _ in options) != _OPTIONS:
            raise BadRequest(f"not a program: {text[:200]!r}; the form is {_SHAPE}")
        matching, codec, guidance, conditioning = (value for _, _, value in options)
        try:
            values = tuple(float(value) for value in guidance.split(","))
        except ValueError:
            raise BadRequest(f"guidance={guidance} in program {text[:200]!r} is not a list of numbers") from None
        program = cls(
            family,
            tuple(Leg(m[1], int(m[2]), int(m[3]), int(m[4])) for m in legs if m),
            matching,  # type: ignore[arg-type]  # checked in __post_init__
            values,
            codec,  # type: ignore[arg-type]
            conditioning,  # type: ignore[arg-type]
        )
        if str(program) != text:
            raise BadRequest(f"program {text[:200]!r} is not in its canonical form, which is {program}")
        return program


def _number(value: float) -> str:
    """Shortest text that reads back as the same float: %g where that suffices."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


def drawn_alike(text: str) -> str:
    """One text for programs that draw alike: nothing is matched or coded where there is but one leg."""
    program = Program.parse(text)
    if len(program.legs) > 1:
        return text
    return str(replace(program, matching="exact", codec="fp16", conditioning="encode"))
