"""Training of the token-level router: `relay-train router`. Minutes on a CPU.

    targets: D_i of each pair of modes, and each mode's quality, both standardised, from the outcome store
    tokens:  the family's text encoder over every prompt, once
    loss:    mean squared error of D, of PRS and of quality, each over its variance
    Adam with a short warm-up and a cosine; an average of the weights over steps is what is validated and kept;
    the epoch with the least loss on validation prompts wins

RouteT2I (arXiv 2411.13787) supervises with PRS and says nothing of the loss, of Gamma, w_i, K, l and h. The squared error
makes the heads predict means, which is what a decision in expectation needs; w_i is 1 over the share of prompts that
metric i applies to, so that each metric's mean counts alike (all equal for metrics that apply to every prompt, as the
paper's ten); Gamma and sizes were chosen on validation (docs/router.md). Its Adam has 2e-5, ours more: the network here is
small and starts from nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from experiments.routing.data import EDGE, FULL, RoutingData, Split
from relay.errors import BadRequest
from scheduler.router.model import PAIRS, Shape
from scheduler.router.prs import gap_scale, superiority
from scheduler.router.trained import EDGE_FULL, Calibration, Card, Scales, Trained

if TYPE_CHECKING:
    from scheduler.router.tokens import TokenReader, Tokens

Floats = NDArray[np.float64]
Ways = Literal["three-way", "two-way"]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a router is trained. `multi` False: one expert and one head on PRS itself (the paper's ablation)."""

    shape: Shape = Shape()
    gamma: float = 3.0
    weigh: Literal["asked", "equal"] = "asked"  # w_i: 1 / share of prompts that metric i applies to, or all alike
    multi: bool = True
    ways: Ways = "three-way"  # two-way: only edge-only against full-cloud is learned
    epochs: int = 30
    batch: int = 64
    rate: float = 1e-3
    decay: float = 0.01
    average: float = 0.98  # of the weights, per step
    patience: int = 8
    prs_weight: float = 1.0
    quality_weight: float = 0.5


@dataclass
class Targets:
    """What the network learns of a split, standardised by the train split; nan where there is nothing to learn."""

    d: Floats  # (N, M, pairs)
    quality: Floats  # (N, M, modes)


@dataclass
class Fitted:
    """A training's outcome. `curve`: per epoch train and validation loss."""

    trained: Trained
    seconds: float
    curve: list[tuple[float, float]] = field(default_factory=list)


def fit(
    data: RoutingData,
    recipe: Recipe,
    seed: int,
    reader: TokenReader,
    fingerprint: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
    provenance: dict[str, Any] | None = None,
) -> Fitted:
    """Train one family's router on data.train; data.validation chooses the epoch and calibrates."""
    import torch

    if len(data.train) < 8 or len(data.validation) < 2:
        raise BadRequest(
            f"{len(data.train)} train and {len(data.validation)} validation prompts of {data.family} are too few to learn"
            " from: let the run go on"
        )
    started = time.perf_counter()
    torch.manual_seed(seed)
    weights, scale = metric_weights(data, recipe), gap_scale(data.train.quality[:, EDGE], data.train.quality[:, FULL])
    parts = {name: measured(getattr(data, name), scale, weights, recipe) for name in ("train", "validation")}
    scales = _scales(parts["train"])
    targets = {name: _standardised(part, scales) for name, part in parts.items()}
    metrics, weights, scale = _as_learned(data, recipe, weights, scale)
    tokens = {name: read(reader, getattr(data, name).prompts) for name in parts}
    net, curve = _descend(tokens, targets, weights * scales.d_std[:, EDGE_FULL], reader.width, recipe, seed, say)
    mean = np.nanmean(data.train.quality, axis=0)
    card = Card(
        family=data.family, fingerprint=fingerprint or {}, encoder=reader.digest, metric_set=data.metric_set,
        metrics=metrics, weights=tuple(weights.tolist()), gamma=recipe.gamma, scale=tuple(scale.tolist()),
        mu=tuple(tuple(row) for row in mean.tolist()), programs=data.programs, shape=recipe.shape,
        input_width=reader.width, data=data.digest,
        prompts={name: len(getattr(data, name)) for name in ("train", "validation")},
        calibration=prompts_digest(data.validation.prompts), version=_version(net), provenance=provenance or {},
    )  # fmt: skip
    blank = Calibration(*(np.zeros((0, 3)),) * 3)
    trained = Trained(card, net, scales, blank)
    said = trained.predict(tokens["validation"])
    held = Calibration(said.advantage(), said.quality, data.validation.mean_quality())
    return Fitted(Trained(card, net, scales, held), time.perf_counter() - started, curve)


