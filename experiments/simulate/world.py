"""The world that is simulated, as YAML: a deployment's nodes and links, with what was measured of programs.

name: pools
timing: runs/experiments/rise        # a run whose curves and stage times count, or a mapping (see Costs)
nodes:                               # as in a deployment
  edge-1: {role: edge, families: {mini-sd3: [large]}, batch: 8}
  phone-1: {role: device, families: {mini-sd3: [small], mini-sdxl: [small]}, link: wifi, pace: 2, battery: 0.6}
scaled: {reference: mini-sd3, real_step_s: {mini-sd3: 0.263, mini-sdxl: 0.084}, source: where from}
weather: {phone-1: {factors: [1, 0.2], mean_s: [60, 15]}}

Scaled: links are scaled by lambda of the reference family, and a family's messages are charged its real sizes times
lambda_reference / lambda_family, so that transfer / step time is the real family's for each family on one line. Without
`scaled` links are as given and messages have the family's own sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from experiments.simulate.events import Clock
from experiments.simulate.links import Link
from experiments.simulate.loop import Engine, Loop
from experiments.simulate.nodes import Battery, SimNode
from nodes.deployment import NodeConfig
from nodes.gateway.jobs import Job
from nodes.gateway.placement import actions_for, stretches, work_s
from nodes.gateway.registry import Node
from nodes.messages import Holding, Register
from nodes.requests import ImageRequest
from relay.errors import BadRequest
from relay.files import read_yaml
from relay.program import Program
from scheduler.links import LinkProfile, find_link
from scheduler.policy import Action

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that nobody reads is a mistake."""


class Costs(_Strict, frozen=True, kw_only=True):
    """What a family's work takes, in s: `curves`: member -> batch size -> one guided step; the rest per request."""

    curves: dict[str, dict[int, Positive]]
    encode_s: NotNegative = 0.0
    decode_s: NotNegative = 0.0
    handoff_s: NotNegative = 0.0
    latent_bytes: int | None = None  # at 16 bit; None: computed from the family's configs
    image_bytes: int | None = None


class ScaledLinks(_Strict, frozen=True, kw_only=True):
    reference: str
    real_step_s: dict[str, Positive]
    source: str


class Weather(_Strict, frozen=True, kw_only=True):
    """A link that changes: in state i it has factors[i] times its bandwidth, for mean_s[i] s (exponential), then another."""

    factors: Annotated[list[Positive], msgspec.Meta(min_length=2)]
    mean_s: list[Positive]

    def __post_init__(self) -> None:
        if len(self.factors) != len(self.mean_s):
            raise BadRequest(f"weather: {len(self.factors)} factors need as many mean_s, not {len(self.mean_s)}")


class Batteries(_Strict, frozen=True, kw_only=True):
    """Of devices whose config says how full they are at the start.

    With `levels` a battery goes by itself, as weather does: at levels[i] for mean_s[i] s (exponential), then at another.
    Else it falls with each step and rises with time: what is drawn now is then paid for later, which no oracle here counts.
    """

    drain_per_step: NotNegative = 0.0  # of one image
    charge_per_s: NotNegative = 0.0
    levels: list[Share] = []
    mean_s: list[Positive] = []

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.mean_s) or len(self.levels) == 1:
            raise BadRequest("batteries: two or more `levels` need as many `mean_s`")
        if self.levels and (self.drain_per_step or self.charge_per_s):
            raise BadRequest("batteries: levels go by themselves, without drain_per_step and charge_per_s")


class WorldSpec(_Strict, frozen=True, kw_only=True):
    nodes: Annotated[dict[str, NodeConfig], msgspec.Meta(min_length=1)]
    timing: str | dict[str, Costs]
    name: str = "world"
    scaled: ScaledLinks | None = None
    weather: dict[str, Weather] = {}
    batteries: Batteries = Batteries()
    # gateway: pictures go to the gateway, as the service's do. device: every request comes from the user of one of the
    # devices, and its picture goes there, as in the papers.
    asker: Literal["gateway", "device"] = "gateway"
    overhead_s: NotNegative = 0.0  # of gateway, ledger and messages, each request
    heartbeat_s: Positive = 0.5
    judge_s: NotNegative = 0.0  # from the picture to its scores
    judged: Share = 1.0  # of the pictures; policies learn no reward of the others
    deadline_s: Positive = 300.0  # of a request that says none


def read_world(path: Path) -> WorldSpec:
    """BadRequest names file and key."""
    return check_world(read_yaml(path, WorldSpec, strict=False), str(path))


