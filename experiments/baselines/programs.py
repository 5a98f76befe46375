"""Baselines that are programs: the large member with fewer steps, and the small member first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.baselines.base import Result, Setting, as_result, call, full_cloud, share
from relay.errors import BadRequest
from relay.matching import match
from relay.program import Leg, Program

if TYPE_CHECKING:
    from relay.family import Family


class FewerSteps:
    """The large member alone on a schedule of T' < T steps."""

    name = "fewer-steps"
    paper = "no paper: what anyone does first"
    note = "a schedule of its own of T' steps, not the first T' of T"
    shares = (0.75, 0.6, 0.5, 0.4, 0.3, 0.2)

    def applies(self, family: Family) -> str | None:
        return None

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        total = steps or family.spec.members["large"].steps
        fewer = dict.fromkeys(share(total, part) for part in self.shares)
        return [
            Setting(f"{n} of {total} steps", {"program": str(full_cloud(family, n))}) for n in fewer if n < total
        ]  # fmt: skip

    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        return as_result(call(family, prompts, seeds, setting.values["program"]))


class SmallFirst:
    """The small member's early steps, then the large one's: a relay the other way round.

    T-Stitch (Pan et al. 2024, arXiv 2402.14167). A `Program` like any other. T-Stitch has both members on one machine;
    here the small one is the asker's, so over a link the latent goes up to the large one and the image comes back.
    """

    name = "small-first"
    paper = "T-Stitch, Pan et al. 2024, arXiv 2402.14167"
    note = (
        "a program whose first leg is small; over a link its latent goes up, in the family's codec, and the image back"
    )
    shares = (0.2, 0.4, 0.6, 0.8)

    def applies(self, family: Family) -> str | None:
        return None if self.settings(family) else "no handoff at which the large member's schedule can take over"

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        total = steps or family.spec.members["large"].steps
        handoffs = dict.fromkeys(share(total, part) for part in self.shares)
        programs = {s: self.program(family, total, s) for s in handoffs if s < total}
        return [
            Setting(f"small takes {s} of {total} steps", {"program": str(p)}, ("small", "large"))
            for s, p in programs.items() if p
        ]  # fmt: skip

    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        return as_result(call(family, prompts, seeds, setting.values["program"]))

    @staticmethod
    def program(family: Family, total: int, handoff: int) -> Program | None:
        """None where the large member's schedule begins below the sigma that the small one has reached."""
        schedules = family.schedules(family.spec.sizes.default)
        matching = family.spec.matching
        try:
            sigma = schedules["small"](total).sigmas[handoff]
            _, first, _ = match(sigma, handoff, schedules["large"], total, None, matching)
        except BadRequest:
            return None
        legs = (Leg("small", total, 0, handoff), Leg("large", total, first, total))
        guidance = tuple(family.spec.members[leg.member].guidance for leg in legs)
        return Program(family.name, legs, matching, guidance, family.spec.codec)
