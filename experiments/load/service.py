"""One run: requests come, a system names a level for each or refuses it, nodes do the work, deadlines end it.

Nodes and links are `experiments.simulate`'s, with the engine's own batching. All systems are placed alike: each leg on the
node that is soonest done with it (`scheduler.load.expected`), as far as the gateway knows. What passes its deadline is
dropped, as the service does; it is a violation, and so is what was refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from experiments.load.caching import Caches
from experiments.simulate.events import Clock
from experiments.simulate.links import expected, send
from experiments.simulate.loop import Stretch
from experiments.simulate.nodes import FREE, On
from experiments.simulate.world import World
from scheduler.load.expected import Station, Work, ends_s

DONE, LATE, REFUSED = range(3)
CONTROL_S = 1.0  # period of every system


@dataclass(frozen=True)
class Asked:
    """A request as a system sees it. `prompt`: its row in what is measured; `predicted` (L,): its quality at each level."""

    number: int
    prompt: int
    predicted: NDArray[np.float64]
    deadline_s: float


class System(Protocol):
    """What is compared. Levels are indices of the case's works."""

    name: str

    def control(self, stations: Sequence[Station]) -> None:
        """Every `CONTROL_S`."""
        ...

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        """The level, or None: refused."""
        ...

    def again(self, asked: Asked, level: int, quality: float, left_s: float) -> int | None:
        """A picture of this measured quality is there with time left: another level to draw it anew, or None to take it."""
        ...

    def started(self, level: int, share: float) -> None:
        """A request at a level that begins from a cached latent was spared this share of the level's K."""
        ...

    def ended(self, asked: Asked, seconds: float) -> None:
        """A request that was not refused has its picture, or has passed its deadline, after so long."""
        ...


@dataclass
class Outcome:
    """Arrays over requests: stage (DONE, LATE, REFUSED), seconds until the picture, level of it (-1: none), quality."""

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int64]
    stage: NDArray[np.int64]
    seconds: NDArray[np.float64]
    level: NDArray[np.int64]
    quality: NDArray[np.float64]
    busy_s: dict[str, float]  # node -> seconds that it worked
    ended_s: float  # when the last request had ended


@dataclass(frozen=True)
class Demand:
    """Requests: when, which prompt (row), and within what."""

    arrival_s: NDArray[np.float64]
    prompt: NDArray[np.int64]
    deadline_s: float


@dataclass(frozen=True)
class Measured:
    """`quality` (prompts, levels) as drawn and judged, from noise; `predicted` likewise, what systems are told. `caches`: what
    levels that begin from cached latents find."""

    prompts: Sequence[str]
    quality: NDArray[np.float64]
    predicted: NDArray[np.float64]
    caches: Caches | None = None


class _Job:
    __slots__ = ("asked", "late", "level", "on", "start")

    def __init__(self, asked: Asked, late: float):
        self.asked, self.late = asked, late
        self.level = -1
        self.start = (0, 0.0)  # steps skipped, and how alike the source is
        self.on: list[On] = []