def check_world(spec: WorldSpec, where: str) -> WorldSpec:
    if lacking := [name for name in spec.weather if name not in spec.nodes or spec.nodes[name].link is None]:
        raise BadRequest(f"{where}: weather: {', '.join(lacking)} is no node with a link")
    if spec.asker == "device" and not any(node.role == "device" for node in spec.nodes.values()):
        raise BadRequest(f"{where}: `asker: device` needs a device")
    return spec


def read_timing(timing: str | Mapping[str, Costs]) -> dict[str, Costs]:
    """Costs a family; from a run's folder: its step-time curves, and medians of its stages at batch 1."""
    if not isinstance(timing, str):
        return dict(timing)
    import polars as pl

    from scheduler.outcomes import read_table

    folder = Path(timing)
    curves = read_table(folder, "curves")
    times = read_table(folder, "times").filter((pl.col("link") == "none") & (pl.col("method") == "program"))
    if curves.is_empty() or times.is_empty():
        raise BadRequest(
            f"timing: {folder} holds no step-time curves or no times: measure them with `relay-experiment run`"
        )
    found: dict[str, Costs] = {}
    for family in curves["family"].unique(maintain_order=True).to_list():
        own = curves.filter(pl.col("family") == family)
        members: dict[str, dict[int, float]] = {}
        for member, batch, seconds in own.select("member", "batch", "step_s").iter_rows():
            members.setdefault(member, {})[batch] = seconds
        stages = times.filter(pl.col("family") == family)
        handoffs = stages.filter(pl.col("handoff_s") > 0)["handoff_s"].median()
        found[family] = Costs(
            curves=members, encode_s=_median(stages, "encode_s"), decode_s=_median(stages, "decode_s"),
            handoff_s=float(handoffs or 0.0),  # type: ignore[arg-type]
        )  # fmt: skip
    return found


def _median(frame: Any, column: str) -> float:
    return float(frame[column].median() or 0.0)


class Placed:
    """An action as the simulation carries it out: a stretch a node, and the bytes that travel after each."""

    __slots__ = (
        "action",
        "device",
        "family",
        "image_bytes",
        "latent_bytes",
        "mode",
        "program",
        "stretches",
        "text_program",
    )

    def __init__(self, action: Action, nodes: Mapping[str, Node], latent_bytes: float, image_bytes: float):
        program = action.program
        self.action, self.program, self.family, self.mode = action, program, program.family, program.mode
        self.text_program = str(program)
        self.latent_bytes, self.image_bytes = latent_bytes, image_bytes
        # node, its legs as (member, steps), the seconds of work that the gateway counts for them
        self.stretches = [
            (
                each.node,
                tuple((leg.member, leg.steps) for leg in program.legs[each.first : each.last + 1]),
                work_s(program, each, nodes[each.node]),
            )
            for each in stretches(action)
        ]
        self.device = next((name for name in reversed(action.nodes) if nodes[name].role == "device"), None)


