"""Is the advisor's clock right? Programs are timed, the cost model is fitted on all but one, and predicts that one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FAMILIES = ("mini-sd3", "mini-sdxl")
SHARES = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0)


def main(
    out: Annotated[Path, typer.Option(help="The Markdown file to write; a .json lies beside it.")] = Path(
        "docs/results/advise.md"
    ),
    family: Annotated[list[str] | None, typer.Option(help="Default: both.")] = None,
    repeats: Annotated[int, typer.Option(help="Rounds; the median over them counts.")] = 9,
    threads: int = 2,
) -> None:
    """Time programs of each family and write how far the fitted cost model is off on programs left out of its fit."""
    import torch

    from experiments.provenance import write_result
    from nodes.session import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    results = {name: measure(name, repeats) for name in family or FAMILIES}
    lines = [
        "Compute time at batch 1, median over the rounds, against the advisor's cost model fitted on all the *other*",
        "programs (leave one out).",
        "",
        "| family | program | measured | predicted | error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in results.items():
        for text, (seconds, error) in result.items():
            lines.append(
                f"| {name} | {text.split('/match')[0].split('/', 1)[1]} | {seconds * 1000:.0f} ms |"
                f" {seconds * (1 + error) * 1000:.0f} ms | {error:+.1%} |"
            )
        worst = max(abs(error) for _, error in result.values())
        lines.append(f"| {name} | largest error | | | {worst:.1%} |")
    write_result(out, "The advisor's predicted compute time", "\n".join(lines) + "\n", results)


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Program text -> (median seconds, relative error of the prediction)."""
    import polars as pl

    from experiments.advise import held_out_errors, program_medians
    from experiments.timing import LATENCY, stage_times
    from relay.pipeline import RelayPipeline

    pipe = RelayPipeline.from_pretrained(name)
    steps = pipe.family.spec.members["large"].steps
    programs = [pipe.plan(handoff=round(share * steps)) for share in SHARES]
    rows = [
        {
            "program": str(program),
            "method": "program",
            "measure": LATENCY,
            "link": "none",
            **s,
            "end_to_end_s": sum(s.values()),
        }
        for program, rounds in stage_times(pipe, "a large red heart at the top left", programs, repeats).items()
        for s in rounds
    ]
    times = pl.DataFrame(rows)
    medians, errors = program_medians(times), held_out_errors(times)
    return {text: (medians[text], errors[text]) for text in medians}


if __name__ == "__main__":
    typer.run(main)
