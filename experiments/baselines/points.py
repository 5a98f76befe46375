"""Which baselines a run draws and times: the settings of each, for every T that the family's full-cloud has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.baselines.chosen import Chosen, kept, of_family
from relay.errors import BadRequest
from relay.program import Program

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline, Setting
    from relay.family import Family


@dataclass(frozen=True)
class Point:
    """One setting of a baseline, an approximation of full-cloud with `steps_total` steps."""

    baseline: Baseline
    setting: Setting
    steps_total: int

    @property
    def text(self) -> str:
        """What stands in a row's `program`: NAME[LABEL], with T where the label does not tell it."""
        label = self.setting.label
        if not re.search(rf"\bof {self.steps_total}\b", label):
            label = f"{label}, T = {self.steps_total}"
        return f"{self.baseline.name}[{label}]"

    @property
    def steps(self) -> dict[str, int]:
        """Steps of each member per image, those that a cache makes cheaper counted whole; full-cloud's where it is not said."""
        values = self.setting.values
        taken = (
            Program.parse(values["program"]).steps if "program" in values else {"large": self.steps_total, "small": 0}
        )
        return taken | {
            "large": taken["large"] + values.get("kept", 0)
        }  # img2img's large member goes on after its program


def label_of(baseline: str, text: str, steps_total: int) -> str:
    """The setting's label in a row's `program`, back from `Point.text`."""
    return text.removeprefix(f"{baseline}[").removesuffix("]").removesuffix(f", T = {steps_total}")


def points(
    baselines: Sequence[Baseline], family: Family, totals: Sequence[int], chosen: Mapping[str, Chosen] | None = None
) -> list[Point]:
    """All of them, or the `chosen` ones, T by T; BadRequest where two would go by one name, and so their rows be mixed."""
    mine = of_family(chosen, family, baselines)
    found: dict[str, Point] = {}
    for baseline in baselines:
        if baseline.applies(family) is not None:
            continue
        for total in totals:
            for setting in kept(baseline, family, total, mine):
                point = Point(baseline, setting, total)
                if point.text in found:
                    raise BadRequest(f"baseline {baseline.name} has two settings {setting.label!r} at T = {total}")
                found[point.text] = point
    return list(found.values())


def totals_of(programs: Sequence[Program], asked: Sequence[int]) -> list[int]:
    """The T that baselines stand beside: of those `asked` for by the config, full-cloud's (else any program's)."""
    full = [program for program in programs if program.mode == "full-cloud"]
    there = [program.legs[0].steps_total for program in full or programs]
    return [total for total in dict.fromkeys(asked) if total in there] or list(dict.fromkeys(there))[:1]
