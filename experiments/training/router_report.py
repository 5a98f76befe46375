"""What the shipped routers are worth: `python -m experiments.training.router_report` writes docs/results/router.md.

Chosen on validation prompts, reported on test prompts. The comparison with other routers is experiments.routing's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from experiments.routing.data import EDGE, FULL, MODES, RELAY, RoutingData, Split, load
from scheduler.router import store
from scheduler.router.budget import Budget, calibrate, choose, shares
from scheduler.router.trained import Trained

BUDGETS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, 0.5), (0.1, 0.4), (0.25, 0.5), (0.0, 1.0), (1.0, 1.0))


def main(
    run: Annotated[list[Path] | None, typer.Option(help="Run folders with outcomes of all modes.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Default: every family whose weights ship.")] = None,
    threads: int = 2,
    out: Path = Path("docs/results/router.md"),
) -> None:
    """Two-way and three-way figures of the shipped weights, and what a decision costs."""
    import torch

    from experiments.provenance import write_result
    from experiments.routing.router_latency import decision_times

    torch.set_num_threads(threads)
    folders = run or [Path("runs/experiments/decisions")]
    found: dict[str, Any] = {}
    for name in family or sorted(path.name for path in store.WEIGHTS.iterdir()):
        sets = {metric_set: _of_set(folders, name, metric_set) for metric_set in ("clip", "scene")}
        found[name] = {"sets": sets, "latency": decision_times(name, "clip")}
    write_result(out, "The token-level router as shipped", table(found), found)


def _of_set(folders: list[Path], family: str, metric_set: str) -> dict[str, Any]:
    from experiments.training.router_run import figures

    path = store.shipped(family, metric_set)
    trained = store.load(path, family)
    data = load(folders, family, metric_set)
    facts = trained.card.provenance
    return {
        "trained": {
            "prompts": trained.card.prompts, "seconds": facts.get("seconds"), "epochs": facts.get("epochs"),
            "gamma": trained.card.gamma, "megabytes": path.stat().st_size / 1e6,
            "parameters": sum(p.numel() for p in trained.net.parameters()), "same_data": trained.card.data == data.digest,
            "commit": facts.get("commit"), "version": trained.card.version,
        },
        "two_way": {name: figures(trained, getattr(data, name), data) for name in ("validation", "test")},
        "budgets": budget_rows(trained, data),
    }  # fmt: skip


def budget_rows(trained: Trained, data: RoutingData) -> list[dict[str, Any]]:
    """Per budget: prices from validation, then on test the shares and the mean quality, beside random modes of those shares
    and each mode alone."""
    from experiments.training.router import read
    from relay.family_spec import find_family
    from scheduler.router.tokens import TokenReader

    said = trained.predict(read(TokenReader.of(find_family(data.family)), data.test.prompts)).advantage()
    quality = data.test.mean_quality()
    rows = []
    for full, relay in BUDGETS:
        prices = calibrate(trained.calibration.advantage, Budget(full=full, relay=relay))
        modes = choose(said, prices)
        spent = shares(modes)
        rows.append(
            {"full": full, "relay": relay, "shares": spent.tolist(),
             "quality": float(quality[np.arange(len(modes)), modes].mean()),
             "random": float(quality.mean(axis=0) @ spent), "best": _best(data.test, spent)}
        )  # fmt: skip
    return rows


def _best(split: Split, spent: np.ndarray) -> float:
    """The largest mean quality that these shares allow, knowing what each picture turned out like (hindsight)."""
    quality = split.mean_quality()
    over = np.stack([quality[:, m] - quality[:, EDGE] for m in (FULL, RELAY, EDGE)], axis=1)
    modes = choose(over / 2, calibrate(over / 2, Budget(full=float(spent[FULL]), relay=float(spent[RELAY]))))
    return float(quality[np.arange(len(modes)), modes].mean())


def table(found: dict[str, Any]) -> str:
    lines = [
        "Trained on the train prompts, chosen and calibrated on validation, reported on test. Two-way: full-cloud against",
        "edge-only, half the prompts may go to the cloud. *accuracy*: how often predicted and measured PRS lie on one side of",
        "1/2; *always*, *never*: the same of always and never going to the cloud. One picture a prompt and mode, so measured",
        "PRS holds noise that no router can foresee. The comparison with other routers and its intervals are in routing.md.",
        "",
    ]
    for family, result in found.items():
        lines += [
            f"## {family}",
            "",
            "| metrics | prompts | dP random | dP router | dP all to the cloud | accuracy | always | never | rank correlation |",
            "| --- | --- |" + " ---: |" * 7,
        ]
        for name, one in result["sets"].items():
            for split, two in one["two_way"].items():
                lines.append(
                    f"| {name} | {split} | {two['dP_random']:.1f} | {two['dP_at_half']:.1f} | {two['dP_always']:.1f} |"
                    f" {two['accuracy']:.1%} | {two['always']:.1%} | {two['never']:.1%} | {two['rank_correlation']:.2f} |"
                )
        lines.append("")
        for name, one in result["sets"].items():
            lines += [
                f"Budgets, {name}: shares on test of prices from validation, mean quality over the metrics that apply; beside it",
                "random modes of the same shares, and the best choice with hindsight.",
                "",
                "| full-cloud <= | relay <= | " + " | ".join(MODES) + " | quality | random | hindsight |",
                "| ---: |" + " ---: |" * 7,
            ]
            for row in one["budgets"]:
                spent = " | ".join(f"{share:.0%}" for share in row["shares"])
                lines.append(
                    f"| {row['full']:.0%} | {row['relay']:.0%} | {spent} | {row['quality']:.4f} | {row['random']:.4f} |"
                    f" {row['best']:.4f} |"
                )
            lines.append("")
        for name, one in result["sets"].items():
            made = one["trained"]
            lines.append(
                f"- {name}: version {made['version']}, {made['parameters']:,} parameters, {made['megabytes']:.2f} MB, Gamma"
                f" {made['gamma']:g}, {made['prompts']['train']} train prompts, {made['epochs']} epochs in"
                f" {made['seconds']} s at commit {made['commit']}"
                + ("." if made["same_data"] else "; trained on other rows than those reported here.")
            )
        spent = result["latency"]
        lines += [
            f"- A decision, one prompt, text encoding included: median {spent['decision_median_ms']:.2f} ms, 95th per cent"
            f" {spent['decision_p95_ms']:.2f} ms (text encoding alone {spent['text_encoding_median_ms']:.2f} ms), over"
            f" {spent['prompts']} prompts.",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
