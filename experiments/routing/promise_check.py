"""Does the promise hold? `python -m experiments.routing.promise_check` writes docs/results/promise.md.

Prompts that no router was trained on (validation and test) stand for all prompts. In each of many rounds a calibration
set is drawn from them, the promise is made on it, and the served mean loss is compared with epsilon: over all of them,
which are the population that it was drawn from (that is what the promise speaks of), and over those that were not drawn
(what a user would see; such a mean has noise of its own). Then mixes of one class of prompts stand for a shift.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from experiments.routing.data import MODES, RoutingData, load
from relay.errors import BadRequest
from scheduler.router import promise as promises
from scheduler.router import store
from scheduler.router.budget import Budget
from scheduler.router.settings import RELAY
from scheduler.router.trained import Calibration

Floats = NDArray[np.float64]
EPSILONS = {"scene": (0.02, 0.05, 0.1, 0.15), "clip": (0.002, 0.005, 0.01)}
DELTA = 0.1
SETTINGS: tuple[tuple[float | None, promises.Method], ...] = (
    (DELTA, "betting"), (DELTA, "hoeffding-bentkus"), (0.2, "betting"), (None, "conformal"),
)  # fmt: skip
WINDOW, LEVEL = 100, 0.05


def main(
    run: Annotated[list[Path] | None, typer.Option(help="Run folders with outcomes of all modes.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Default: mini-sd3.")] = None,
    rounds: Annotated[int, typer.Option(min=2)] = 300,
    calibration: Annotated[int, typer.Option(help="Prompts a calibration set.", min=10)] = 400,
    explore: Annotated[float, typer.Option(help="Share of decisions that explore.")] = 0.02,
    out: Path = Path("docs/results/promise.md"),
) -> None:
    """Share of violations over many calibrations, and whether a shifted mix is seen."""
    from experiments.provenance import write_result

    folders = run or [Path("runs/experiments/decisions")]
    found: dict[str, Any] = {}
    for name in family or ["mini-sd3"]:
        for metric_set in ("scene", "clip"):
            data = load(folders, name, metric_set)
            pool, classes = held_out(data)
            epsilon = EPSILONS[metric_set][1]
            found[f"{name}, {metric_set}"] = {
                "prompts": len(classes), "rounds": rounds, "calibration": calibration, "explore": explore,
                "violations": violations(pool, metric_set, rounds, calibration, explore),
                "shift": shift(pool, classes, epsilon, rounds, calibration),
                "budget": small_budget(pool, epsilon, DELTA),
                "programs": programs(folders, data),
            }  # fmt: skip
    write_result(out, "The promise on the router, checked", table(found), found)


def held_out(data: RoutingData) -> tuple[Calibration, NDArray[np.str_]]:
    """What the shipped router says of validation and test prompts and what came out of them; and their classes."""
    from experiments.training.router import read
    from relay.family_spec import find_family
    from scheduler.router.tokens import TokenReader

    trained = store.load(store.shipped(data.family, data.metric_set), data.family)
    reader = TokenReader.of(find_family(data.family))
    store.check_encoder(trained, reader.digest)
    parts = [part for part in (data.validation, data.test) if len(part)]
    if not parts:
        raise BadRequest(f"the run holds no validation or test prompts of {data.family} yet: let it go on")
    said = [trained.predict(read(reader, part.prompts)) for part in parts]
    return Calibration(
        np.concatenate([one.advantage() for one in said]),
        np.concatenate([one.quality for one in said]),
        np.concatenate([part.mean_quality() for part in parts]),
    ), np.array([each for part in parts for each in part.complexity])


def take(pool: Calibration, rows: NDArray[np.int64]) -> Calibration:
    return Calibration(pool.advantage[rows], pool.quality[rows], pool.outcome[rows])


def violations(pool: Calibration, metric_set: str, rounds: int, count: int, explore: float) -> list[dict[str, Any]]:
    """Per epsilon, delta and method: how often the mean loss exceeded epsilon, and what was saved."""
    loss, size = promises.losses(pool.outcome), len(pool.outcome)
    found = []
    for epsilon, (delta, method) in product(EPSILONS[metric_set], SETTINGS):
        rng = np.random.default_rng(0)
        of_all, of_others, shares, refused = [], [], [], 0
        for _ in range(rounds):
            drawn = rng.integers(0, size, count)
            try:
                made = promises.calibrate(take(pool, drawn), epsilon, delta, explore=explore, method=method)
            except BadRequest:
                refused += 1
                continue
            chosen = promises.serve(pool.advantage, made.threshold())
            served = promises.served_loss(loss, chosen, explore)
            others = np.setdiff1d(np.arange(size), drawn)
            of_all.append(served.mean())
            of_others.append(served[others].mean())
            shares.append(np.bincount(chosen, minlength=3) / size)
        broken = np.mean(np.array(of_all) > epsilon) * len(of_all) / rounds if of_all else 0.0
        found.append(
            {"epsilon": epsilon, "delta": delta, "method": method, "rounds": rounds, "refused": refused,
             "violations": float(broken),
             "violations_on_others": float(np.mean(np.array(of_others) > epsilon)) if of_others else 0.0,
             "binomial_error": float(2 * (delta * (1 - delta) / rounds) ** 0.5) if delta else None,
             "mean_loss": float(np.mean(of_all)) if of_all else None,
             "shares": np.mean(shares, axis=0).tolist() if shares else None}
        )  # fmt: skip
    return found


def shift(
    pool: Calibration, classes: NDArray[np.str_], epsilon: float, rounds: int, count: int
) -> list[dict[str, Any]]:
    """Windows of the same mix and of single classes: how often the watch calls them shifted, and the loss there."""
    loss, size = promises.losses(pool.outcome), len(pool.outcome)
    mixes: dict[str, NDArray[np.int64]] = {"the same mix": np.arange(size)}
    mixes |= {f"only {name}": np.flatnonzero(classes == name) for name in sorted(set(classes.tolist()))}
    found = []
    for mix, rows in mixes.items():
        rng = np.random.default_rng(1)
        alarms, held, made_on = 0, [], 0
        for _ in range(rounds):
            order = rng.permutation(size)
            calibration, rest = take(pool, order[:count]), order[count:]
            window = (
                rng.choice(np.intersect1d(rest, rows), WINDOW, replace=True) if mix != "the same mix" else rest[:WINDOW]
            )
            seen = take(pool, window)
            alarms += promises.watch(calibration, seen.advantage, seen.quality, LEVEL).shifted
            try:
                threshold = promises.calibrate(calibration, epsilon, DELTA).threshold()
            except BadRequest:
                continue
            made_on += 1
            chosen = promises.serve(pool.advantage[rows], threshold)
            held.append(promises.served_loss(loss[rows], chosen).mean())
        found.append(
            {"mix": mix, "prompts": len(rows), "called_shifted": alarms / rounds, "epsilon": epsilon,
             "mean_loss": float(np.mean(held)) if held else None,
             "broken": float(np.mean(np.array(held) > epsilon)) if held else None}
        )  # fmt: skip
    return found


def small_budget(pool: Calibration, epsilon: float, delta: float) -> str:
    """What a budget of a tenth of full-cloud and no relay gets beside this promise, in the code's own words."""
    try:
        promises.calibrate(pool, epsilon, delta).threshold(Budget(full=0.1, relay=0.0))
    except BadRequest as error:
        return str(error)
    return "the budget (full-cloud <= 10%, relay <= 0%) and the promise are both met"


