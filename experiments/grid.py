"""An experiment's config: the YAML in configs/experiments/, and the grid of programs that it spans.

name: rise-relay
workload: {name: scenes, split: test, count: 100}   # or a list: one part of the grid each
families: [mini-sd3, my/family.yaml]
steps: [28]                       # T of the large member; default: each family's own
programs:                         # modes and handoff steps; 0.25 is a share of T, 7 a number of steps
  - {mode: full-cloud}
  - {mode: relay, handoff: [0.25, 0.5, 18], small_steps: [null, 10]}
  - {mode: edge-only}
  - {program: "mini-sd3/small:28:0-9/large:28:9-28/match=exact/..."}
matching: [exact]                 # axes; default: each family's own
codec: [fp16, int8]
conditioning: [encode]
guidance: [null, 3.0, [3.0, 5.0]] # one value, or large and small
seeds: [0]                        # prompt i starts from the noise of seed * 1,000,000 + i
metrics: [scene, {name: lpips, trunk: alexnet.pth}, my_package.metrics:Sharpness]
baselines: [fewer-steps]
chosen: chosen/baselines.yaml     # of each baseline only the setting named there; default: all. See baselines/chosen.py
links: [wifi, {name: far, bandwidth_bit_s: 2e6, delay_s: 0.08}]
deviation: 20                     # of so many prompts a unit, watch the latent's intensity (one more run each)
times: {repeats: 5, curve: [1, 2, 4, 8]}   # or null: no times
batch: 50
real:                             # replaces keys where the families draw no scenes: real checkpoints, real prompts and metrics
  workload: {name: diffusiondb, folder: data/diffusiondb}
  metrics: [{name: clip_score, model: openai/clip-vit-large-patch14}]
  batch: 4                        # also: description, steps, seeds, baselines, chosen, links, deviation, times
expected:                         # shown in the report beside what was measured; of several programs the best
  - {claim: "keeps full quality at 2.1x", source: RISE, value: 1.0, where: {mode: relay, speedup: ">= 2.1", measure: ratio}}
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec

from experiments.baselines.chosen import Chosen, read_chosen
from relay.errors import BadRequest, RelayError
from relay.files import read_yaml
from scheduler.baselines import NAMES as POLICIES

if TYPE_CHECKING:
    from relay.family import Family
    from relay.program import Program

SEED_STRIDE = 1_000_000
Count = Annotated[int, msgspec.Meta(ge=1)]
Seed = Annotated[int, msgspec.Meta(ge=0)]


class Legs(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    mode: Literal["full-cloud", "relay", "edge-only"] | None = None
    handoff: list[int | float] | None = None
    small_steps: list[int | None] = msgspec.field(default_factory=lambda: [None])
    program: str | None = None


class Times(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    repeats: Count = 5
    curve: list[Count] = msgspec.field(default_factory=lambda: [1, 2, 4, 8])


Named = str | dict[str, Any]


class Expected(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A claim that the report sets beside what was measured; see experiments.report.tables for what `where` may say."""

    claim: str
    value: str | float
    source: str = ""
    where: dict[str, Any] = {}


Workloads = dict[str, Any] | list[dict[str, Any]]
Steps = list[Count | None]
Seeds = Annotated[list[Seed], msgspec.Meta(min_length=1)]
Watched = Annotated[int, msgspec.Meta(ge=0)]
Unset = msgspec.UnsetType
Kept = str | dict[str, Chosen] | None  # a file's path beside the config, or what stands in it


