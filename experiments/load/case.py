"""A comparison as a config (configs/experiments/load.yaml): fleets, levels, traces, systems; and one cell of it run.

A *cell* is one system on one fleet and trace at one load and deadline with one seed. All systems of a cell but its name
meet the same requests. Load is a share of the fleet's full-cloud capacity and deadlines are multiples of its full-cloud
latency, both measured in the simulation (`capacity`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from experiments.load.caching import Caches, Caching, Kept, vectors_of
from experiments.load.fit import with_starts
from experiments.load.service import Asked, Demand, Measured, Outcome, Service, sized, stations_of
from experiments.load.systems import Known, Plain, systems
from experiments.simulate.scores import Scores, read_scores
from experiments.simulate.world import World, WorldSpec, check_world
from experiments.workloads import load_arrivals
from experiments.workloads.prompts import generator
from relay.errors import BadRequest
from relay.files import read_yaml
from scheduler.load.expected import Station, Work, ends_s
from scheduler.load.prediction import Levels, read_levels, shipped
from scheduler.load.similarity import read_rule

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
VALIDATION, TEST = "validation", "test"
GOAL_LOAD, GOAL_DEADLINE = 1.3, 2.0  # what the goals are about; a config without them: the nearest it has


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that nobody reads is a mistake."""


class Contestant(_Strict, frozen=True, kw_only=True):
    """A system by name with its settings; what was tuned is laid over them."""

    system: str
    settings: dict[str, Any] = {}
    tuned_as: str | None = None  # not tuned itself: the settings that were found for this system, as far as it has them
    seeds: Count | None = None  # fewer than the case's, of a system that plans anew at almost every second


class Searched(_Strict, frozen=True, kw_only=True):
    """As many configurations of each system, on validation prompts, at these cells."""

    configurations: Count = 12
    requests: Count = 1500
    seeds: tuple[int, ...] = (100,)
    traces: list[str]
    loads: list[Positive]
    deadlines: list[Positive]
    seed: int = 0


class Size(_Strict, frozen=True, kw_only=True):
    """Of a cell."""

    requests: Count
    seeds: Count


class LoadCase(_Strict, frozen=True, kw_only=True):
    fleets: Annotated[dict[str, WorldSpec], msgspec.Meta(min_length=1)]
    traces: Annotated[dict[str, dict[str, Any]], msgspec.Meta(min_length=1)]
    systems: Annotated[dict[str, Contestant], msgspec.Meta(min_length=1)]
    search: Searched
    store: list[str]
    family: str = "mini-sd3"
    metric: str = "attributes"
    levels: str | None = None  # a file; None: the shipped one of the family
    starts: Caching | None = None  # levels that begin from cached latents, and what their caches hold
    router: bool = True  # predictions with the router's word, where the levels know how to use it
    name: str = "load"
    description: str = ""
    loads: tuple[Positive, ...] = (0.7, 1.0, 1.3, 1.6)
    deadlines: tuple[Positive, ...] = (1.5, 2.0, 4.0)
    requests: Count = 10_000  # of a cell at the load and deadline that the goals are about
    seeds: Count = 10
    elsewhere: Size | None = None  # at other loads and deadlines; None: as many
    long: dict[str, Count] = {}  # system -> requests of one run more at the goals' load and deadline
    tuned: str | None = None


class Cell(_Strict, frozen=True, kw_only=True):
    fleet: str
    trace: str
    load: float
    deadline: float


