"""What a run would do and take, without doing it: the grid, the steps, and the time of each step measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.timing import step_curve

if TYPE_CHECKING:
    from experiments.run import Prepared


def describe(prepared: Prepared) -> str:
    """The grid as lines of text, with an estimate from one measured step of each member at the run's batch size."""
    config = prepared.config
    lines = [f"{config.name}: {config.description}".rstrip(": "), ""]
    total = 0.0
    for name, pipe in prepared.pipes.items():
        programs = prepared.programs[name]
        lines += [f"family {name}: {len(programs)} programs", *(f"  {program}" for program in programs)]
        costs = {
            member: step_curve(pipe, member, [config.batch], repeats=1)[config.batch] / config.batch
            for member in ("large", "small")
        }
        shared: dict[tuple[str, int, float], int] = {}
        alone: dict[str, int] = {"large": 0, "small": 0}
        for p in programs:
            first = p.legs[0]
            key = (first.member, first.steps_total, p.guidance[0])
            shared[key] = max(shared.get(key, 0), first.last)
            for leg in p.legs[1:]:
                alone[leg.member] += leg.steps
        for (member, _, _), steps in shared.items():
            alone[member] += steps
        samples = sum(map(len, prepared.prompts)) * len(config.seeds)
        seconds = sum(alone[m] * costs[m] for m in alone) * samples
        total += seconds
        lines.append(
            f"  {samples} prompts x seeds, {alone['large']} large and {alone['small']} small steps each"
            f" ({costs['large'] * 1000:.1f} and {costs['small'] * 1000:.1f} ms a sample-step at batch {config.batch}):"
            f" {_span(seconds)}"
        )
    for baseline in prepared.baselines:
        for name, pipe in prepared.pipes.items():
            why = baseline.applies(pipe.family)
            lines.append(f"baseline {baseline.name} on {name}: {why or 'applies'}")
    lines += ["", f"{len(prepared.units)} units of work; about {_span(total)} without scoring, baselines and times"]
    return "\n".join(lines)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
