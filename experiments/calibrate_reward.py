"""The reward's scales, from what a random policy's answers are made of, and whether its weights leave anything to choose.

    python -m experiments.calibrate_reward --store runs/experiments/decisions --times runs/experiments/rise

The random policy draws any stored program for any prompt of the split that all programs drew, each as likely. Its times
are the measured ones without queues: under load the time term grows beyond its scale, which the simulated environment can
measure in a world of its own (`experiments.simulate.scales`). Written: scales to put into configs/reward.yaml; with the
weights that stand there, the share of rewards where the tanh is flat, and which program is best at which preference.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from relay.errors import BadRequest
from scheduler.reward import COSTS, SCORES, Reward, calibrate, load_reward, saturated

PREFERENCES = (0.0, 0.25, 0.5, 0.75, 1.0)

app = typer.Typer(add_completion=False)


@app.command()
def calibrate_reward(
    store: Annotated[Path, typer.Option(help="A run folder with quality rows.")] = Path("runs/experiments/decisions"),
    times: Annotated[Path, typer.Option(help="A run folder with times of the same programs.")] = Path(
        "runs/experiments/rise"
    ),
    split: Annotated[str, typer.Option(help="Never test.")] = "validation",
    link: Annotated[str, typer.Option(help="Name of the link whose times count.")] = "wifi-scaled",
    config: Annotated[Path | None, typer.Option(help="Default: configs/reward.yaml.")] = None,
    out: Annotated[Path, typer.Option(help="A .json lies beside it.")] = Path("docs/results/reward.md"),
) -> None:
    """Measure the reward's scales on validation prompts, and what its weights make of them."""
    from experiments.provenance import write_result

    reward = load_reward(config)
    rows = answers(store, times, split, link, reward)
    text, data = report(rows, reward, split, link)
    write_result(out, "Scales and weights of the reward", text, data)


def answers(store: Path, times: Path, split: str, link: str, reward: Reward) -> list[dict[str, Any]]:
    """One a prompt and program: what is known of it, as the reward reads it."""
    import polars as pl

    from relay.program import Program
    from scheduler.outcomes import read_table

    if split == "test":
        raise BadRequest("scales are chosen on validation prompts: test is for reports")
    quality = read_table(store, "outcomes").filter((pl.col("split") == split) & (pl.col("method") == "program"))
    measured = read_table(times, "times").filter(pl.col("link").str.starts_with(link + ":") | (pl.col("link") == link))
    if quality.is_empty() or measured.is_empty():
        raise BadRequest(
            f"{store} has {quality.height} rows of split {split}, {times} {measured.height} of link {link}"
        )
    seconds = dict(measured.group_by("program").agg(pl.col("end_to_end_s").median()).iter_rows())
    lacking = set(quality["program"].unique()) - set(seconds)
    if lacking:
        raise BadRequest(f"{times} has no times of {len(lacking)} programs, such as {min(lacking)}")
    programs = {text: Program.parse(text) for text in quality["program"].unique()}
    drawn = quality.group_by("prompt").agg(pl.col("program").n_unique().alias("programs"))
    whole = drawn.filter(pl.col("programs") == len(programs))["prompt"]
    quality = quality.filter(pl.col("prompt").is_in(whole.implode()))  # else a program would count by its other prompts
    found = []
    for row in quality.iter_rows(named=True):
        scores = {ours: row[f"score_{theirs}"] for theirs, ours in SCORES.items() if f"score_{theirs}" in row}
        scores = {name: value for name, value in scores.items() if value is not None and not math.isnan(value)}
        program = programs[row["program"]]
        found.append(
            {
                "scores": scores, "seconds": seconds[row["program"]], "program": program, "prompt": row["prompt"],
                "family": row["family"], "memory_mb": reward.memory_of(program), "device_steps": program.steps["small"],
            }
        )  # fmt: skip
    return found


def report(rows: list[dict[str, Any]], reward: Reward, split: str, link: str) -> tuple[str, dict[str, Any]]:
    import msgspec
    import numpy as np

    names = [name for name in reward.scales if name not in COSTS]
    terms = [
        {name: row["scores"].get(name) for name in names} | {name: float(row[name]) for name in COSTS} for row in rows
    ]
    scales = calibrate(terms)
    fitted = msgspec.structs.replace(reward, scales=reward.scales | scales)
    families = sorted({row["family"] for row in rows})
    prompts = len({row["prompt"] for row in rows})
    lines = [
        f"{len(rows)} answers: {prompts} {split} prompts, {len({str(row['program']) for row in rows})} programs of "
        f"{', '.join(families)}; times over {link}, without queues. The reward with the scales below and the weights of "
        "configs/reward.yaml.",
        "", "| term | scale | in configs/reward.yaml |", "| --- | --- | --- |",
        *(f"| {name} | {scales[name]:g} | {reward.scales[name]:g} |" for name in scales),
        "", "| preference | mean reward | flat tanh | best program on average | its reward | spread over programs |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    data: dict[str, Any] = {"scales": scales, "preferences": {}}
    for preference in PREFERENCES:
        told = [fitted.of(row | {"preference": preference}) for row in rows]
        values = np.array([each.value for each in told if each.value is not None])
        flat = saturated([sum(each.terms.values()) for each in told])
        means = _means(rows, told)
        best = max(means, key=means.__getitem__)
        spread = float(np.std(list(means.values())))
        lines.append(
            f"| {preference:g} | {values.mean():.3f} | {flat:.1%} | {_short(best)} | {means[best]:.3f} | {spread:.3f} |"
        )
        data["preferences"][str(preference)] = {
            "mean": float(values.mean()), "flat": flat, "best": str(best), "programs": {str(k): v for k, v in means.items()},
        }  # fmt: skip
    lines += ["", "Flat: the sum inside the tanh is beyond 1.5, where its slope is below 0.18."]
    return "\n".join(lines) + "\n", {"reward": data}


def _means(rows: list[dict[str, Any]], told: list[Any]) -> dict[Any, float]:
    """Program -> mean reward."""
    values: dict[Any, list[float]] = {}
    for row, each in zip(rows, told, strict=True):
        if each.value is not None:
            values.setdefault(row["program"], []).append(each.value)
    return {program: sum(each) / len(each) for program, each in values.items()}


def _short(program: Any) -> str:
    steps = program.steps
    return f"{program.family} {program.mode}, {steps['large']} + {steps['small']} steps"


if __name__ == "__main__":
    from nodes.cli import run

    run(app)
