"""What the papers leave open in the token-level router, one choice changed at a time:
`python -m experiments.training.router_choices` writes docs/results/router-choices.md.

Two folds over train and validation prompts; the test split is not read. Every cell is kept (--work), so it goes on where
it stopped. The folds' gaps are those of all these prompts, floored by their errors, so that a metric without a gap does
not drown the others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from experiments.routing.data import EDGE, FULL, RoutingData, Split, load
from experiments.routing.delta_p import send
from experiments.training.router import Recipe, fit, metric_weights, read
from experiments.training.router_run import rank_correlation
from relay.files import write_atomically
from scheduler.router.prs import gap_scale, prs, superiority

FOLDS = 2
CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as shipped": ({}, {}),
    "Gamma 1": ({"gamma": 1.0}, {}),
    "Gamma 10": ({"gamma": 10.0}, {}),
    "w_i all alike": ({"weigh": "equal"}, {}),
    "K = 3": ({}, {"top_k": 3}),
    "K = 12": ({}, {"top_k": 12}),
    "l = 4, h = d = 32": ({}, {"rank": 4, "hidden": 32, "width": 32}),
    "one layer": ({}, {"layers": 1}),
    "dropout 0.3": ({}, {"dropout": 0.3}),
    "loss without PRS": ({"prs_weight": 0.0}, {}),
    "loss without quality": ({"quality_weight": 0.0}, {}),
    "rate 0.003": ({"rate": 3e-3}, {}),
    "two-way": ({"ways": "two-way"}, {}),
}


def main(
    run: Annotated[list[Path] | None, typer.Option(help="Run folders with outcomes of all modes.")] = None,
    family: Annotated[str, typer.Option()] = "mini-sd3",
    work: Annotated[Path, typer.Option(help="One file a cell.")] = Path("runs/experiments/router-choices"),
    threads: int = 1,
    out: Path = Path("docs/results/router-choices.md"),
) -> None:
    """dP at half the prompts, how often the better picture is named, and rank correlation, per choice and metric set."""
    import torch

    from experiments.provenance import write_result

    torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    folders = run or [Path("runs/experiments/decisions")]
    found: dict[str, Any] = {}
    for metric_set in ("scene", "clip"):
        data = load(folders, family, metric_set)
        found[metric_set] = {name: cell(data, recipe_of(name), work) for name in CHOICES}
    write_result(
        out, "Choices in the token-level router, on train and validation prompts", table(found), {family: found}
    )


def recipe_of(name: str) -> Recipe:
    changed, shape = CHOICES[name]
    base = Recipe()
    return msgspec.structs.replace(base, **changed, shape=msgspec.structs.replace(base.shape, **shape))


def cell(data: RoutingData, recipe: Recipe, work: Path) -> dict[str, float]:
    """Figures of one recipe, from the file where it was measured before on the same rows."""
    key = blake2b(msgspec.json.encode([data.digest, data.metric_set, recipe]), digest_size=8).hexdigest()
    path = work / f"{key}.json"
    if not path.exists():
        figures = measure(data, recipe)
        print(data.metric_set, figures, flush=True)
        write_atomically(path, json.dumps(figures) + "\n")
    return json.loads(path.read_text())


def measure(data: RoutingData, recipe: Recipe) -> dict[str, float]:
    """Means over folds. Each fold's network chooses its epoch on a tenth of the prompts that it may see."""
    from relay.family_spec import find_family
    from scheduler.router.tokens import TokenReader

    reader = TokenReader.of(find_family(data.family))
    both = _joined(data.train, data.validation)
    edge, full = both.quality[:, EDGE], both.quality[:, FULL]
    scale, weights = gap_scale(edge, full), metric_weights(data, Recipe())
    worth = 100 * np.nan_to_num((full - edge) / scale / (~np.isnan(edge)).sum(0)).mean(1)
    true = prs(superiority(edge, full, scale, Recipe().gamma), weights)
    order = np.random.default_rng(0).permutation(len(both))
    rows: list[tuple[float, ...]] = []
    for fold in range(FOLDS):
        held = np.sort(order[fold::FOLDS])
        rest = np.setdiff1d(order, held)
        np.random.default_rng(fold).shuffle(rest)
        few = len(rest) // 10
        part = replace(data, train=both.take(np.sort(rest[few:])), validation=both.take(np.sort(rest[:few])))
        fitted = fit(part, recipe, fold, reader)
        said = fitted.trained.predict(read(reader, both.take(held).prompts)).prs()
        value = worth[held] * len(both) / len(held)
        sent = send(said, 0.5)
        rows.append((
            float(value[sent].sum()), float(value[sent & (said < 0.5)].sum()), float(value.sum()),
            float(((said < 0.5) == (true[held] < 0.5)).mean()), rank_correlation(said, true[held]), fitted.seconds,
        ))  # fmt: skip
    names = ("dp", "dp_capped", "dp_all", "accuracy", "rank_correlation", "seconds")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True)) | {
        "spread": float(np.ptp([r[0] for r in rows]))
    }


def _joined(a: Split, b: Split) -> Split:
    quality = np.concatenate([a.quality, b.quality])
    return Split(a.prompts + b.prompts, a.scenes + b.scenes, a.complexity + b.complexity, quality)


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        f"{FOLDS} folds over train and validation prompts. dP two-way at half the prompts; *capped*: of those only the ones",
        "with PRS < 1/2, as the paper's alpha has it; *folds apart*: by how much the folds' dP differ, which says what a",
        "difference between rows is worth. Accuracy and rank correlation are against measured PRS at Gamma as shipped.",
        "",
    ]
    for metric_set, rows in found.items():
        lines += [
            f"## {metric_set}",
            "",
            "| choice | dP | capped | folds apart | all to the cloud | accuracy | rank correlation |",
            "| --- |" + " ---: |" * 6,
        ]
        for name, row in rows.items():
            lines.append(
                f"| {name} | {row['dp']:.1f} | {row['dp_capped']:.1f} | {row['spread']:.1f} | {round(row['dp_all']) + 0.0:.0f} |"
                f" {row['accuracy']:.1%} | {row['rank_correlation']:.3f} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
