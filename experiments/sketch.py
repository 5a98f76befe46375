"""A family as far as its YAML alone tells it: enough to say what a run would draw where none of its files is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from relay.errors import FamilyError
from relay.family import Family, Need
from relay.schedules import Schedule

if TYPE_CHECKING:
    from relay.family_spec import FamilySpec


class Sketch(Family):
    """`Family` without configs: both members walk one even schedule, so n = T - s whatever the matching.

    At the run n follows from the real schedules, and may differ by a few where the members' differ.
    """

    def schedule(self, member: str, steps: int, image_seq_len: int | None = None) -> Schedule:
        return Schedule(tuple(1 - i / steps for i in range(steps + 1)), 1.0, "flow")

    def schedules(self, size: tuple[int, int]) -> dict[str, Callable[[int], Schedule]]:
        return {member: partial(self.schedule, member) for member in self.spec.members}

    def check_size(self, width: int, height: int) -> None:
        """What sizes are possible stands in the configs."""


def family_or_sketch(spec: FamilySpec, device: str | None, dtype: str | None) -> tuple[Family, list[Need]]:
    """The family, or its sketch where its configs are not here; with what it needs, installed or not.

    FamilyError where its files are here, or are local ones that never come, and do not make a family.
    """
    try:
        family = Family.load(spec, "all", dtype, device)
    except FamilyError:
        family = Sketch(spec, "all", dtype, device)
        local = all(part.is_local for part in (*spec.members.values(), spec.vae, spec.text))
        if local or all(need.installed for need in family.needs()):
            raise
    return family, family.needs()