class Service:
    """One run of one system. `seed`: of the links' jitter."""

    def __init__(
        self, world: World, works: Sequence[Work], measured: Measured, system: System, demand: Demand, seed: int = 0
    ):
        self.world, self.works, self.measured, self.system, self.demand = world, works, measured, system, demand
        self.clock = Clock()
        self.nodes = world.build(self.clock, seed)
        self.stations = stations_of(world)
        self._by_name = {station.name: station for station in self.stations}
        count = len(demand.arrival_s)
        self.stage = np.full(count, -1)
        self.seconds = np.full(count, np.nan)
        self.level = np.full(count, -1)
        self.quality = np.full(count, np.nan)
        self._open: dict[int, _Job] = {}
        self._left = count
        self._caches = measured.caches.begin() if measured.caches is not None else None

    def run(self) -> Outcome:
        clock = self.clock
        for number, time in enumerate(self.demand.arrival_s.tolist()):
            clock.at(time, self._arrive, number)
        clock.at(CONTROL_S, self._control)
        clock.run()
        assert not self._open, "a request did not end"
        assert (self.stage >= 0).all(), "a request has no outcome"
        return Outcome(
            self.demand.arrival_s, self.demand.prompt, self.stage, self.seconds, self.level, self.quality,
            {name: node.busy_s for name, node in self.nodes.items()}, clock.now,
        )  # fmt: skip

    def _control(self) -> None:
        self._look()
        self.system.control(self.stations)
        if self._left:
            self.clock.at(self.clock.now + CONTROL_S, self._control)

    def _look(self) -> None:
        """What the gateway knows of its nodes now."""
        for station in self.stations:
            node = self.nodes[station.name]
            station.held, station.backlog_s = node.held, node.backlog_s

    def _arrive(self, number: int) -> None:
        row, deadline = int(self.demand.prompt[number]), self.demand.deadline_s
        asked = Asked(number, row, self.measured.predicted[row], deadline)
        self._look()
        level = self.system.choose(asked, self.stations)
        job = _Job(asked, self.clock.now + deadline)
        self._open[number] = job
        if level is None or not self._place(job, level):
            self._end(job, REFUSED)
            return
        self.clock.at(job.late, self._too_late, job)

    def _place(self, job: _Job, level: int) -> bool:
        """Tell the nodes that would be done with it soonest. False where there are none for it."""
        work, now, last = self.works[level], self.clock.now, len(self.works[level].legs) - 1
        _, names = ends_s(work, self.stations)
        if not names:
            return False
        job.level, job.on, job.start = level, [], (0, 0.0)
        if work.skipped and self._caches is not None:
            job.start = self._caches.find(names[0], job.asked.prompt, work.program, work.skipped)
        work = replace(work, skipped=job.start[0])
        family = work.program.family
        for i, (name, leg) in enumerate(zip(names, work.legs, strict=True)):
            node = self.nodes[name]
            stretch = Stretch(str(job.asked.prompt), family, (leg,), i == last, i == 0, self._left_node(job, i))
            stretch.urgency = (job.late, now)
            seconds, _ = self._by_name[name].times(family, leg[0])
            job.on.append(On(node, stretch, work.program.legs[i].steps * seconds[1]))  # a hit is not known beforehand
            delay = node.link.down.profile.delay_s if node.link else 0.0
            self.clock.at(now + self.world.spec.overhead_s + delay, node.take, stretch)
        return True

    def _left_node(self, job: _Job, i: int) -> Callable[[float], None]:
        placed, work = job.on, self.works[job.level]

        def left(now: float) -> None:
            if self._open.get(job.asked.number) is not job or job.on is not placed:
                return
            here = placed[i]
            if i + 1 < len(placed):
                after = placed[i + 1]
                lines = ([here.node.link.up] if here.node.link else []) + (
                    [after.node.link.down] if after.node.link else []
                )
                self.clock.at(send(lines, work.latent_bytes, now), after.node.bring, after.stretch)
                self.clock.at(now + (here.node.link.up.profile.delay_s if here.node.link else 0.0), here.leave)
                return
            lines = [here.node.link.up] if here.node.link else []
            self.clock.at(send(lines, work.image_bytes, now), self._picture, job, placed)

        return left

    def _picture(self, job: _Job, placed: list[On]) -> None:
        if self._open.get(job.asked.number) is not job or job.on is not placed:
            return
        quality = float(self.measured.quality[job.asked.prompt, job.level])
        if self._caches is not None:
            work = self.works[job.level]
            quality = self._caches.quality(quality, work, *job.start)
            if work.skipped:
                self.system.started(job.level, job.start[0] / work.skipped)
            if work.program.legs[0].member == "large" and not job.start[0]:
                self._caches.leave(placed[0].node.name, job.asked.prompt, work.program)
        self._look()
        other = self.system.again(job.asked, job.level, quality, job.late - self.clock.now)
        if other is not None:
            for on in placed:
                on.leave()
            self._look()
            first = job.level, quality
            if self._place(job, other):
                return
            job.level, quality = first
        self.quality[job.asked.number] = quality
        self._end(job, DONE)

    def _too_late(self, job: _Job) -> None:
        if self._open.get(job.asked.number) is job:
            for on in job.on:
                on.node.drop(on.stretch)
            job.level = -1
            self._end(job, LATE)

    def _end(self, job: _Job, stage: int) -> None:
        number = job.asked.number
        del self._open[number]
        for on in job.on:
            on.leave()
        job.on = []
        self._left -= 1
        self.stage[number], self.level[number] = stage, job.level
        self.seconds[number] = self.clock.now - self.demand.arrival_s[number]
        if stage != REFUSED:
            self.system.ended(job.asked, float(self.seconds[number]))


def stations_of(world: World) -> list[Station]:
    """The world's nodes at rest, as load decisions see them; links as they are given."""
    found = []
    for name, node in world.build(Clock(), 0).items():
        link = node.link
        rate, trip = FREE, 0.0
        if link is not None:
            trip = link.round_trip_s
            rate = 1e6 / max(expected([link.up], 1e6, 0.0) - trip / 2, 1e-12)
        state = node.state
        found.append(
            Station(name, state.role, state.curves, state.batch, state.encode_s, state.decode_s, trip, rate)
        )  # fmt: skip
    return found


def sized(world: World, work: Work) -> Work:
    """With the bytes that the world's links are charged."""
    latent, image = world.sizes[work.program.family]
    return replace(work, latent_bytes=latent, image_bytes=image)