class Case:
    """What a config says, read once."""

    def __init__(self, config: LoadCase):
        self.config = config
        for name, contestant in config.systems.items():
            if contestant.system not in systems():
                raise BadRequest(f"systems.{name}: unknown system {contestant.system!r}: choose {', '.join(systems())}")
            if (like := contestant.tuned_as) is not None and like not in config.systems:
                raise BadRequest(f"systems.{name}: tuned_as: no system {like!r} is described")
        if unknown := set(config.long) - set(config.systems):
            raise BadRequest(f"long: no system {', '.join(sorted(unknown))} is described")
        lacking = set(config.search.traces) - set(config.traces)
        if lacking:
            raise BadRequest(f"search.traces: no trace {', '.join(sorted(lacking))} is described")
        self._worlds: dict[str, World] = {}
        self._works: dict[str, tuple[Work, ...]] = {}
        self._plans: dict[str, dict[str, Any]] = {}
        self._capacity: dict[str, tuple[float, float]] = {}

    @property
    def goal(self) -> tuple[float, float]:
        """Load and deadline that the goals are about."""
        config = self.config
        return (
            min(config.loads, key=lambda x: abs(x - GOAL_LOAD)),
            min(config.deadlines, key=lambda x: abs(x - GOAL_DEADLINE)),
        )

    def size(self, cell: Cell) -> Size:
        """How much of a cell is run."""
        config = self.config
        here = Size(requests=config.requests, seeds=config.seeds)
        return here if (cell.load, cell.deadline) == self.goal else config.elsewhere or here

    def said_of(self, fleet: str) -> str:
        """A fleet's nodes, in words."""
        return ", ".join(f"{name} (pace {node.pace:g})" for name, node in self.config.fleets[fleet].nodes.items())

    @cached_property
    def from_noise(self) -> Levels:
        """The levels that are in the file, those that begin from noise alone; `starts` says where the others are from."""
        where = Path(self.config.levels) if self.config.levels else shipped(self.config.family)
        return read_levels(where, self.config.family).from_noise

    @cached_property
    def levels(self) -> Levels:
        """All levels; those that begin from cached latents come last."""
        if self.config.starts is None:
            return self.from_noise
        return with_starts(self.from_noise, [Path(f) for f in self.config.starts.store], read_rule(self.config.family))

    @cached_property
    def works(self) -> tuple[Work, ...]:
        return tuple(level.work for level in self.levels.levels)

    @cached_property
    def scores(self) -> Scores:
        programs = list(dict.fromkeys(str(work.program) for work in self.works))
        found = read_scores(
            [Path(folder) for folder in self.config.store], [self.config.metric], programs, [self.config.family]
        )
        if lacking := set(programs) - {str(program) for program in found.programs}:
            raise BadRequest(f"{', '.join(self.config.store)} holds no rows of {', '.join(sorted(lacking))}")
        return found

    def measured(self, split: str) -> Measured:
        """Quality of each level for each prompt of the split: means over the stored seeds."""
        if split not in self._measured:
            prompts = [p.text for p in self.scores.prompts.get(split, ())]
            if not prompts:
                raise BadRequest(f"{', '.join(self.config.store)} holds no {split} prompts that every level drew")
            metric = self.config.metric
            quality = np.array([
                [np.mean([cell[metric] for cell in self.scores.of(str(work.program), prompt)]) for work in self.works]
                for prompt in prompts
            ])  # fmt: skip
            self._measured[split] = Measured(prompts, quality, self._predicted(prompts), self._caches(split, prompts))
        return self._measured[split]

    @cached_property
    def _measured(self) -> dict[str, Measured]:
        return {}

    def _caches(self, split: str, prompts: Sequence[str]) -> Caches | None:
        """What the levels that begin from cached latents find; None where there are none."""
        config = self.config
        if config.starts is None:
            return None
        folder, family = Path("runs/experiments") / config.name, config.starts.embeds or config.family
        path = folder / f"vectors-{_digest([family, *prompts])}.npy"
        if not path.exists():
            vectors = vectors_of(family, prompts)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, vectors)
        kept = Kept([Path(each) for each in config.starts.store], config.family, config.metric, split)
        return Caches(np.load(path), read_rule(config.family), kept, config.starts.prompts)

    def _predicted(self, prompts: Sequence[str]) -> Any:
        if not self.config.router or self.levels.with_router is None:
            return self.levels.predict(prompts)
        folder = Path("runs/experiments") / self.config.name
        said = [self.levels.family, self.levels.router, self.levels.router_version, *prompts]
        path = folder / f"predicted-{_digest([*said, msgspec.json.encode(self.levels).hex()])}.npy"
        if path.exists():
            return np.load(path)
        from scheduler.router.router import Router

        router = Router.load(self.levels.family, self.levels.router)
        if router.versions[self.levels.family] != self.levels.router_version:
            raise BadRequest(
                f"the levels of {self.levels.family} were fitted with router {self.levels.router_version}, and here is"
                f" {router.versions[self.levels.family]}: `python -m experiments.load levels` fits them anew"
            )
        found = self.levels.predict(prompts, router.predict(prompts))
        folder.mkdir(parents=True, exist_ok=True)
        np.save(path, found)
        return found

    def world(self, fleet: str) -> World:
        if fleet not in self._worlds:
            spec = check_world(self.config.fleets[fleet], f"fleets.{fleet}")
            self._worlds[fleet] = World(spec, list(dict.fromkeys(work.program for work in self.works)))
        return self._worlds[fleet]

    def known(self, fleet: str, deadline_s: float) -> Known:
        validation = self.measured(VALIDATION)
        return Known(
            self.works_of(fleet), validation.quality.mean(0), validation.predicted, validation.quality, deadline_s,
            self._plans.setdefault(f"{fleet} {deadline_s}", {}),
        )  # fmt: skip

    def works_of(self, fleet: str) -> tuple[Work, ...]:
        """The levels, with the bytes that this fleet's links are charged."""
        if fleet not in self._works:
            self._works[fleet] = tuple(sized(self.world(fleet), work) for work in self.works)
        return self._works[fleet]

    def capacity(self, fleet: str) -> tuple[float, float]:
        """Full-cloud requests a second that the fleet does when it is full, and the seconds of one on the idle fleet."""
        if fleet not in self._capacity:
            full = [i for i, work in enumerate(self.works) if work.program.mode == "full-cloud" and not work.skipped]
            if not full:
                raise BadRequest(f"no level of {self.config.family} is full-cloud: load has no measure")
            stations = stations_of(self.world(fleet))
            alone_s = [ends_s(work, stations)[0] for work in self.works_of(fleet)]
            if not np.isfinite(alone_s[full[0]]):
                raise BadRequest(
                    f"fleet {fleet} has no full-cloud capacity: none of its nodes holds {self.config.family}'s large"
                )
            count = 64 * len(stations)
            flood = self._fixed(fleet, full[0], np.zeros(count))
            done = np.sort(flood.seconds)
            middle = slice(count // 4, 3 * count // 4)  # while all nodes are full
            per_s = (count // 2) / (done[middle][-1] - done[middle][0])
            alone = self._fixed(fleet, full[0], 1000.0 * np.arange(3))
            latency_s, least = float(alone.seconds.max()), min(self.config.deadlines)
            if least * latency_s < min(alone_s):
                raise BadRequest(
                    f"deadlines: {least:g} x full-cloud's latency is {least * latency_s:.3g} s, and no level of fleet"
                    f" {fleet} ends within {min(alone_s):.3g} s on idle nodes"
                )
            self._capacity[fleet] = float(per_s), latency_s
        return self._capacity[fleet]

    def _fixed(self, fleet: str, level: int, arrivals: Any) -> Outcome:
        ones = np.zeros((len(arrivals), len(self.works)))
        measured = Measured([str(i) for i in range(len(arrivals))], ones, ones)
        demand = Demand(arrivals, np.arange(len(arrivals)), 1e6)
        return Service(self.world(fleet), self.works_of(fleet), measured, _Fixed(level), demand).run()

    def demand(self, cell: Cell, seed: int, split: str, requests: int) -> Demand:
        """The cell's requests: its trace at `load` times the fleet's capacity, prompts with equal chance."""
        per_s, latency_s = self.capacity(cell.fleet)
        given = dict(self.config.traces[cell.trace])
        horizon = 1.2 * requests / (cell.load * per_s) + 60.0
        if given.get("arrivals") != "trace":
            given["rate_per_s"] = cell.load * per_s
        else:
            given["speed"] = given.get("speed", 1.0) * self._speed(given, cell.load * per_s)
        process = load_arrivals(given)
        times = process.times(horizon, seed)
        while len(times) < requests and given.get("arrivals") != "trace":
            horizon *= 1.5
            times = process.times(horizon, seed)
        times = times[:requests]
        if not len(times):
            raise BadRequest(f"traces.{cell.trace} has no arrival")
        count = len(self.measured(split).prompts)
        prompt = generator(seed, "prompts under load").integers(count, size=len(times))
        return Demand(times, prompt, cell.deadline * latency_s)

    def _speed(self, given: Mapping[str, Any], per_s: float) -> float:
        """How much faster a trace of one's own must be replayed to come at this mean rate."""
        times = load_arrivals(dict(given)).times(1e12, 0)
        if len(times) < 2 or times[-1] <= 0:
            raise BadRequest("a trace needs two arrivals at different times")
        return float(per_s * times[-1] / (len(times) - 1))

    def run(self, name: str, cell: Cell, seed: int, split: str, requests: int, settings: Mapping[str, Any]) -> Outcome:
        demand = self.demand(cell, seed, split, requests)
        system = self.system(name, cell.fleet, demand.deadline_s, seed, settings)
        return Service(
            self.world(cell.fleet), self.works_of(cell.fleet), self.measured(split), system, demand, seed
        ).run()

    def system(self, name: str, fleet: str, deadline_s: float, seed: int, settings: Mapping[str, Any]) -> Plain:
        contestant = self.config.systems[name]
        make = systems()[contestant.system]
        try:
            return make(
                self.known(fleet, deadline_s), generator(seed, "system"), **(contestant.settings | dict(settings))
            )
        except TypeError as error:
            raise BadRequest(f"systems.{name}: {error}") from None

    @cached_property
    def tuned(self) -> dict[str, dict[str, Any]]:
        """System -> settings that `tune` found."""
        own = {name: each["settings"] for name, each in self._searched.items()}
        for name, contestant in self.config.systems.items():
            if contestant.tuned_as in own:
                space = systems()[contestant.system].space  # type: ignore[attr-defined]
                own[name] = {key: value for key, value in own[contestant.tuned_as].items() if key in space}
        return own

    @property
    def tries(self) -> dict[str, list[Any]]:
        """System -> configurations that `tune` tried."""
        return {name: each["tried"] for name, each in self._searched.items()}

    @cached_property
    def _searched(self) -> dict[str, Any]:
        """What `tune` wrote; nothing before it has."""
        if self.config.tuned is None or not Path(self.config.tuned).exists():
            return {}
        return dict(read_yaml(Path(self.config.tuned), dict[str, Any]).get("systems", {}))

    def digest(self, name: str, cell: Cell, settings: Mapping[str, Any], requests: int, split: str) -> str:
        """What a cell depends on but its seed: another digest, and it is run again."""
        config, contestant = self.config, self.config.systems[name]
        fleet = msgspec.to_builtins(config.fleets[cell.fleet])
        measured = self.world(cell.fleet).timing  # itself, wherever it lies
        fleet["timing"] = msgspec.to_builtins(measured, str_keys=True)
        said = [
            fleet, config.traces[cell.trace], msgspec.to_builtins(cell),
            {"system": contestant.system, "settings": contestant.settings}, dict(settings), requests, split,
            config.store, config.metric, msgspec.json.encode(self.from_noise).hex(), config.router,
        ]  # fmt: skip
        always = systems()[contestant.system].starts  # type: ignore[attr-defined]
        if always or (contestant.settings | dict(settings)).get("starts"):
            said += [msgspec.to_builtins(config.starts), msgspec.json.encode(self.levels).hex()]
        return _digest(said)


class _Fixed(Plain):
    """One level for all."""

    def __init__(self, level: int):
        self.level = level

    def choose(self, asked: Asked, stations: Sequence[Station]) -> int | None:
        return self.level


def read_case(path: Path) -> Case:
    """BadRequest names file and key."""
    return Case(read_yaml(path, LoadCase, strict=False))


def _digest(said: Any) -> str:
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=6).hexdigest()
