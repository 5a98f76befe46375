"""RISE's scheduling table as a config: which policies, in which world, on which requests (configs/experiments/scheduling.yaml).

A *cell* is one contender in one scenario with one seed: it meets `learn` requests of train prompts, then `requests` of
test prompts, and goes on learning. Every contender of a scenario and seed meets the same requests, on fresh nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from experiments.simulate.environment import Row, Run, Shift, Simulation
from experiments.simulate.oracle import Oracle
from experiments.simulate.scores import Scores, describe, read_scores
from experiments.simulate.stream import Asking, stream
from experiments.simulate.views import Blind, Frozen, Remembering
from experiments.simulate.world import World, WorldSpec, check_world, read_world
from experiments.workloads import TimedRequest
from relay.errors import BadRequest
from relay.files import read_yaml
from relay.program import Program
from scheduler.baselines import NAMES, load_policy
from scheduler.policy import Policy
from scheduler.reward import COSTS, SCORES, Reward, load_reward

if TYPE_CHECKING:
    import polars as pl

    from scheduler.learned import Learned

Count = Annotated[int, msgspec.Meta(ge=1)]
PLAIN = "plain"  # the scenario without a shift


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that nobody reads is a mistake."""


class ArmFilter(_Strict, frozen=True, kw_only=True):
    """Programs that fit all that is said. `whole`: every leg on a schedule of the first one's length, as RISE's are."""

    family: str | None = None
    mode: str | None = None
    whole: bool | None = None
    handoff: tuple[float, float] | None = None  # least and most s / T

    def fits(self, program: Program) -> bool:
        total = program.legs[0].steps_total
        share = program.steps["large"] / total
        return (
            self.family in (None, program.family)
            and self.mode in (None, program.mode)
            and self.whole in (None, all(leg.steps_total == total for leg in program.legs))
            and (self.handoff is None or self.handoff[0] <= share <= self.handoff[1])
        )


class Range(_Strict, frozen=True, kw_only=True):
    low: float
    high: float
    log: bool = False
    whole: bool = False  # rounded


class Contender(_Strict, frozen=True, kw_only=True):
    """A policy by name, or `oracle`. What has a `space` learns, is tuned by random search, and meets `learn` requests."""

    policy: str
    options: dict[str, Any] = {}
    space: dict[str, Range | list[Any]] = {}
    says: str = ""  # for the table
    arms: str | None = None  # one of `arms`; None: the config's `offer`
    scenarios: list[str] | None = None  # None: all
    like: str | None = None  # settings are those tuned for that contender, and `options` are laid over them
    of: str | None = None  # an ablation of that contender: `like` it, and in a table of its own
    blind: bool = False  # sees the same context at every decision
    static_reward: bool = False  # learns from the reward without task-dependent weights
    frozen: bool = False  # learns nothing of the test requests

    def __post_init__(self) -> None:
        if self.source is not None and self.space:
            raise BadRequest("what has the settings of another contender (`of`, `like`) has no `space`")

    @property
    def source(self) -> str | None:
        """Whose settings it has, if another's."""
        return self.of if self.of is not None else self.like


class Change(_Strict, frozen=True, kw_only=True):
    """A shift: from request `at` x requests on, a link (`node`, `link`), a node (`node`, `pace`) or the mix (`classes`)."""

    at: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.5
    node: str | None = None
    link: float | None = None
    pace: float | None = None
    classes: tuple[str, ...] | None = None
    says: str = ""

    def __post_init__(self) -> None:
        if (self.node is None) != (self.link is None and self.pace is None):
            raise BadRequest("a shift of a link or a pace needs the `node`, and a `node` needs one of the two")
        if self.node is None and self.classes is None:
            raise BadRequest("a shift changes a node's `link` or `pace`, or the `classes` of prompts")


class Search(_Strict, frozen=True, kw_only=True):
    """Random search of each learner's settings: what is given, then `configurations` - 1 drawn from its space."""

    configurations: Count = 20
    learn: Count = 2000
    requests: Count = 1000
    seeds: list[int] = msgspec.field(default_factory=lambda: [1001, 1002])
    seed: int = 0


class Scheduling(_Strict, frozen=True, kw_only=True):
    name: str
    world: str | WorldSpec
    store: list[str]  # run folders with quality rows; several may hold several seeds
    asking: Asking
    contenders: dict[str, Contender]
    description: str = ""
    families: list[str] | None = None
    reward: str | None = None  # a YAML; None: configs/reward.yaml
    offer: str | None = None  # one of `arms`: what contenders choose from; None: every stored program
    arms: dict[str, list[ArmFilter]] = {}
    requests: Count = 2000
    learn: Count = 2000
    seeds: Count = 10
    splits: tuple[str, str, str] = ("train", "validation", "test")  # learned on, tuned on, reported on
    search: Search = Search()
    tuned: str | None = None
    shifts: dict[str, Change] = {}


