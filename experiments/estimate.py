"""What a run would do, take and need, without doing it, and without a weight, a prompt or a metric on this machine.

The grid, the steps of every program and baseline, what a step costs and where that figure is from, and at the end all
that is missing, in one list.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments import prepare
from experiments.grid import Experiment, Unit, for_its_families, programs_of, units_of
from experiments.provenance import RESULTS
from experiments.real_sizes import SIZES
from experiments.scoring import prefix_steps
from experiments.sketch import Sketch, family_or_sketch
from relay.errors import BadRequest, FamilyError
from relay.family_spec import find_family
from relay.step_times import step_curve

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline
    from experiments.baselines.points import Point
    from relay.family import Family, Need
    from relay.program import Program

ARGUS_STEP_S = 4.2 / 50  # arXiv 2511.06724: 4.2 s for 50 steps; of the kind of SDXL, on the authors' machine
MEMBERS = ("large", "small")


@dataclass(frozen=True)
class StepCosts:
    """Seconds of one guided step of one image, and where they are from."""

    seconds: dict[str, float]  # by member
    source: str
    on_gpu: bool

    def of(self, steps: Counter[str]) -> float:
        """Seconds of so many steps; a third member is taken for a large one."""
        return sum(count * self.seconds.get(member, self.seconds["large"]) for member, count in steps.items())


def dry_run(
    config: Experiment, where: str, device: str | None = None, dtype: str | None = None, step_ms: str | None = None
) -> str:
    """The whole answer as text; BadRequest on a config that is wrong, never on what is only missing."""
    given = parse_step_ms(step_ms) if step_ms else None
    config, replaced = for_its_families(config, where)
    keyed = prepare.Keyed(where, replaced)
    missing: list[str] = []
    for metric in prepare.metrics_of(config, keyed):
        if reason := metric.missing():
            missing.append(f"metric {metric.name}: {reason}")
    baselines = prepare.baselines_of(config, keyed)
    prompts, counts = [], []
    for spec, workload in prepare.workloads_of(config, keyed):
        try:
            found = prepare.prompts_of(workload, spec)
        except BadRequest as error:
            said = str(error).removeprefix(f"workload {spec['name']}: ")
            missing.append(f"workload {spec['name']}: {said}")
            found = []
        prompts.append(found)
        counts.append(len(found) or spec["count"])
    units = units_of(config, counts)
    lines = [f"{config.name}: {config.description}".rstrip(": "), ""]
    total, unknown, on_gpu = 0.0, [], False
    for name in config.families:
        family, needs = family_or_sketch(find_family(name), device, dtype)
        missing += [f"weights of {family.name}, {_need(need)}" for need in needs if not need.installed]
        prepare.check_prompts(family, [some for some in prompts if some], keyed)
        with contextlib.suppress(FamilyError):  # sizes of messages stand in configs that are not here
            prepare.check_links(config, family, keyed)
        programs = programs_of(config, family, where, known=not isinstance(family, Sketch))
        points = prepare.points_of(config, baselines, family, programs, keyed)
        lines += [f"family {name}: {len(programs)} programs", *_grid(family, programs)]
        installed = all(need.installed for need in needs)
        costs = step_costs(family, config.batch, installed, given)
        work = _work(config, programs, points, [unit for unit in units if unit.family == name])
        lines += [f"  {said}: {_steps(steps)}" for said, steps in work.items() if steps]
        if costs is None:
            unknown.append(family.name)
            lines.append("  no step cost is known for it: say --step-ms LARGE,SMALL")
        else:
            seconds, on_gpu = costs.of(sum(work.values(), Counter())), on_gpu or costs.on_gpu
            total += seconds
            each = " and ".join(f"{member} {1000 * costs.seconds[member]:.3g} ms" for member in MEMBERS)
            lines += [f"  a step of one image: {each} ({costs.source})", f"  about {span(seconds, costs.on_gpu)}"]
        for baseline in baselines:
            lines.append(
                f"  baseline {baseline.name}: {baseline.applies(family) or _settings(config, baseline, points)}"
            )
    without = f", {' and '.join(unknown)} left out," if unknown else ""
    lines += [
        "",
        f"{len(units)} units of work; about {span(total, on_gpu)}{without} without text encoding, decoding and scoring",
    ]
    return "\n".join([*lines, *_told(missing)])


def _settings(config: Experiment, baseline: Baseline, points: Sequence[Point]) -> str:
    """How many, or which where they are chosen."""
    mine = [point.setting.label for point in points if point.baseline is baseline]
    return f"{len(mine)} settings" if config.chosen is None else f"chosen: {'; '.join(mine)}"


def _grid(family: Family, programs: Sequence[Program]) -> list[str]:
    """The programs as they would run; without schedules only what the config says of them."""
    if not isinstance(family, Sketch):
        return [f"  {program}" for program in programs]
    lines = []
    for program in programs:
        steps, options = program.steps, str(program).split("/")[1 + len(program.legs) :]
        total = program.legs[0].steps_total
        lines.append(
            f"  {program.mode:<10}  T = {total:<3} s = {steps['large']:<3} n = {steps['small']:<3} {' '.join(options)}"
        )
    return [*lines, "  its scheduler configs are not here: n follows from the schedules at the run, T - s is shown"]


def _work(
    config: Experiment, programs: Sequence[Program], points: Sequence[Point], units: Sequence[Unit]
) -> dict[str, Counter[str]]:
    """Steps x images of each member, by what they are for."""
    images = sum(unit.last - unit.first for unit in units)
    watched = sum(min(config.deviation, unit.last - unit.first) for unit in units)
    once: Counter[str] = Counter()  # programs share the beginnings of their trajectories
    for (member, _, _), steps in prefix_steps(programs).items():
        once[member] += steps
    again: Counter[str] = Counter()  # the first leg's member walks on over the second leg, for the deviation
    for program in programs:
        for k, leg in enumerate(program.legs[1:]):
            once[leg.member] += leg.steps
            if k == 0:
                again[program.legs[0].member] += leg.steps
    settings = _summed([point.steps for point in points])
    alone = _summed([program.steps for program in programs]) + settings
    rounds = config.times.repeats + 1 if config.times else 0
    return {
        f"{images} prompts x seeds, programs": _times(once, images),
        f"deviation, {watched} of them walked once more": _times(again, watched),
        f"baselines, {len(points)} settings, a cache counted as if it saved nothing": _times(settings, images),
        f"times, {rounds} rounds of every program and setting": _times(alone, rounds),
    }


def _summed(steps: list[dict[str, int]]) -> Counter[str]:
    return sum(map(Counter, steps), Counter[str]())


def _times(steps: Counter[str], factor: int) -> Counter[str]:
    return Counter({member: count * factor for member, count in steps.items() if count * factor})


def _steps(steps: Counter[str]) -> str:
    return " and ".join(f"{count:,} {member}" for member, count in steps.items()) + " steps"


def step_costs(
    family: Family, batch: int, installed: bool, given: tuple[float, float] | None = None
) -> StepCosts | None:
    """What a step of each member costs: as said, as measured here, as measured once elsewhere, as published for another."""
    if given:
        return StepCosts(dict(zip(MEMBERS, given, strict=True)), "--step-ms", on_gpu=not family.spec.scenes)
    if installed:
        costs = {member: step_curve(family, member, [batch], repeats=1)[batch] / batch for member in MEMBERS}
        device = family.denoiser("large").device.type
        return StepCosts(costs, f"measured here, {device}, batch {batch}", device == "cuda")
    return _measured_elsewhere(family.name, batch) or _from_argus(family)


def _measured_elsewhere(name: str, batch: int) -> StepCosts | None:
    """From `relay-experiment latency`: the curve's largest batch that is no larger than the run's."""
    path = RESULTS / f"latency-{name}.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())["families"][name]
        if data["tiny"]:
            return None
        curves = [{row["batch"]: row["step_s"] for row in data["members"][m]["curve"]} for m in MEMBERS]
        at = max(b for b in curves[0].keys() & curves[1].keys() if b <= batch)
        costs = {member: curve[at] / at for member, curve in zip(MEMBERS, curves, strict=True)}
        return StepCosts(costs, f"{path.name}: {data['device']}, {data['dtype']}, batch {at}", on_gpu=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequest(f"{path} is not what `relay-experiment latency` writes: {error!r}; say --step-ms") from None


def _from_argus(family: Family) -> StepCosts | None:
    """The one published figure, in proportion to parameters; None where those are not known either."""
    try:
        if sizes := SIZES.get(family.name):
            counts = {member: sizes.published[member].parameters for member in MEMBERS}
        else:
            counts = {member: float(family.parameters(member)) for member in MEMBERS}
    except FamilyError:
        return None
    of_sdxl = SIZES["sdxl-vega"].published["large"].parameters
    source = "Argus, arXiv 2511.06724: 4.2 s for 50 steps of SDXL's kind on its authors' GPU; here in proportion to parameters"
    return StepCosts({m: ARGUS_STEP_S * counts[m] / of_sdxl for m in MEMBERS}, source, on_gpu=True)


def parse_step_ms(text: str) -> tuple[float, float]:
    """LARGE,SMALL in milliseconds to seconds."""
    try:
        large, small = (float(value) / 1000 for value in text.split(","))
    except ValueError:
        raise BadRequest(f"--step-ms {text!r} is not LARGE,SMALL in milliseconds") from None
    if min(small, large) <= 0:
        raise BadRequest(f"--step-ms {text!r}: step costs are above 0")
    return large, small


def _need(need: Need) -> str:
    size = "size unknown, the hub cannot be asked" if need.bytes is None else f"{need.bytes / 1e9:.2f} GB to download"
    return f"{need.name}: {need.where}, {size}"


def _told(missing: list[str]) -> list[str]:
    return ["", "missing, before it can run:", *(f"  {one}" for one in missing)] if missing else []


def span(seconds: float, on_gpu: bool = False) -> str:
    if on_gpu:
        hours = seconds / 3600
        return f"{hours:,.1f} GPU hours" if hours >= 0.95 else f"{hours:.2g} GPU hours"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