def metric_weights(data: RoutingData, recipe: Recipe) -> Floats:
    """w_i, sum 1."""
    asked = (~np.isnan(data.train.quality[:, FULL])).mean(axis=0)
    if not asked.all():
        raise BadRequest(f"no train prompt has a score of {data.metrics[int(asked.argmin())]}: let the run go on")
    weights = 1 / asked if recipe.weigh == "asked" else np.ones_like(asked)
    return np.asarray(weights / weights.sum())


def measured(split: Split, scale: Floats, weights: Floats, recipe: Recipe) -> Targets:
    """D of every pair and every mode's quality, as measured; without multi-metric PRS and the mean quality alone."""
    q = split.quality
    d = np.stack([superiority(q[:, a], q[:, b], scale, recipe.gamma) for a, b in PAIRS], axis=2)
    quality = q.transpose(0, 2, 1)
    if not recipe.multi:
        d = np.einsum("nmp,m->np", d, weights)[:, None]
        quality = split.mean_quality()[:, None]
    if recipe.ways == "two-way":
        d = d.copy()
        d[:, :, 1:] = np.nan
    return Targets(d, quality)


def _as_learned(
    data: RoutingData, recipe: Recipe, weights: Floats, scale: Floats
) -> tuple[tuple[str, ...], Floats, Floats]:
    if recipe.multi:
        return data.metrics, weights, scale
    return ("prs",), np.ones(1), np.array([float(scale @ weights)])


def _scales(train: Targets) -> Scales:
    def spread(values: Floats) -> tuple[Floats, Floats]:
        known = np.where(np.isnan(values).all(axis=0), 0.5, values)
        return np.nanmean(known, axis=0), np.maximum(np.nanstd(known, axis=0), 1e-4)

    d_mean, d_std = spread(train.d)
    quality_mean, quality_std = spread(train.quality)
    return Scales(d_mean, d_std, quality_mean, quality_std)


def _standardised(part: Targets, scales: Scales) -> Targets:
    return Targets((part.d - scales.d_mean) / scales.d_std, (part.quality - scales.quality_mean) / scales.quality_std)


