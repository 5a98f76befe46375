"""What a run needs, read and checked before its first step: a wrong key or a missing metric costs no time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from experiments.baselines import load_baseline
from experiments.baselines.points import Point, points, totals_of
from experiments.grid import (
    Experiment,
    Unit,
    config_hash,
    for_its_families,
    programs_of,
    units_of,
    weights_digest,
    workload_specs,
)
from experiments.links import link_for
from experiments.provenance import provenance
from experiments.workloads import load_workload
from relay.errors import BadRequest
from relay.metrics import BUILTIN, Metric, load_metric
from relay.pipeline import RelayPipeline

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline
    from experiments.workloads import Prompt, Workload
    from relay.family import Family
    from relay.program import Program


@dataclass
class Prepared:
    """All that a run needs. `config` is as its families run it: what `real` says has replaced what it replaces."""

    config: Experiment
    where: str
    pipes: dict[str, RelayPipeline]
    programs: dict[str, list[Program]]
    prompts: list[list[Prompt]]
    metrics: list[Metric]
    points: dict[str, list[Point]]
    hash: str
    units: list[Unit]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keyed:
    """Calls something for a key of a config, so that what it refuses names file and key."""

    where: str
    replaced: frozenset[str]  # keys that stand under `real`

    def __call__(self, key: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except BadRequest as error:
            raise BadRequest(f"{self.named(key)}: {error}") from None

    def named(self, key: str) -> str:
        root = re.split(r"\W", key)[0]
        return f"{self.where}: `$.{'real.' if root in self.replaced else ''}{key}`"


def prepare(config: Experiment, where: str, device: str | None = None, dtype: str | None = None) -> Prepared:
    """Read families, prompts, metrics and baselines; BadRequest names file and key of whatever is wrong or missing."""
    config, replaced = for_its_families(config, where)
    keyed = Keyed(where, replaced)
    metrics = metrics_of(config, keyed)
    for i, metric in enumerate(metrics):
        if reason := metric.missing():
            raise BadRequest(f"{keyed.named(f'metrics[{i}]')}: {reason}")
    baselines = baselines_of(config, keyed)
    prompts = [
        keyed(f"workload[{i}]", partial(prompts_of, workload, spec))
        for i, (spec, workload) in enumerate(workloads_of(config, keyed))
    ]
    pipes = {f: RelayPipeline.from_pretrained(f, device=device, torch_dtype=dtype) for f in config.families}
    programs = {f: programs_of(config, pipe.family, where) for f, pipe in pipes.items()}
    for pipe in pipes.values():
        check_prompts(pipe.family, prompts, keyed)
        check_links(config, pipe.family, keyed)
    found = {f: points_of(config, baselines, pipe.family, programs[f], keyed) for f, pipe in pipes.items()}
    for pipe in pipes.values():
        put_metrics(metrics, config, pipe.family)
    digests = {f: weights_digest(pipe.family) for f, pipe in pipes.items()}
    prepared = Prepared(
        config, where, pipes, programs, prompts, metrics, found, config_hash(config, digests),
        units_of(config, [len(some) for some in prompts]),
    )  # fmt: skip
    prepared.facts = {
        "config": msgspec.to_builtins(config), "config_hash": prepared.hash, "weights": digests,
        "programs": {f: [str(p) for p in some] for f, some in programs.items()}, "provenance": provenance(),
        "baselines": {f: {b.name: b.applies(pipe.family) for b in baselines} for f, pipe in pipes.items()},
        "dtypes": {f: dtype_of(pipe.family) for f, pipe in pipes.items()},
    }  # fmt: skip
    return prepared


def dtype_of(family: Family) -> str:
    """What the members compute in: `bf16`, or each with its own where they differ."""
    each = {name: family.dtype(member) for name, member in family.spec.members.items()}
    return each["large"] if len(set(each.values())) == 1 else ", ".join(f"{name} {d}" for name, d in each.items())


def metrics_of(config: Experiment, keyed: Keyed) -> list[Metric]:
    return [keyed(f"metrics[{i}]", partial(_named, load_metric, m)) for i, m in enumerate(config.metrics)]


def put_metrics(metrics: list[Metric], config: Experiment, family: Family) -> None:
    """Score where the family runs, unless the config says where: on a CPU the real metrics take as long as the drawing."""
    for metric, entry in zip(metrics, config.metrics, strict=True):
        name, said = (entry, {}) if isinstance(entry, str) else (entry["name"], entry)
        if name in BUILTIN and "device" not in said and hasattr(metric, "device") and not family.spec.scenes:
            metric.device = str(family.device(family.spec.vae))


def baselines_of(config: Experiment, keyed: Keyed) -> list[Baseline]:
    return [keyed(f"baselines[{i}]", partial(_named, load_baseline, b)) for i, b in enumerate(config.baselines)]


def points_of(
    config: Experiment, baselines: list[Baseline], family: Family, programs: list[Program], keyed: Keyed
) -> list[Point]:
    """Every setting (or the chosen one) of every baseline that the family takes, for every T that it runs in full."""
    asked = [total or family.spec.members["large"].steps for total in config.steps]
    assert not isinstance(config.chosen, str), "read_experiment has read the file"
    key = "baselines" if config.chosen is None else "chosen"
    return keyed(key, partial(points, baselines, family, totals_of(programs, asked), config.chosen))


def workloads_of(config: Experiment, keyed: Keyed) -> list[tuple[dict[str, Any], Workload]]:
    """Each workload's spec (split, count, seed) with the workload, of which nothing is read yet."""
    found = []
    for i, spec in enumerate(workload_specs(config)):
        count = spec["count"]
        if not isinstance(count, int) or count < 1:
            raise BadRequest(f"{keyed.named(f'workload[{i}]')}: count {count!r} is not a whole number of at least 1")
        options = {key: value for key, value in spec.items() if key not in ("name", "split", "count", "seed")}
        found.append((spec, keyed(f"workload[{i}]", partial(load_workload, spec["name"], **options))))
    return found


def prompts_of(workload: Workload, spec: dict[str, Any]) -> list[Prompt]:
    """A workload's prompts, class by class in turn, so that any first part of them holds all classes alike."""
    classes: dict[str, list[Prompt]] = {}
    for prompt in workload.prompts(spec["split"], spec["count"], spec["seed"]):
        classes.setdefault(prompt.complexity, []).append(prompt)
    longest = max(map(len, classes.values()), default=0)
    return [some[i] for i in range(longest) for some in classes.values() if i < len(some)]


def check_prompts(family: Family, prompts: list[list[Prompt]], keyed: Keyed) -> None:
    """A family that draws scenes reads scenes only."""
    if family.spec.scenes:
        from relay.request import check_texts

        keyed("workload", partial(check_texts, family, [p.text for some in prompts for p in some], []))


def check_links(config: Experiment, family: Family, keyed: Keyed) -> None:
    """A wrong link costs no time either; its scale is measured later."""
    for i, entry in enumerate(config.links):
        keyed(f"links[{i}]", partial(link_for, entry, family.spec, 1.0))


def _named(load: Callable[..., Any], entry: str | dict[str, Any]) -> Any:
    if isinstance(entry, str):
        return load(entry)
    options = dict(entry)
    if "name" not in options:
        raise BadRequest(f"{entry} needs a name")
    return load(options.pop("name"), **options)
