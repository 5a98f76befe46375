"""`relay-train router`: read the runs, train, say what validation says, write the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from experiments.provenance import provenance
from experiments.routing.data import EDGE, FULL, RoutingData, Split, load
from experiments.routing.delta_p import send, worth
from experiments.run_folder import open_run
from experiments.training.router import Fitted, Recipe, fit
from relay.errors import BadRequest
from scheduler.router import store
from scheduler.router.prs import gap_scale, prs, superiority
from scheduler.router.trained import Trained


def train_routers(
    runs: Sequence[Path],
    families: Sequence[str] | None,
    metric_sets: Sequence[str],
    out: Path | None,
    seed: int,
    recipe: dict[str, Any],
    shape: dict[str, Any],
    command: str,
    say: Callable[[str], None],
) -> list[Path]:
    """One file of weights per family and metric set; the paths."""
    from relay.family import Family
    from scheduler.router.tokens import TokenReader

    asked = Recipe()
    asked = msgspec.structs.replace(asked, **recipe, shape=msgspec.structs.replace(asked.shape, **shape))
    written = []
    for name in families or _families(runs):
        family = Family.load(name)
        reader = TokenReader.of(family.spec)
        fingerprint = msgspec.to_builtins(family.fingerprint)
        for metric_set in metric_sets:
            data = load(runs, name, metric_set)
            say(f"{name}, {metric_set}: {len(data.train)} train and {len(data.validation)} validation prompts")
            fitted = fit(data, asked, seed, reader, fingerprint, say)
            found = figures(fitted.trained, data.validation, data)
            facts = _provenance(command, seed, fitted, runs, name, found)
            card = msgspec.structs.replace(fitted.trained.card, provenance=facts)
            path = (out or store.WEIGHTS) / name / f"{metric_set}.safetensors"
            store.save(Trained(card, fitted.trained.net, fitted.trained.scales, fitted.trained.calibration), path)
            said = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in found.items())
            say(
                f"{name}, {metric_set}: {fitted.seconds:.0f} s; on validation {said}; {path.stat().st_size / 1e6:.2f} MB"
            )
            written.append(path)
    return written


def figures(trained: Trained, split: Split, data: RoutingData) -> dict[str, float]:
    """Two-way, what the router is worth on a split: dP at half the prompts, and how often it names the better picture.

    `accuracy`: PRS predicted and measured on the same side of 1/2; `always` and `never`: the same of always full-cloud and
    of never.
    """
    from experiments.training.router import read
    from relay.family_spec import find_family
    from scheduler.router.tokens import TokenReader

    reader = TokenReader.of(find_family(trained.card.family))
    said = trained.predict(read(reader, split.prompts)).prs()
    edge, full = split.quality[:, EDGE], split.quality[:, FULL]
    weights = 1 / (~np.isnan(data.train.quality[:, FULL])).mean(axis=0)
    scale = gap_scale(data.train.quality[:, EDGE], data.train.quality[:, FULL])
    true = prs(superiority(edge, full, scale, trained.card.gamma), weights)
    value = worth(full, edge, full)
    return {
        "dP_at_half": float(value[send(said, 0.5)].sum()),
        "dP_random": float(value.sum() / 2),
        "dP_always": float(value.sum()),
        "accuracy": float(((said < 0.5) == (true < 0.5)).mean()),
        "always": float((true < 0.5).mean()),
        "never": float((true >= 0.5).mean()),
        "rank_correlation": rank_correlation(said, true),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties in order of appearance."""
    ranks = np.stack([np.argsort(np.argsort(x, kind="stable"), kind="stable") for x in (a, b)])
    return float(np.corrcoef(ranks.astype(float))[0, 1])


def _families(runs: Sequence[Path]) -> list[str]:
    """Families of the runs that have rows of every mode."""
    from scheduler.outcomes import read_table

    rows = read_table(list(runs), "outcomes").filter(method="program")
    found = [name for (name,), part in rows.group_by("family", maintain_order=True) if part["mode"].n_unique() >= 3]
    if not found:
        raise BadRequest(
            f"{', '.join(map(str, runs))} holds no rows of all modes: run"
            " `relay-experiment run configs/experiments/decisions.yaml` first"
        )
    return [str(name) for name in found]


def _provenance(
    command: str, seed: int, fitted: Fitted, runs: Sequence[Path], family: str, validation: dict[str, float]
) -> dict[str, Any]:
    facts = provenance() | {"command": command, "seed": seed, "seconds": round(fitted.seconds, 1)}
    facts["epochs"] = len(fitted.curve)
    facts["validation"] = {key: round(value, 4) for key, value in validation.items()}
    facts["runs"] = {run.name: open_run(run).config_hash for run in runs}
    weights = [
        found for run in runs for name, found in open_run(run).facts.get("weights", {}).items() if name == family
    ]
    facts["members"] = weights[0] if weights else "unknown"
    return json.loads(json.dumps(facts, default=str))