def _descend(
    tokens: dict[str, Tokens],
    targets: dict[str, Targets],
    prs_weights: Floats,
    width: int,
    recipe: Recipe,
    seed: int,
    say: Callable[[str], None],
) -> tuple[Any, list[tuple[float, float]]]:
    """The network of the best epoch, and the losses per epoch."""
    import copy

    import torch

    from scheduler.router.model import RouterNet

    net = RouterNet(width, targets["train"].d.shape[1], recipe.shape)
    kept = copy.deepcopy(net).eval()
    optimiser = torch.optim.AdamW(net.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    known = {name: _tensors(part) for name, part in targets.items()}
    share = torch.from_numpy(prs_weights / np.linalg.norm(prs_weights)).float()
    lengths = {name: np.array([len(texts) for texts in part.texts]) for name, part in tokens.items()}
    count = len(lengths["train"])
    steps_a_epoch = -(-count // recipe.batch)
    rng = np.random.default_rng(seed)
    best: tuple[float, dict[str, Any]] | None = None
    curve: list[tuple[float, float]] = []
    since = step = 0

    def loss_of(network: Any, name: str, rows: Any) -> Any:
        part, (d, quality) = tokens[name], known[name]
        most = int(lengths[name][rows].max())
        out = network(part.states[rows, :most], part.mask[rows, :most])
        said_prs, true_prs = (torch.einsum("bmp,m->bp", x, share) for x in (out.d, d[rows]))
        return (
            _squared(out.d, d[rows])
            + recipe.prs_weight * _squared(said_prs, true_prs)
            + recipe.quality_weight * _squared(out.quality, quality[rows])
        )

    for epoch in range(recipe.epochs):
        net.train()
        total = 0.0
        for rows in map(torch.from_numpy, _batches(lengths["train"], recipe.batch, rng)):
            progress = step / (recipe.epochs * steps_a_epoch)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * min(1.0, (step + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * progress))
            loss = loss_of(net, "train", rows)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            total += float(loss.detach()) * len(rows)
            step += 1
            _follow(kept, net, min(recipe.average, step / (step + 10)))
        with torch.inference_mode():
            held = float(loss_of(kept, "validation", slice(None)))
        curve.append((total / count, held))
        say(f"epoch {epoch + 1}: train {curve[-1][0]:.4f}, validation {held:.4f}")
        if best is None or held < best[0]:
            best, since = (held, copy.deepcopy(kept.state_dict())), 0
        else:
            since += 1
            if since >= recipe.patience:
                break
    assert best is not None
    kept.load_state_dict(best[1])
    return _rounded(kept), curve


def _batches(lengths: NDArray[np.int64], size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Every row once, in batches of prompts of about one length: half of the work would be padding otherwise."""
    jittered = lengths + rng.uniform(0, 4, len(lengths))
    ordered = np.argsort(jittered)
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def _tensors(part: Targets) -> tuple[Any, Any]:
    import torch

    return torch.from_numpy(part.d).float(), torch.from_numpy(part.quality).float()


def _squared(said: Any, true: Any) -> Any:
    """Mean squared error over what is known."""
    import torch

    known = ~torch.isnan(true)
    return torch.where(known, said - torch.nan_to_num(true), 0.0).square().sum() / known.sum().clamp(min=1)


def _follow(kept: Any, net: Any, keep: float) -> None:
    import torch

    with torch.no_grad():
        for mine, theirs in zip(kept.parameters(), net.parameters(), strict=True):
            mine.lerp_(theirs, 1 - keep)


def _rounded(net: Any) -> Any:
    """The network with weights as half precision keeps them, so that what is stored is what was calibrated."""
    import torch

    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())
    return net.eval()


def _version(net: Any) -> str:
    digest = blake2b(digest_size=6)
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def prompts_digest(prompts: tuple[str, ...]) -> str:
    """Which prompts calibration arrays are about; routers of several families need the same."""
    return blake2b("\n".join(prompts).encode(), digest_size=8).hexdigest()


@lru_cache(maxsize=16)
def read(reader: TokenReader, prompts: tuple[str, ...]) -> Tokens:
    """Tokens of many prompts, kept: seeds, ablations and splits read the same ones."""
    return reader.read(prompts)


class RouteT2I:
    """The router as experiments.routing compares it: two-way, PRS of edge-only and full-cloud from the prompt alone."""

    capped = True

    def __init__(self, recipe: Recipe | None = None, name: str = "RouteT2I"):
        self.recipe, self.name = recipe or Recipe(), name
        self.fitted: Fitted | None = None
        self._reader: TokenReader | None = None

    def fit(self, data: RoutingData, seed: int) -> None:
        from relay.family_spec import find_family
        from scheduler.router.tokens import TokenReader

        self._reader = TokenReader.of(find_family(data.family))
        self.fitted = fit(data, self.recipe, seed, self._reader)

    def score(self, split: Split) -> Floats:
        assert self.fitted is not None
        assert self._reader is not None
        return self.fitted.trained.predict(read(self._reader, split.prompts)).prs(EDGE_FULL)


def ablations(recipe: Recipe | None = None) -> list[RouteT2I]:
    """The paper's three, under its words."""
    recipe = recipe or Recipe()
    change = msgspec.structs.replace
    return [
        RouteT2I(change(recipe, multi=False), "w/o multi-metric"),
        RouteT2I(change(recipe, shape=change(recipe.shape, select=False)), "w/o token selection"),
        RouteT2I(change(recipe, shape=change(recipe.shape, dual=False)), "w/o dual gate"),
    ]