class World:
    """Nodes, programs, costs and sizes; makes the simulated nodes of a run."""

    def __init__(self, spec: WorldSpec, programs: Sequence[Program]):
        self.spec, self.programs = spec, list(programs)
        self.timing = read_timing(spec.timing)
        if unknown := {p.family for p in self.programs} - set(self.timing):
            raise BadRequest(f"timing: no step times of family {', '.join(sorted(unknown))}")
        if any(program.conditioning != "encode" for program in self.programs):
            raise BadRequest("simulated programs encode their prompt on each node: conditioning=ship is not modelled")
        self.devices = [name for name, node in spec.nodes.items() if node.role == "device"]
        self._known = {name: _registered(name, node, self.timing) for name, node in spec.nodes.items()}
        self._actions: dict[tuple[str | None, frozenset[str]], list[Action]] = {}
        self._placed: dict[int, Placed] = {}

    def actions(self, device: str | None = None, gone: frozenset[str] = frozenset()) -> list[Action]:
        """All that could serve a request, as the gateway makes them (`nodes.gateway.placement`), without nodes `gone`."""
        key = device, gone
        if key not in self._actions:
            job = Job(
                "simulated", "simulated", 0, "simulated", 0, ImageRequest(prompt="-", device=device), 0.0, 0.0,
                self.programs, 0,
            )  # fmt: skip
            nodes = [node for name, node in self._known.items() if name not in gone]
            found = actions_for(job, self.programs, nodes)
            if not found:
                raise BadRequest("no node of this world can serve any of the programs")
            self._actions[key] = found
            for action in found:
                latent, image = self.sizes[action.program.family]
                scale = {"fp32": 2.0, "int8": 0.5}.get(action.program.codec, 1.0)
                self._placed[id(action)] = Placed(action, self._known, latent * scale, image)
        return self._actions[key]

    def placed(self, action: Action) -> Placed:
        """`action` is one of `actions`; one that was made anew is found by its value."""
        if (found := self._placed.get(id(action))) is None or found.action is not action:
            found = next((each for each in self._placed.values() if each.action == action), None)
            if found is None:
                raise BadRequest(f"{action} was not on offer")
        return found

    @cached_property
    def sizes(self) -> dict[str, tuple[float, float]]:
        """Family -> bytes of a latent at 16 bit and of an image, as links are charged."""
        from relay.family_spec import find_family
        from scheduler.message_sizes import computed_sizes, real_sizes

        found = {}
        for family, costs in self.timing.items():
            if self.spec.scaled is not None:
                real, share = real_sizes(family), self._factor(self.spec.scaled.reference) / self._factor(family)
                found[family] = real.latent * share, real.image * share
            elif costs.latent_bytes is not None and costs.image_bytes is not None:
                found[family] = float(costs.latent_bytes), float(costs.image_bytes)
            else:
                own = computed_sizes(find_family(family))
                found[family] = float(own.latent), float(own.image)
        return found

    def _factor(self, family: str) -> float:
        """lambda of a family: its real step time / its mini step time, large member, batch 1."""
        scaled = self.spec.scaled
        assert scaled is not None
        if family not in scaled.real_step_s:
            raise BadRequest(f"scaled.real_step_s has no {family}")
        return scaled.real_step_s[family] / self.timing[family].curves["large"][1]

    def profile(self, name: str) -> LinkProfile | None:
        """A node's link as it is simulated."""
        given = self.spec.nodes[name].link
        if given is None:
            return None
        link, scaled = find_link(given), self.spec.scaled
        if scaled is None or link.scaling is not None:
            return link
        mini = self.timing[scaled.reference].curves["large"][1]
        return link.scaled(scaled.real_step_s[scaled.reference], mini, scaled.source)

    def build(self, clock: Clock, seed: int) -> dict[str, SimNode]:
        """The simulated nodes of one run; `seed` draws the links' jitter."""
        nodes = {}
        for number, (name, config) in enumerate(self.spec.nodes.items()):
            engines, known = {}, self._known[name]
            for family, members in config.families.items():
                for member in members:
                    curve = tuple(sorted(self.timing[family].curves[member].items()))
                    engines[family, member] = Engine(curve, config.batch, config.pace)
            loop = Loop(engines, *({f: getattr(c, key) for f, c in self.timing.items()} for key in _PER_REQUEST))
            profile = self.profile(name)
            link = Link(profile, (seed, 61, number)) if profile else None
            own = self.spec.batteries
            battery = (
                Battery(config.battery, own.drain_per_step, own.charge_per_s) if config.battery is not None else None
            )
            held = known.register.holdings
            facts = {
                "name": name, "role": config.role, "curves": {h.family: h.curves for h in held}, "batch": config.batch,
                "encode_s": max(h.encode_s for h in held), "decode_s": max(h.decode_s for h in held),
                "pace": config.pace,
            }  # fmt: skip
            nodes[name] = SimNode(name, loop, clock, config.queue, link, battery, facts)
        return nodes


_PER_REQUEST = ("encode_s", "decode_s", "handoff_s")


def _registered(name: str, config: NodeConfig, timing: Mapping[str, Costs]) -> Node:
    """A node as the gateway has it in its registry, pace in its curves."""
    holdings = []
    for family, members in config.families.items():
        costs = timing.get(family)
        if costs is None or (lacking := [m for m in members if m not in costs.curves]):
            said = f"{family} {lacking[0]}" if costs else family
            raise BadRequest(f"node {name}: no step times of {said}")
        curves = {
            m: {b: s * config.pace for b, s in costs.curves[m].items() if b <= config.batch or b == 1} for m in members
        }
        holdings.append(
            Holding(
                family=family, members=tuple(members), decodes=True, fingerprint={}, curves=curves,
                encode_s=costs.encode_s, decode_s=costs.decode_s,
            )
        )  # fmt: skip
    register = Register(
        name=name, session="simulated", holdings=tuple(holdings), batch=config.batch, queue=config.queue
    )
    return Node(name, config.role, "", b"", register, 0.0)
