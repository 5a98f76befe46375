"""Measured levels of a family out of the outcome store, with how to predict them (`scheduler.load.prediction`).

Fitted on train rows, ridge penalty chosen and calibrated on validation rows; what it is worth is told on test rows.

Levels that begin from a cached latent come from a run of cached starts (`python -m experiments.cached_starts`): what such a
start keeps of its program's quality, on pairs at least as alike as the family's rule asks for. Pairs are too few to say
which prompts lose more by it, so each prompt keeps the same share of what is predicted for it from noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.cached_starts.calibrate import LEAST_PAIRS, pairs_of
from experiments.simulate.scores import read_scores
from relay.errors import BadRequest
from relay.program import Program, drawn_alike
from scheduler.load.levels import least_similarity
from scheduler.load.prediction import FORMAT, Levels, Linear, MeasuredLevel, prompt_inputs, router_inputs
from scheduler.load.similarity import Rule
from scheduler.outcomes import SCORE

if TYPE_CHECKING:
    from scheduler.router.router import Router

Floats = NDArray[np.float64]
PENALTIES = (1.0, 10.0, 100.0, 1000.0)
SAMPLE = 200  # of validation prompts, kept for planning


def fit(
    folders: Sequence[Path], family: str, metric: str = "attributes", router: Router | None = None,
    metric_set: str | None = None,
) -> tuple[Levels, dict[str, Any]]:  # fmt: skip
    """The levels, and of each set of inputs how far its predictions are off on test prompts."""
    scores = read_scores(folders, [metric], None, [family])
    texts = {split: [p.text for p in scores.prompts.get(split, ())] for split in ("train", "validation", "test")}
    if short := [split for split, found in texts.items() if len(found) < 20]:
        raise BadRequest(
            f"levels of {family} need prompts of every split that all programs drew; few of {', '.join(short)}"
        )
    programs = list(map(str, scores.programs))
    drawn = {
        split: np.array(
            [[np.mean([cell[metric] for cell in scores.of(p, text)]) for p in programs] for text in found]
        )
        for split, found in texts.items()
    }  # fmt: skip
    words = {split: prompt_inputs(found) for split, found in texts.items()}
    prompt_only, report = _fitted(words, drawn)
    told = {"prompt": report, "programs": programs}
    with_router = None
    if router is not None:
        both = {
            split: np.concatenate([words[split], router_inputs(router.predict(found))], axis=1)
            for split, found in texts.items()
        }
        with_router, told["prompt and router"] = _fitted(both, drawn)
    predict = (with_router, both) if with_router is not None else (prompt_only, words)
    quality = drawn["validation"].mean(0)
    order = np.argsort(-quality, kind="stable")
    sample = predict[0](predict[1]["validation"])[:SAMPLE][:, order]
    from experiments.provenance import provenance

    facts = json.loads(json.dumps(provenance()))  # plain text: torch's version is a class of its own
    facts["prompts"] = {split: len(found) for split, found in texts.items()}
    levels = Levels(
        format=FORMAT, family=family, metric=metric,
        levels=[MeasuredLevel(programs[i], round(float(quality[i]), 6)) for i in order],
        prompt_only=_ordered(prompt_only, order), with_router=with_router and _ordered(with_router, order),
        router=metric_set if router is not None else None,
        router_version=router.versions[family] if router is not None else None,
        sample=np.round(sample, 4).tolist(), provenance=facts,
    )  # fmt: skip
    return levels, told


def with_starts(levels: Levels, folders: Sequence[Path], rule: Rule) -> Levels:
    """The levels, and behind them those that begin from a cached latent at a step that the rule allows. BadRequest where
    the runs hold no such level of these programs."""
    import polars as pl

    pairs = pairs_of(folders, levels.family, "validation", SCORE + levels.metric)
    kept: dict[tuple[int, int], tuple[float, int]] = {}  # (level, K) -> share of its quality, pairs
    place = {drawn_alike(level.program): i for i, level in enumerate(levels.levels)}
    for (text, skipped), of in pairs.group_by(["program", "start_skipped"]):
        level, program = place.get(drawn_alike(str(text))), Program.parse(str(text))
        needs = least_similarity(rule, int(skipped), program.legs[0].steps_total)
        if level is None or needs is None or int(skipped) >= program.legs[0].steps:
            continue
        alike = of.filter(pl.col("start_similarity") >= needs)
        base = float(alike["base"].sum() or 0.0)
        if len(alike) >= LEAST_PAIRS and base > 0:
            share = min(1.0, float(alike[SCORE + levels.metric].sum()) / base)
            kept[level, int(skipped)] = share, len(alike)
    if not kept:
        raise BadRequest(
            f"no cached start of {levels.family}'s levels has {LEAST_PAIRS} validation pairs as alike as its rule asks for"
        )
    order, shares = sorted(kept), np.array([kept[key][0] for key in sorted(kept)])
    of_level = [level for level, _ in order]
    facts = levels.provenance | {
        "starts": [
            {"program": levels.levels[i].program, "skipped": skip, "kept": round(kept[i, skip][0], 5), "pairs": kept[i, skip][1]}
            for i, skip in order
        ]
    }  # fmt: skip
    return msgspec.structs.replace(
        levels,
        levels=levels.levels + [
            MeasuredLevel(levels.levels[i].program, round(levels.levels[i].quality * float(share), 6), skip)
            for (i, skip), share in zip(order, shares, strict=True)
        ],
        prompt_only=_more(levels.prompt_only, of_level, shares),
        with_router=levels.with_router and _more(levels.with_router, of_level, shares),
        sample=[[*row, *(round(row[i] * float(s), 4) for i, s in zip(of_level, shares, strict=True))] for row in levels.sample],
        provenance=facts,
    )  # fmt: skip


def _more(linear: Linear, of: Sequence[int], shares: Floats) -> Linear:
    """With further levels that keep these shares of levels `of`."""
    coefficients = np.array(linear.coefficients)[list(of)] * shares[:, None]
    intercept = np.array(linear.intercept)[list(of)] * shares
    return msgspec.structs.replace(
        linear, coefficients=linear.coefficients + np.round(coefficients, 6).tolist(),
        intercept=linear.intercept + np.round(intercept, 6).tolist(),
    )  # fmt: skip


def _fitted(inputs: dict[str, Floats], drawn: dict[str, Floats]) -> tuple[Linear, dict[str, Any]]:
    x = inputs["train"]
    mean, scale = x.mean(0), np.where(x.std(0) > 1e-9, x.std(0), 1.0)
    best: tuple[float, float, Linear] | None = None
    for penalty in PENALTIES:
        slopes, intercept = _ridge((x - mean) / scale, drawn["train"], penalty)
        made = Linear(mean.tolist(), scale.tolist(), slopes.T.tolist(), intercept.tolist())
        error = float(((made(inputs["validation"]) - drawn["validation"]) ** 2).mean())
        if best is None or error < best[0]:
            best = error, penalty, made
    assert best is not None
    calibrated = _calibrated(best[2], inputs["validation"], drawn["validation"])
    said, true = calibrated(inputs["test"]), drawn["test"]
    top = int(drawn["validation"].mean(0).argmax())
    loss, expected = true[:, [top]] - true, said[:, [top]] - said
    report = {
        "penalty": best[1], "rmse": float(np.sqrt(((said - true) ** 2).mean())),
        "rmse_of_means": float(np.sqrt(((drawn["train"].mean(0) - true) ** 2).mean())),
        "bias": (said - true).mean(0).round(4).tolist(),
        "correlation_of_loss": [
            float(np.corrcoef(loss[:, i], expected[:, i])[0, 1]) if i != top and loss[:, i].std() > 0 else None
            for i in range(true.shape[1])
        ],
        "bins": _bins(said, true),
    }  # fmt: skip
    return calibrated, report


def _ridge(x: Floats, y: Floats, penalty: float) -> tuple[Floats, Floats]:
    centre = x.mean(0)
    slopes = np.linalg.solve(
        (x - centre).T @ (x - centre) + penalty * np.eye(x.shape[1]), (x - centre).T @ (y - y.mean(0))
    )
    return slopes, y.mean(0) - centre @ slopes


def _calibrated(linear: Linear, x: Floats, true: Floats) -> Linear:
    """Each level's prediction made straight on held-out prompts: true = a + b predicted, by least squares."""
    said = linear(x)
    coefficients, intercept = np.array(linear.coefficients), np.array(linear.intercept)
    for i in range(true.shape[1]):
        b = np.cov(said[:, i], true[:, i])[0, 1] / max(float(said[:, i].var(ddof=1)), 1e-12)
        b = min(max(b, 0.0), 2.0)
        a = true[:, i].mean() - b * said[:, i].mean()
        coefficients[i], intercept[i] = b * coefficients[i], a + b * intercept[i]
    return Linear(linear.mean, linear.scale, coefficients.tolist(), intercept.tolist())


def _bins(said: Floats, true: Floats, count: int = 5) -> list[list[float]]:
    """[mean predicted, mean measured, number] of fifths by prediction, all levels together."""
    flat, real = said.ravel(), true.ravel()
    parts = np.array_split(np.argsort(flat), count)
    return [[round(float(flat[p].mean()), 4), round(float(real[p].mean()), 4), len(p)] for p in parts]


def _ordered(linear: Linear, order: NDArray[np.int64]) -> Linear:
    rounded = np.round(np.array(linear.coefficients)[order], 6).tolist()
    return Linear(
        np.round(linear.mean, 6).tolist(), np.round(linear.scale, 6).tolist(), rounded,
        np.round(np.array(linear.intercept)[order], 6).tolist(),
    )  # fmt: skip