def programs(folders: list[Path], data: RoutingData) -> list[dict[str, Any]]:
    """Mean loss to full-cloud of every relay that the run has, and whether the promise would cover it in the mode's place."""
    from scheduler.outcomes import read_table
    from scheduler.router.settings import Reference

    rows = read_table(folders, "outcomes").filter(family=data.family, method="program", mode="relay")
    pairs = sorted({(row["handoff"], row["small_steps"]) for row in rows.select("handoff", "small_steps").to_dicts()})
    loss: dict[str, float] = {}
    for s, n in pairs:
        one = load(folders, data.family, data.metric_set, Reference(handoff=s, small_steps=n))
        held = np.concatenate([part.mean_quality() for part in (one.validation, one.test)])
        loss[one.programs["relay"]] = float(promises.losses(held)[:, RELAY].mean())
    made = promises.Promise(
        epsilon=0.5, delta=None, method="conformal", explore=0.0, prompts=0, held=(), programs=data.programs
    )  # fmt: skip
    return [
        {"program": program, "loss": value, "covered": made.covers("relay", program, loss) is None}
        for program, value in loss.items()
    ]


def table(found: dict[str, Any]) -> str:
    lines = [
        "Loss: max(0, q_full-cloud - q_served), q the mean over the metrics that apply to a prompt. A round draws a",
        "calibration set from the held-out prompts (with replacement), makes the promise on it and serves with the cheapest",
        "threshold that holds. *violated*: share of rounds whose mean loss over all held-out prompts, the population of the",
        "draw, exceeds epsilon; allowed are delta and two binomial errors. *on the others*: over the prompts that were not",
        "drawn, whose mean has noise of its own. *conformal* risk control bounds the mean loss over rounds, not the share of",
        "violations. *refused*: rounds in which even full-cloud for everything could not be shown to hold.",
        "",
    ]
    for name, result in found.items():
        lines += [
            f"## {name}",
            "",
            f"{result['prompts']} held-out prompts, {result['rounds']} rounds of {result['calibration']} calibration prompts,"
            f" {result['explore']:.0%} of the decisions explore (counted in).",
            "",
            "| epsilon | delta | method | violated | allowed | on the others | refused | mean loss | "
            + " | ".join(MODES)
            + " |",
            "| ---: | ---: | --- |" + " ---: |" * 8,
        ]
        for row in result["violations"]:
            allowed = "-" if row["delta"] is None else f"{row['delta'] + row['binomial_error']:.1%}"
            shares = ["-"] * 3 if row["shares"] is None else [f"{share:.0%}" for share in row["shares"]]
            loss = "-" if row["mean_loss"] is None else f"{row['mean_loss']:.4f}"
            lines.append(
                f"| {row['epsilon']:g} | {row['delta'] or '-'} | {row['method']} | {row['violations']:.1%} | {allowed} |"
                f" {row['violations_on_others']:.1%} | {row['refused'] / row['rounds']:.0%} | {loss} | "
                + " | ".join(shares)
                + " |"
            )
        lines += [
            "",
            f"Shift: windows of {WINDOW} prompts, tested at level {LEVEL:.0%} against the calibration's; the promise at"
            f" epsilon {result['shift'][0]['epsilon']:g}, delta {DELTA}.",
            "",
            "| prompts | called shifted | mean loss there | rounds in which epsilon is exceeded |",
            "| --- | ---: | ---: | ---: |",
        ]
        for row in result["shift"]:
            loss, broken = ("-" if row[k] is None else f for k, f in (("mean_loss", ""), ("broken", "")))
            loss = loss or f"{row['mean_loss']:.4f}"
            broken = broken or f"{row['broken']:.0%}"
            lines.append(f"| {row['mix']} | {row['called_shifted']:.1%} | {loss} | {broken} |")
        lines += [
            "",
            f"With a budget of a tenth for full-cloud and none for relay: {result['budget']}.",
            "",
            "Programs that a bandit may serve for relay: covered where the mean loss is not above the reference's.",
            "",
            "| program | mean loss to full-cloud | covered |",
            "| --- | ---: | --- |",
        ]
        for row in result["programs"]:
            lines.append(f"| {row['program']} | {row['loss']:.4f} | {'yes' if row['covered'] else 'no'} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
