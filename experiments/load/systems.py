"""Ours and its prompt-agnostic form, and what systems are told of a case.

What every system may know: the levels, their mean quality on validation prompts (profiled accuracy), the nodes' measured
curves and links, and, if it asks for it, the predicted quality of a prompt at each level. None knows a test picture's
quality before it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.load.service import Asked
from relay.errors import BadRequest
from scheduler.load.controller import Controller
from scheduler.load.expected import Station, Work
from scheduler.load.settings import LoadSettings

Floats = NDArray[np.float64]


class Unfit(BadRequest):
    """A case lacks what a system's rule is about."""


@dataclass(frozen=True)
class Known:
    """What a system is told before it serves. `mean` (L,): mean quality of validation prompts; `sample` (N, L): what is
    predicted for them; `judged` (N, L): what their pictures measured, for systems that look at pictures."""

    works: tuple[Work, ...]
    mean: Floats
    sample: Floats
    judged: Floats
    deadline_s: float
    plans: dict[str, Any] = field(default_factory=dict)  # solved in earlier runs of the same case, by settings

    @property
    def from_noise(self) -> Known:
        """Without the levels that begin from cached latents, which come last."""
        count = sum(not work.skipped for work in self.works)
        return replace(
            self, works=self.works[:count], mean=self.mean[:count], sample=self.sample[:, :count],
            judged=self.judged[:, :count],
        )  # fmt: skip

    @property
    def safest_first(self) -> list[int]:
        return [int(i) for i in np.argsort(-self.mean, kind="stable")]


class Plain:
    """What a system is that decides nothing periodically and looks at no picture."""

    name = ""
    rule = ""
    space: ClassVar[dict[str, Any]] = {}  # setting -> Range or choices, as experiments.simulate.search draws them
    starts = False  # whether it has a latent cache

    def __init__(self, known: Known, rng: np.random.Generator):
        self.known, self.rng = known if self.starts else known.from_noise, rng

    def control(self, stations: Sequence[Station]) -> None:
        """Nothing."""

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        raise NotImplementedError  # each system has its own

    def again(self, asked: Asked, level: int, quality: float, left_s: float) -> int | None:
        return None

    def started(self, level: int, share: float) -> None:
        """Nothing."""

    def ended(self, asked: Asked, seconds: float) -> None:
        """Nothing."""


class Ours(Plain):
    """The controller that the gateway runs, with its admission by deadline. `starts`: with the levels that begin from cached
    latents."""

    name = "ours"
    rule = (
        "estimator -> solver by classes of prompts -> shift by predicted quality and prices -> levels in time; refuses what"
        " no level keeps the deadline for"
    )
    space: ClassVar[dict[str, Any]] = {
        "margin": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        "quantile": [0.8, 0.9, 0.95, 0.99],
        "variation": [0.25, 0.5, 1.0, 2.0, 4.0],
        "arrivals_quantile": [0.5, 0.7, 0.9, 0.97],
        "rise": [0.5, 0.7, 1.0],
        "fall": [0.05, 0.1, 0.2, 0.4],
        "classes": [4, 8, 12],
    }

    def __init__(self, known: Known, rng: np.random.Generator, starts: bool = False, **settings: Any):
        self.starts = starts
        super().__init__(known, rng)
        if starts and not any(work.skipped for work in known.works):
            raise Unfit("it needs levels that start from cached latents, and none was measured here")
        try:
            own = msgspec.convert({"deadline_s": known.deadline_s, **settings}, LoadSettings)
        except msgspec.ValidationError as error:
            raise BadRequest(f"system {self.name}: {error}") from None
        plans = known.plans.setdefault(f"{self.name} {starts} {own}", {})
        self.controller = Controller(own, self.known.works, self._sample(), rng, plans)
        self._told_s: dict[int, float] = {}  # of open requests: when they were expected to end

    def _sample(self) -> Floats:
        return self.known.sample

    def _predicted(self, asked: Asked) -> Floats:
        return asked.predicted[: len(self.known.works)]

    def control(self, stations: Sequence[Station]) -> None:
        if not self._told_s:
            self.controller.overruns.rest()
        self.controller.control(stations)

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        predicted = self._predicted(asked)
        self.controller.arrived(predicted)
        if self.controller.surged:
            self.controller.control(stations, over=False)
        found = self.controller.allow(predicted, asked.deadline_s, stations)
        if found.level is not None:
            self._told_s[asked.number] = found.ends_s[found.level]
        return found.level

    def ended(self, asked: Asked, seconds: float) -> None:
        self.controller.overruns.observe(seconds, self._told_s.pop(asked.number))

    def started(self, level: int, share: float) -> None:
        self.controller.started(level, share)


class Agnostic(Ours):
    """Every prompt is the average one."""

    name = "ours, prompt-agnostic"
    rule = "as ours, told the same predicted quality of every prompt: the levels' means"
    space: ClassVar[dict[str, Any]] = {key: values for key, values in Ours.space.items() if key != "classes"}

    def __init__(self, known: Known, rng: np.random.Generator, **settings: Any):
        super().__init__(known, rng, **settings, classes=1)

    def _sample(self) -> Floats:
        return np.tile(self.known.mean, (8, 1))

    def _predicted(self, asked: Asked) -> Floats:
        return self.known.mean


Make = Callable[..., Plain]


def systems() -> dict[str, Make]:
    """Name in configs -> its class."""
    from experiments.load import baselines

    return {
        "ours": Ours, "agnostic": Agnostic, "clipper-ha": baselines.ClipperHA, "clipper-ht": baselines.ClipperHT,
        "proteus": baselines.Proteus, "sommelier": baselines.Sommelier, "diffserve": baselines.DiffServe,
        "nirvana": baselines.Nirvana,
    }  # fmt: skip