def read_scheduling(path: Path) -> Scheduling:
    """BadRequest names file and key."""
    config = read_yaml(path, Scheduling, strict=False)
    for name, contender in config.contenders.items():
        known = {None, *config.arms}
        if contender.arms not in known or config.offer not in known:
            raise BadRequest(f"{path}: contenders.{name}: `arms` has no {contender.arms or config.offer!r}")
        if contender.source is not None and contender.source not in config.contenders:
            raise BadRequest(f"{path}: contenders.{name}: there is no contender {contender.source!r} to be like")
        if unknown := set(contender.scenarios or ()) - {PLAIN, *config.shifts}:
            raise BadRequest(f"{path}: contenders.{name}: unknown scenario {', '.join(sorted(unknown))}")
    return config


class Bench:
    """A config with all that it names, read."""

    def __init__(self, config: Scheduling):
        self.config = config
        self.reward: Reward = load_reward(Path(config.reward) if config.reward else None)
        stored = {ours: theirs for theirs, ours in SCORES.items()}  # the store's names of the reward's scores
        wanted = [stored.get(name, name) for name in self.reward.scales if name not in COSTS]
        self.scores: Scores = read_scores([Path(each) for each in config.store], wanted, families=config.families)
        self.spec = check_world(config.world, config.name) if isinstance(config.world, WorldSpec) else read_world(
            Path(config.world)
        )  # fmt: skip
        self._worlds: dict[str | None, World] = {}
        self._streams: dict[Any, list[TimedRequest]] = {}
        self._router: Remembering | None = None

    @cached_property
    def tuned(self) -> dict[str, dict[str, Any]]:
        """Contender -> the options that the search chose."""
        if self.config.tuned is None or not Path(self.config.tuned).exists():
            return {}
        found = msgspec.yaml.decode(Path(self.config.tuned).read_bytes())
        return {name: kept["options"] for name, kept in found["contenders"].items()}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a result names as its ground."""
        return {
            "store": describe(self.scores), "world": msgspec.to_builtins(self.spec, str_keys=True),
            "reward": msgspec.to_builtins(self.reward), "runs": [_hash_of(Path(each)) for each in self.config.store],
        }  # fmt: skip

    def world(self, arms: str | None) -> World:
        if arms not in self._worlds:
            filters = self.config.arms[arms] if arms is not None else [ArmFilter()]
            programs = [p for p in self.scores.programs if any(each.fits(p) for each in filters)]
            if not programs:
                raise BadRequest(f"no stored program fits the arms {arms!r}")
            self._worlds[arms] = World(self.spec, programs)
        return self._worlds[arms]

    def arms_of(self, name: str) -> str | None:
        contender = self.config.contenders[name]
        return contender.arms if contender.arms is not None else self.config.offer

    def learns(self, name: str) -> bool:
        contender = self.config.contenders[name]
        return bool(contender.space) if contender.source is None else self.learns(contender.source)

    def options(self, name: str) -> dict[str, Any]:
        """A contender's settings: as given, then as tuned, then an ablation's own."""
        contender = self.config.contenders[name]
        if contender.source is not None:
            own = self.options(contender.source) | contender.options
            return {key: value for key, value in own.items() if value is not None}  # None takes a setting away
        return contender.options | self.tuned.get(name, {})

    def policy(self, name: str, seed: int, options: Mapping[str, Any] | None = None) -> Policy:
        """A new one. `seed` is given to those that draw."""
        contender = self.config.contenders[name]
        given = dict(self.options(name) if options is None else options)
        learned = contender.policy == "learned"
        policy = self.learned(given, seed) if learned else make_policy(contender.policy, given, seed)
        return Blind(policy) if contender.blind else policy

    def learned(self, options: dict[str, Any], seed: int, model: Path | None = None) -> Learned:
        """Router and bandit as the gateway makes them, the bandit with what `model` holds; options that are not the
        gateway's own are the bandit's."""
        from nodes.gateway.learning import LearnedConfig, make_learned, read_learned

        given = nested(options)
        own = {key: given.pop(key) for key in [*given] if key in LearnedConfig.__struct_fields__}
        config = read_learned(own | {"bandit": own.get("bandit", {}) | given, "seed": seed, "warm": False})
        families = sorted({program.family for program in self.scores.programs})
        learned, said = make_learned(config, families, self.reward, model)
        if said:
            raise BadRequest(said)
        if learned.router is not None:
            if self._router is None:
                self._router = Remembering(learned.router)
            learned.router = self._router  # type: ignore[assignment]
        return learned

    def requests(self, split: str, count: int, seed: int, then: Any = None) -> list[TimedRequest]:
        key = split, count, seed, then
        if key not in self._streams:
            while len(self._streams) > 8:
                del self._streams[next(iter(self._streams))]
            self._streams[key] = stream(self.config.asking, self.scores, split, count, seed, then)
        return self._streams[key]

    def run(
        self,
        name: str,
        seed: int,
        split: str,
        learn: int,
        count: int,
        scenario: str = PLAIN,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[list[Row], list[Row], float]:
        """Rows of learning and of what is judged, and microseconds of CPU that a decision took in the latter."""
        config, contender = self.config, self.config.contenders[name]
        told = self.reward.static() if contender.static_reward else None
        simulation = Simulation(self.world(self.arms_of(name)), self.scores, self.reward, told)
        policy = self.policy(name, seed, options)
        first: list[Row] = []
        if learn:
            first = simulation.run(policy, self.requests(config.splits[0], learn, seed), seed)
        if contender.frozen:
            policy = Frozen(policy)
        shifts, then = [], None
        if scenario != PLAIN:
            change = config.shifts[scenario]
            at = round(change.at * count)
            if change.node is not None:
                shifts = [Shift(at=at, node=change.node, link=change.link, pace=change.pace)]
            then = (at, change.classes) if change.classes is not None else None
        run = Run(simulation, policy, self.requests(split, count, seed, then), seed, shifts)
        second = run.rows()
        return first, second, 1e6 * float(np.median(run.decide_s))

    def scenarios(self, name: str) -> list[str]:
        return self.config.contenders[name].scenarios or [PLAIN, *self.config.shifts]

    def digest(self, name: str, scenario: str, options: Mapping[str, Any] | None = None) -> str:
        """What a cell depends on but its seed: another digest, and it is run again."""
        config, contender = self.config, self.config.contenders[name]
        ground = {
            "contender": msgspec.to_builtins(contender) | {"space": None, "says": None},
            "options": self.options(name) if options is None else options,
            "shift": msgspec.to_builtins(config.shifts.get(scenario)), "asking": msgspec.to_builtins(config.asking),
            "arms": [str(program) for program in self.world(self.arms_of(name)).programs],
            "sizes": (config.requests, config.learn, config.splits),
            "timing": msgspec.to_builtins(self.world(self.arms_of(name)).timing, str_keys=True),
        } | self.facts  # fmt: skip
        said = json.dumps(ground, sort_keys=True)
        return hashlib.blake2b(said.encode(), digest_size=6).hexdigest()


def _hash_of(folder: Path) -> str | None:
    """What a run was made with, where its folder says it."""
    path = folder / "run.json"
    return str(json.loads(path.read_text())["config_hash"]) if path.exists() else None


def make_policy(name: str, options: Mapping[str, Any], seed: int) -> Policy:
    """A policy of scheduler.baselines, `oracle`, or `package.module:Class`; with `seed`, if it takes one and none is said.

    An option `settings.gamma` is the key `gamma` of the option `settings`, so that a space can name it.
    """
    options = nested(options)
    if name == "oracle":
        return Oracle(**options)
    if ":" in name:
        from relay.plugins import make

        return make("policy", name, Policy, options)
    if name in NAMES and "seed" not in options:
        with contextlib.suppress(BadRequest):  # it takes none, or something else is wrong, which is said below
            return load_policy(name, **options, seed=seed)
    return load_policy(name, **options)


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """`settings.gamma: 1` as `settings: {gamma: 1}`."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        outer, _, inner = key.partition(".")
        found[outer] = {**found.get(outer, {}), inner: value} if inner else value
    return found


def frame(rows: Sequence[Row]) -> pl.DataFrame:
    """Rows as they are kept. `quality` and `time`: what scores and seconds added to the reward, before its tanh."""
    import polars as pl

    return pl.DataFrame(
        {
            "index": [row.index for row in rows],
            "reward": [row.reward for row in rows],
            "quality": [sum(v for k, v in row.terms.items() if k not in COSTS) for row in rows],
            "time": [row.terms.get("seconds") for row in rows],
            "seconds": [row.seconds for row in rows],
            "scene": [row.scores.get("attributes") for row in rows],
            "complexity": [row.complexity for row in rows],
            "preference": [row.preference for row in rows],
            "program": [str(row.action.program) for row in rows],
            "mode": [row.action.program.mode for row in rows],
            "nodes": [",".join(row.action.nodes) for row in rows],
            "probability": [row.probability for row in rows],
            "stage": [row.stage for row in rows],
        },
        schema_overrides={"reward": pl.Float64, "time": pl.Float64, "scene": pl.Float64},
    )
