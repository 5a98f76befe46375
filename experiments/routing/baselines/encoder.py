"""A small Transformer over a family's text-encoder features, and the one loop that trains every neural baseline.

It stands where the papers fine-tune BERT or DeBERTa, whose weights are not here: the encoder below it is the family's
own, frozen, and only this head learns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments.routing.embeddings import Embeddings

if TYPE_CHECKING:
    from torch import Tensor, nn

Floats = NDArray[np.float64]
Loss = Callable[["Tensor", "Tensor"], "Tensor"]  # (outputs (B, O), targets (B, T)) -> scalar
EPOCHS = 30
PATIENCE = 5  # epochs without a better validation loss
BATCH = 64


def encoder_head(inputs: int, width: int, layers: int, dropout: float, outputs: int) -> nn.Module:
    """tokens (B, L, D), mask (B, L) -> (B, outputs): project, attend, mean over the prompt's tokens, linear."""
    import torch
    from torch import nn

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Sequential(nn.LayerNorm(inputs), nn.Linear(inputs, width))
            block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
            self.leave = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, outputs))

        def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.blocks(self.enter(tokens), src_key_padding_mask=~mask)
            there = mask[..., None].to(x.dtype)
            return self.leave((x * there).sum(1) / there.sum(1))

    return Head()


def matrix_head(inputs: int, rank: int, dropout: float) -> nn.Module:
    """RouteLLM's matrix factorisation: pooled (B, P) -> delta(large, prompt) - delta(small, prompt), (B, 1).

    delta(M, p) = w2' (v_M * (W1' v_p + b)), with a vector v_M per member.
    """
    import torch
    from torch import nn

    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(inputs, elementwise_affine=False)
            self.project = nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, rank))
            self.members = nn.Parameter(torch.randn(2, rank))
            self.leave = nn.Linear(rank, 1, bias=False)

        def forward(self, pooled: torch.Tensor) -> torch.Tensor:
            members = nn.functional.normalize(self.members, dim=-1) * self.members.shape[1] ** 0.5
            deltas = self.leave(self.project(self.norm(pooled))[:, None] * members)  # (B, 2, 1)
            return deltas[:, 0] - deltas[:, 1] + 0.0

    return Matrix()


def inputs_of(embeddings: Embeddings, rows: NDArray[np.int64], pooled: bool) -> tuple[Any, ...]:
    """What a head reads of the given prompts."""
    import torch

    if pooled:
        return (torch.from_numpy(embeddings.pooled[rows]),)
    return tuple(torch.from_numpy(part) for part in embeddings.padded(rows))


def train(
    head: nn.Module, loss: Loss, embeddings: Embeddings, pooled: bool,
    train_rows: NDArray[np.int64], train_targets: Floats, held_rows: NDArray[np.int64], held_targets: Floats,
    lr: float, weight_decay: float, seed: int,
) -> int:  # fmt: skip
    """Adam with decay, until the validation loss no longer falls; leaves the best epoch's weights, returns its number."""
    import torch

    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    targets, held = (torch.from_numpy(t).float() for t in (train_targets, held_targets))
    held_inputs = inputs_of(embeddings, held_rows, pooled)
    rng = np.random.default_rng(seed)
    best, best_epoch, kept = float("inf"), 0, {k: v.clone() for k, v in head.state_dict().items()}
    for epoch in range(1, EPOCHS + 1):
        head.train()
        shuffled = rng.permutation(len(train_rows))
        for at in range(0, len(shuffled), BATCH):
            part = shuffled[at : at + BATCH]
            optimiser.zero_grad()
            loss(head(*inputs_of(embeddings, train_rows[part], pooled)), targets[part]).backward()
            optimiser.step()
        head.eval()
        with torch.inference_mode():
            found = float(loss(head(*held_inputs), held))
        if found < best:
            best, best_epoch, kept = found, epoch, {k: v.clone() for k, v in head.state_dict().items()}
        elif epoch - best_epoch >= PATIENCE:
            break
    head.load_state_dict(kept)
    return best_epoch


def predict(head: nn.Module, embeddings: Embeddings, rows: NDArray[np.int64], pooled: bool) -> Floats:
    """Outputs (N, O) of the given prompts."""
    import torch

    head.eval()
    found = []
    with torch.inference_mode():
        for at in range(0, len(rows), 256):
            found.append(head(*inputs_of(embeddings, rows[at : at + 256], pooled)).double().numpy())
    return np.concatenate(found)
