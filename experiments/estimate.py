"""What a run would do and take, without doing it: the grid, the steps, and the time of each step measured here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.scoring import prefix_steps
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
            member: step_curve(pipe.family, member, [config.batch], repeats=1)[config.batch] / config.batch
            for member in ("large", "small")
        }
        taken = {"large": 0, "small": 0}
        for (member, _, _), steps in prefix_steps(programs).items():
            taken[member] += steps
        for leg in (leg for program in programs for leg in program.legs[1:]):
            taken[leg.member] += leg.steps
        samples = sum(map(len, prepared.prompts)) * len(config.seeds)
        seconds = sum(taken[m] * costs[m] for m in taken) * samples
        total += seconds
        lines.append(
            f"  {samples} prompts x seeds, {taken['large']} large and {taken['small']} small steps each"
            f" ({costs['large'] * 1000:.1f} and {costs['small'] * 1000:.1f} ms a sample-step at batch {config.batch}):"
            f" {_span(seconds)}"
        )
    for name, reasons in prepared.facts["baselines"].items():
        lines += [f"baseline {baseline} on {name}: {why or 'applies'}" for baseline, why in reasons.items()]
    lines += ["", f"{len(prepared.units)} units of work; about {_span(total)} without scoring, baselines and times"]
    return "\n".join(lines)


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
