"""The papers' learned routers, adapted: the same frozen text encoder for all, and pictures where they had answers.

RouteLLM (Ong et al. 2024)    win labels, here "the large member's picture is better by PRS"; BERT's classifier becomes
                              a small Transformer on the family's tokens, MF factorises pooled embedding x member
Hybrid LLM (Ding et al. 2024) soft labels: the share of (seed, metric) pairs where the small member is within t of the
                              large one; t maximises the labels' mean pairwise difference, as in the paper
ZOOTER (Lu et al. 2024)       KL to softmax over the rewards of the members, rewards smoothed with the mean of their
                              tag; a tag is the prompt's noun count here, and a reward the mean over standardised metrics
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from experiments.routing.baselines.base import GAMMAS, Floats, asked, pair, pairwise_difference, prs_of
from experiments.routing.baselines.encoder import encoder_head, matrix_head, predict, train
from experiments.routing.baselines.syntax import noun_count
from experiments.routing.data import EDGE, FULL, RoutingData, Split
from experiments.routing.embeddings import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODER: dict[str, Any] = {
    "lr": (3e-4, 1e-3, 3e-3), "width": (32, 64), "layers": (1, 2), "dropout": (0.1, 0.3), "weight_decay": (0.0, 0.01, 0.1),
}  # fmt: skip
TEMPERATURES = (0.1, 0.3, 1.0, 3.0)


@dataclass
class Neural:
    """A head on the family's text-encoder features. A subclass says its targets, its loss and what a score is."""

    embeddings: Embeddings = field(repr=False)
    lr: float = 1e-3
    width: int = 64
    layers: int = 1
    dropout: float = 0.1
    weight_decay: float = 0.01
    capped: ClassVar[bool] = True
    pooled: ClassVar[bool] = False
    outputs: ClassVar[int] = 1
    epochs: int = field(default=0, init=False)  # how long the kept weights had been trained

    def fit(self, data: RoutingData, seed: int) -> None:
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = self.build()
            rows = [self.embeddings.rows(split.prompts) for split in (data.train, data.validation)]
            targets = [self.targets(data, split) for split in (data.train, data.validation)]
            self.epochs = train(
                self.head, self.loss, self.embeddings, self.pooled, rows[0], targets[0], rows[1], targets[1],
                self.lr, self.weight_decay, seed,
            )  # fmt: skip

    def outputs_of(self, split: Split) -> Floats:
        return predict(self.head, self.embeddings, self.embeddings.rows(split.prompts), self.pooled)

    def build(self) -> nn.Module:
        return encoder_head(self.embeddings.width, self.width, self.layers, self.dropout, self.outputs)

    def targets(self, data: RoutingData, split: Split) -> Floats:
        raise NotImplementedError

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy with the probability that the large member is better."""
        import torch.nn.functional as F

        return F.binary_cross_entropy_with_logits(outputs[:, 0], targets[:, 0])

    def score(self, split: Split) -> Floats:
        return _sigmoid(-self.outputs_of(split)[:, 0])


@dataclass
class RouteLlmBert(Neural):
    name = "routellm-bert"
    gamma: float = 1.0
    SPACE: ClassVar[dict[str, Any]] = ENCODER | {"gamma": GAMMAS}

    def targets(self, data: RoutingData, split: Split) -> Floats:
        return (prs_of(data, split, self.gamma) < 0.5).astype(float)[:, None]


@dataclass
class RouteLlmMatrix(Neural):
    name = "routellm-mf"
    gamma: float = 1.0
    pooled = True
    SPACE: ClassVar[dict[str, Any]] = {
        "lr": (3e-4, 1e-3, 3e-3, 1e-2), "width": (16, 32, 64, 128), "dropout": (0.0, 0.1, 0.3),
        "weight_decay": (0.0, 0.01, 0.1), "gamma": GAMMAS,
    }  # fmt: skip

    def build(self) -> nn.Module:
        return matrix_head(self.embeddings.pooled.shape[1], self.width, self.dropout)

    def targets(self, data: RoutingData, split: Split) -> Floats:
        return (prs_of(data, split, self.gamma) < 0.5).astype(float)[:, None]


@dataclass
class HybridLlm(Neural):
    name = "hybrid-llm"
    SPACE: ClassVar[dict[str, Any]] = ENCODER
    threshold: float = field(default=0.0, init=False)  # t, in standard deviations of each metric's difference

    def targets(self, data: RoutingData, split: Split) -> Floats:
        edge, cloud = pair(data.train)
        spread, weights = np.nanstd(edge - cloud, axis=0), 1 / asked(data)
        if split is data.train:
            candidates = np.linspace(0, 2, 21)
            told = [pairwise_difference(_within(edge, cloud, t * spread, weights)) for t in candidates]
            self.threshold = float(candidates[int(np.argmax(told))])
        return (1 - _within(*pair(split), self.threshold * spread, weights))[:, None]


@dataclass
class Zooter(Neural):
    """Three outputs, one a mode: two are compared in the two-way setting, all three in the three-way one."""

    name = "zooter"
    temperature: float = 0.3
    smoothing: float = 0.3  # weight of the tag's mean reward
    outputs = 3
    SPACE: ClassVar[dict[str, Any]] = ENCODER | {"temperature": TEMPERATURES, "smoothing": (0.0, 0.3, 0.6)}

    def targets(self, data: RoutingData, split: Split) -> Floats:
        rewards, known = self._rewards(data, split), self._rewards(data, data.train)
        tags, known_tags = _tags(split), _tags(data.train)
        means = {tag: known[known_tags == tag].mean(0) for tag in np.unique(known_tags)}
        smooth = np.stack([means.get(tag, known.mean(0)) for tag in tags])
        return _softmax(((1 - self.smoothing) * rewards + self.smoothing * smooth) / self.temperature)

    def _rewards(self, data: RoutingData, split: Split) -> Floats:
        """(N, 3): mean over the metrics, each standardised over the train prompts, rare ones with more weight as in PRS."""
        quality = data.train.quality
        standard = (split.quality - np.nanmean(quality, (0, 1))) / np.nanstd(quality, (0, 1))
        return (np.nan_to_num(standard) / asked(data)).mean(2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.kl_div(outputs.log_softmax(-1), targets, reduction="batchmean")

    def score(self, split: Split) -> Floats:
        logits = self.outputs_of(split)
        return _sigmoid(logits[:, EDGE] - logits[:, FULL])

    def values(self, split: Split) -> Floats:
        """(N, 3): each mode's reward, up to what is common to a prompt's modes."""
        return self.outputs_of(split) * self.temperature


def _within(edge: Floats, cloud: Floats, margin: Floats, weights: Floats) -> Floats:
    """(N,): weighted share of the metrics on which the small member is within the margin of the large one.

    A metric that does not apply counts half, as in PRS.
    """
    said = np.where(np.isnan(edge), 0.5, edge >= cloud - margin)
    return said @ weights / weights.sum()


def _tags(split: Split) -> NDArray[np.int64]:
    return np.array([min(noun_count(prompt), 8) for prompt in split.prompts])


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def _softmax(x: Floats) -> Floats:
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)