class Real(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What an experiment says otherwise where its families draw no scenes; what is left out stays as it is."""

    description: str | Unset = msgspec.UNSET
    workload: Workloads | Unset = msgspec.UNSET
    steps: Steps | Unset = msgspec.UNSET
    seeds: Seeds | Unset = msgspec.UNSET
    metrics: list[Named] | Unset = msgspec.UNSET
    baselines: list[Named] | Unset = msgspec.UNSET
    chosen: Kept | Unset = msgspec.UNSET
    links: list[Named] | Unset = msgspec.UNSET
    deviation: Watched | Unset = msgspec.UNSET
    times: Times | Unset | None = msgspec.UNSET
    batch: Count | Unset = msgspec.UNSET


class Service(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How the policies are tried between real processes: the workload's first prompts, a Poisson stream of requests."""

    requests: Count = 20
    gap_s: Annotated[float, msgspec.Meta(gt=0)] = 0.5


class Experiment(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One experiment, as written. `policy` is swept over real processes, with every link; `load` nothing provides yet."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    workload: Workloads
    families: Annotated[list[str], msgspec.Meta(min_length=1)]
    programs: Annotated[list[Legs], msgspec.Meta(min_length=1)]
    description: str = ""
    steps: Steps = msgspec.field(default_factory=lambda: [None])
    matching: list[Literal["direct", "nearest", "exact"] | None] = msgspec.field(default_factory=lambda: [None])
    codec: list[Literal["fp32", "fp16", "bf16", "int8"] | None] = msgspec.field(default_factory=lambda: [None])
    conditioning: list[Literal["encode", "ship"] | None] = msgspec.field(default_factory=lambda: [None])
    guidance: list[float | tuple[float, float] | None] = msgspec.field(default_factory=lambda: [None])
    seeds: Seeds = msgspec.field(default_factory=lambda: [0])
    metrics: list[Named] = msgspec.field(default_factory=lambda: ["scene"])
    baselines: list[Named] = []
    chosen: Kept = None
    links: list[Named] = []
    deviation: Watched = 0
    times: Times | None = Times()
    batch: Count = 50
    expected: list[Expected] = []
    real: Real | None = None
    policy: list[str] = []
    service: Service = Service()
    load: Any = None


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done wholly or not at all: all programs of a family on one chunk of prompts, one seed."""

    name: str
    family: str
    workload: int
    seed: int
    first: int
    last: int


def read_experiment(path: Path) -> Experiment:
    """The config; BadRequest names file and key."""
    config = read_yaml(path, Experiment)
    if config.load is not None:
        raise BadRequest(f"{path}: `$.load` is an axis that nothing provides yet: leave it out")
    for i, policy in enumerate(config.policy):
        if policy not in POLICIES:
            raise BadRequest(f"{path}: `$.policy[{i}]`: unknown policy {policy!r}: choose one of {', '.join(POLICIES)}")
    if config.policy and not config.links:
        raise BadRequest(f"{path}: `$.policy` is tried over every link of `$.links`: name one, such as loopback")
    for i, legs in enumerate(config.programs):
        if (legs.program is None) == (legs.mode is None):
            raise BadRequest(f"{path}: `$.programs[{i}]` needs either mode or program")
        if (legs.mode == "relay") != (legs.handoff is not None):
            raise BadRequest(f"{path}: `$.programs[{i}]`: handoff belongs to mode relay, and relay needs it")
    return _with_chosen(config, path)


def _with_chosen(config: Experiment, path: Path) -> Experiment:
    """The config with what stands in its files of chosen settings: it fixes rows, so it belongs to the config's hash."""
    if isinstance(config.chosen, str):
        config = msgspec.structs.replace(config, chosen=read_chosen(path.parent / config.chosen))
    if config.real and isinstance(config.real.chosen, str):
        real = msgspec.structs.replace(config.real, chosen=read_chosen(path.parent / config.real.chosen))
        config = msgspec.structs.replace(config, real=real)
    return config


def for_its_families(config: Experiment, where: str) -> tuple[Experiment, frozenset[str]]:
    """The experiment as its families run it, and the keys that `real` replaced; nothing is left in `real`.

    BadRequest where families that draw scenes and others are mixed, or where the scene judge is asked about the others.
    """
    from relay.family_spec import find_family

    draw = {family: find_family(family).scenes for family in config.families}
    others = [family for family, scenes in draw.items() if not scenes]
    if others and len(others) < len(draw):
        raise BadRequest(
            f"{where}: `$.families` mixes {', '.join(f for f in draw if draw[f])}, prompted in the scene language, with"
            f" {', '.join(others)}: their prompts and metrics differ, so run them apart"
        )
    said = config.real if others and config.real else Real()
    replaced = {key: value for key in said.__struct_fields__ if (value := getattr(said, key)) is not msgspec.UNSET}
    config = msgspec.structs.replace(config, **replaced, real=None)
    for i, metric in enumerate(config.metrics):
        if others and "scene" in (metric, metric.get("name") if isinstance(metric, dict) else None):
            key = "real.metrics" if "metrics" in replaced else "metrics"
            raise BadRequest(
                f"{where}: `$.{key}[{i}]`: the scene judge knows scenes only, and {others[0]} draws other pictures: name"
                " the workload and the metrics for such families under `real:`, as configs/experiments/rise.yaml does"
            )
    return config, frozenset(replaced)


def config_hash(config: Experiment, families: dict[str, str]) -> str:
    """12 hex digits over all that fixes the rows: the config, and a digest of each family's weights."""
    fixed = msgspec.to_builtins(config)
    for said in ("description", "expected", "real"):  # `real` is in the other keys where it counts
        fixed.pop(said)
    if config.chosen is None:  # a run from before there was such a key goes on
        fixed.pop("chosen")
    text = msgspec.json.encode([fixed, families], order="sorted")
    return hashlib.blake2b(text, digest_size=6).hexdigest()


def weights_digest(family: Family) -> str:
    """Hash of the first MiB of every weights file and of its length: another training is another experiment."""
    from relay.checkpoints import weight_files

    digest = hashlib.blake2b(digest_size=8)
    parts = [*family.spec.members.values(), family.spec.vae]
    for file in (f for part in parts for f in weight_files(part)):
        with file.open("rb") as opened:
            digest.update(f"{file.name}:{file.stat().st_size}".encode() + opened.read(1 << 20))
    return digest.hexdigest()


def programs_of(config: Experiment, family: Family, where: str, known: bool = True) -> list[Program]:
    """The programs that the grid's axes span for one family, each once, in the config's order.

    `known`: whether the family's schedules are, so that a program given as text can be held against them.
    """
    from relay.program import Program
    from relay.request import plan_program

    found: dict[str, Program] = {}
    for i, legs in enumerate(config.programs):
        try:
            if legs.program is not None:
                if legs.program.split("/")[0] == family.name:
                    program = Program.parse(legs.program)
                    if known:
                        plan_program(family, None, None, program=program)
                    found[str(program)] = program
                continue
            for asked in _spanned(config, legs, family):
                program = plan_program(family, None, None, mode=legs.mode, **asked)
                found.setdefault(_key(program), program)
        except RelayError as error:
            raise BadRequest(f"{where}: `$.programs[{i}]` with family {family.name}: {error}") from None
    return list({str(p): p for p in found.values()}.values())


def _spanned(config: Experiment, legs: Legs, family: Family) -> list[dict[str, Any]]:
    from itertools import product

    spans = []
    for total, matching, codec, conditioning, guidance in product(
        config.steps, config.matching, config.codec, config.conditioning, config.guidance
    ):
        steps = total or family.spec.members["large"].steps
        axes = {"matching": matching, "codec": codec, "conditioning": conditioning, "guidance_scale": guidance}
        handoffs: list[int | float | None] = [*legs.handoff] if legs.handoff else [None]
        for s, n in product(handoffs, legs.small_steps):
            handoff = s if s is None or isinstance(s, int) else max(1, min(steps - 1, round(s * steps)))
            if isinstance(s, float) and not 0 < s < 1:
                raise BadRequest(f"handoff {s} as a share of T lies between 0 and 1; a number of steps is an integer")
            spans.append({"num_inference_steps": steps, "handoff": handoff, "small_steps": n, **axes})
    return spans


def _key(program: Program) -> str:
    """What makes two programs draw alike: nothing is matched, coded or shipped where there is but one leg."""
    return str(program) if len(program.legs) > 1 else f"{program.family}/{program.legs[0]}/{program.guidance}"


def units_of(config: Experiment, counts: list[int]) -> list[Unit]:
    """The run as units of work, of so many prompts a workload, in an order that does not depend on how it is split.

    Seed by seed and chunk by chunk, every workload and family in turn: a run that is stopped holds something of all, and
    one seed of everything before the next. Families change places from chunk to chunk, so that two shards share each.
    """
    units = []
    for seed in config.seeds:
        for k in range(-(-max(counts, default=0) // config.batch)):
            for w, count in enumerate(counts):
                first, last = k * config.batch, min((k + 1) * config.batch, count)
                turn = list(enumerate(config.families))
                for f, family in turn if k % 2 == 0 else reversed(turn):
                    if first < last:
                        name = f"f{f}-{Path(family).stem}-w{w}-s{seed}-p{first:05d}"
                        units.append(Unit(name, family, w, seed, first, last))
    return units


def workload_specs(config: Experiment) -> list[dict[str, Any]]:
    """Each workload with what it leaves unsaid filled in."""
    said = config.workload if isinstance(config.workload, list) else [config.workload]
    return [{"name": "scenes", "split": "test", "count": 100, "seed": 0} | spec for spec in said]
