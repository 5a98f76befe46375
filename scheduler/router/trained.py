"""A trained router of one family: network, the data set's scales, and what it said of held-out prompts.

Everything that is stored is here; `scheduler.router.store` writes and reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from scheduler.router.model import PAIRS, RouterNet, Shape
from scheduler.router.settings import EDGE, MODES, RELAY

if TYPE_CHECKING:
    from scheduler.router.tokens import Tokens

Floats = NDArray[np.float64]
EDGE_FULL, EDGE_RELAY, RELAY_FULL = range(len(PAIRS))


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What weights are and where they come from. `mu`: mode -> metric's mean over train prompts, RouteT2I's mu_i."""

    family: str
    fingerprint: dict[str, Any]  # relay.fingerprint.Fingerprint of the family whose pictures were scored
    encoder: str  # digest of the text encoder whose tokens it reads
    metric_set: str
    metrics: tuple[str, ...]
    weights: tuple[float, ...]  # w_i, sum 1
    gamma: float
    scale: tuple[float, ...]  # |mu_i(edge-only) - mu_i(full-cloud)|, see prs.gap_scale
    mu: tuple[tuple[float, ...], ...]
    programs: dict[str, str]  # mode -> program whose pictures taught it
    shape: Shape
    input_width: int
    data: str  # digest of the rows it was trained on
    prompts: dict[str, int]  # split -> prompts
    calibration: str  # digest of the prompts that the calibration arrays are about
    version: str  # of this training: first digits of the checksum of its weights
    provenance: dict[str, Any]  # commit, date, command, seconds, seed, what validation said


@dataclass(frozen=True)
class Scales:
    """Means and deviations (standard) that the network's outputs are brought back with."""

    d_mean: Floats  # (M, pairs)
    d_std: Floats
    quality_mean: Floats  # (M, modes)
    quality_std: Floats


@dataclass(frozen=True)
class Calibration:
    """What the router says of N prompts it was not trained on, and what came out of them."""

    advantage: Floats  # (N, 3): predicted, of each mode over edge-only; see Predicted.advantage
    quality: Floats  # (N, 3, M): predicted
    outcome: Floats  # (N, 3): measured mean quality of each mode, over the metrics that apply


@dataclass(frozen=True)
class Predicted:
    """What one family's router says of N prompts."""

    d: Floats  # (N, M, pairs), see model.PAIRS
    quality: Floats  # (N, 3, M)
    index: NDArray[np.int64]  # (N, M, K): selected tokens of each metric's expert, strongest first
    strength: Floats  # (N, M, K): their A, 0 where there is none
    weights: Floats  # (M,)

    def prs(self, pair: int = EDGE_FULL) -> Floats:
        """PRS (N,) of a pair of modes."""
        return np.asarray(self.d[:, :, pair] @ self.weights)

    def advantage(self) -> Floats:
        """(N, 3): 1/2 - PRS(edge-only, mode); > 0 where the mode is predicted better than edge-only, which has 0."""
        found = np.zeros((len(self.d), len(MODES)))
        found[:, 0] = 0.5 - self.prs(EDGE_FULL)
        found[:, RELAY] = 0.5 - self.prs(EDGE_RELAY)
        found[:, EDGE] = 0.0
        return found

    def mean_quality(self) -> Floats:
        """(N, 3): over all metrics, weighted with w_i."""
        return np.asarray(self.quality @ self.weights)


@dataclass(frozen=True)
class Trained:
    """One family's router, ready to be asked."""

    card: Card
    net: RouterNet
    scales: Scales
    calibration: Calibration

    def predict(self, tokens: Tokens, batch: int = 256) -> Predicted:
        """What it says of tokens read with the encoder that the card names."""
        import torch

        parts = []
        with torch.inference_mode():
            for at in range(0, len(tokens.states), batch):
                parts.append(self.net(tokens.states[at : at + batch], tokens.mask[at : at + batch]))
        d = _joined([part.d for part in parts]) * self.scales.d_std + self.scales.d_mean
        quality = _joined([part.quality for part in parts]) * self.scales.quality_std + self.scales.quality_mean
        return Predicted(
            d.clip(0, 1),
            quality.clip(0, 1).transpose(0, 2, 1),
            _joined([part.selected for part in parts]).astype(np.int64),
            _joined([part.weights for part in parts]),
            np.asarray(self.card.weights),
        )


def _joined(parts: list[Any]) -> Floats:
    return np.concatenate([part.numpy().astype(np.float64) for part in parts])
