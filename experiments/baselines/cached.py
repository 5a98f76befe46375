"""A cache on the large member, as a baseline alone and under a relay's first leg.

A cache patches the large member's module in place for the time of a run, so the run itself is `RelayPipeline`'s own: same
loop, same noise, same clock as the relays it is compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from experiments.baselines.base import Result, Setting, as_result, call, full_cloud, share
from relay.matching import leg_sigmas
from relay.pipeline import RelayPipeline
from relay.program import Program

if TYPE_CHECKING:
    import torch

    from relay.family import Family

PATCHED = ("forward", "_diffusers_hook", "cache")  # attributes that hooks, DeepCache and T-GATE set on modules


class Cache(Protocol):
    """`points`: label -> options of a handful of operating points; `idle`: options under which nothing is cached.

    `early`: the points for a relay's first leg, where all timesteps are high. Empty: the first two of `points`.
    """

    name: str
    paper: str
    note: str
    points: dict[str, dict[str, Any]]
    early: dict[str, dict[str, Any]]
    idle: dict[str, Any]

    def applies(self, family: Family) -> str | None: ...

    def prepare(self, family: Family, leg: LargeLeg) -> None:
        """Measure once what `on` needs of this checkpoint and schedule."""
        ...

    def on(self, family: Family, leg: LargeLeg, options: dict[str, Any]) -> AbstractContextManager[Any]:
        """The large member caches inside this context and is untouched after it."""
        ...


@dataclass(frozen=True)
class LargeLeg:
    """What the large member is about to walk. `steps_total`: of the whole schedule, of which a relay walks a part."""

    steps_total: int
    sigmas: list[float]
    guidance: float

    @classmethod
    def of(cls, family: Family, program: Program) -> LargeLeg:
        schedules = family.schedules(family.spec.sizes.default)
        sigmas = leg_sigmas(program, 0, schedules, None)
        return cls(program.legs[0].steps_total, sigmas, program.guidance[0])


def large_module(family: Family) -> torch.nn.Module:
    return getattr(family.denoiser("large"), family.architecture.denoiser)


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Whatever is patched inside, every module has its own forward again afterwards.

    Exact where the packages' own removal is not: `disable()` leaves instance attributes behind and T-GATE has none.
    """
    before = [(module, {k: vars(module)[k] for k in PATCHED if k in vars(module)}) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in before:
            for key in PATCHED:
                vars(module).pop(key, None)
            vars(module).update(own)


class Cached:
    """Full-cloud with a cache on the large member."""

    def __init__(self, cache: Cache):
        self.cache = cache
        self.name, self.paper, self.note = cache.name, cache.paper, cache.note

    def applies(self, family: Family) -> str | None:
        return self.cache.applies(family)

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        program = str(full_cloud(family, steps))
        return [
            Setting(label, {"program": program} | options) for label, options in self.cache.points.items()
        ]  # fmt: skip

    def idle(self, family: Family, steps: int | None = None) -> Setting:
        """The setting that caches nothing and so must equal full-cloud."""
        return Setting("nothing cached", {"program": str(full_cloud(family, steps))} | self.cache.idle)

    def prepare(self, family: Family, setting: Setting) -> None:
        """What is done once per checkpoint and schedule, so that whoever counts or times a run can do it before."""
        self.cache.prepare(family, LargeLeg.of(family, Program.parse(setting.values["program"])))

    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        options = dict(setting.values)
        program = Program.parse(options.pop("program"))
        with self.cache.on(family, LargeLeg.of(family, program), options):
            return as_result(call(family, prompts, seeds, program))


class RelayCached(Cached):
    """A relay whose first leg runs with the cache: the two savings together.

    A cache makes late large steps cheap, so that a handoff later than a plain relay's costs little, and few small steps
    are left to do.
    """

    shares = (0.3, 0.5)  # as many small steps as the schedule has left
    late = (0.43, 0.57, 0.71)  # `few` small steps
    few = 4

    def __init__(self, cache: Cache):
        super().__init__(cache)
        self.name = f"relay+{cache.name}"
        self.note = f"{cache.note}; on the first leg only" if cache.note else "on the first leg only"
        self.points = cache.early or dict(list(cache.points.items())[:2])

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        total = steps or family.spec.members["large"].steps
        pipe = RelayPipeline(family)
        walks = [(share(total, part), None) for part in self.shares] + [(share(total, p), self.few) for p in self.late]
        found = []
        for handoff, small_steps in dict.fromkeys(walks):
            if handoff + (small_steps or 0) >= total:
                continue  # nothing left to save
            # fewer steps than are left: the small member walks a schedule of its own, joined at the very sigma
            matching = "exact" if small_steps else None
            program = str(
                pipe.plan(num_inference_steps=total, handoff=handoff, small_steps=small_steps, matching=matching)
            )
            where = f"s = {handoff} of {total}" + (f", {small_steps} small steps" if small_steps else "")
            found += [
                Setting(f"{where}, {label}", {"program": program} | options, ("large", "small"))
                for label, options in self.points.items()
            ]
        return found

    def idle(self, family: Family, steps: int | None = None) -> Setting:
        """The relay without its cache: the first of the settings' programs."""
        program = self.settings(family, steps)[0].values["program"]
        return Setting("nothing cached", {"program": program} | self.cache.idle)
