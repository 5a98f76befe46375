"""The router's network: tokens in, for each metric how the modes compare and how good each of them will be.

    tokens (B, L, D) -> Linear -> blocks of (attention, dual-gate MoE) -> per metric one head on what its expert selected

A head gives, for its metric, D of each pair of modes (`PAIRS`; in prs.py's sense, > 1/2 where the pair's first is
better) and each mode's quality, all standardised. Trained on both: see experiments.training.router.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from scheduler.router.moe import DualGateMoE
from scheduler.router.settings import EDGE, FULL, MODES, RELAY

# (worse in general, better in general): D of a pair is what the first, cheaper mode has over the second
PAIRS = ((EDGE, FULL), (EDGE, RELAY), (RELAY, FULL))


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sizes of the network. The paper names d, l, h and K and gives none of them; chosen on validation prompts, see
    docs/router.md. `select` and `dual` False are two of the paper's ablations; without multi-metric, its third, is a
    network of one metric, PRS itself."""

    width: int = 64  # d
    layers: int = 2
    heads: int = 4
    rank: int = 8  # l
    hidden: int = 64  # h
    top_k: int = 6  # K
    dropout: float = 0.1
    select: bool = True
    dual: bool = True


class Output(NamedTuple):
    d: Tensor  # (B, M, pairs), standardised
    quality: Tensor  # (B, M, modes), standardised
    selected: Tensor  # (B, M, K): places of the last block's selected tokens, largest A first
    weights: Tensor  # (B, M, K): their A; 0 where a prompt has fewer


class Block(nn.Module):
    def __init__(self, shape: Shape, experts: int):
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.attention = nn.MultiheadAttention(shape.width, shape.heads, batch_first=True)
        self.moe_norm = nn.LayerNorm(shape.width)
        self.moe = DualGateMoE(
            shape.width, experts, shape.top_k, shape.rank, shape.hidden, shape.select, shape.dual
        )  # fmt: skip
        self.drop = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, then of each expert (B, M, ...): the mean of its words and of its tokens, their A and their places."""
        y = self.norm(x)
        x = x + self.drop(self.attention(y, y, y, key_padding_mask=~own, need_weights=False)[0])
        update, chosen = self.moe(self.moe_norm(x), own)
        share = chosen.weights / chosen.weights.sum(-1, keepdim=True).clamp(min=1e-6)
        over_tokens = x.new_zeros(*share.shape[:2], x.shape[1]).scatter_add(2, chosen.index, share)  # (B, M, L)
        said = torch.cat([(share[..., None] * chosen.words).sum(2), over_tokens @ x], -1)
        return x + self.drop(update), said, chosen.weights, chosen.index


class RouterNet(nn.Module):
    def __init__(self, input_width: int, metrics: int, shape: Shape):
        super().__init__()
        self.metrics = metrics
        self.enter = nn.Sequential(nn.LayerNorm(input_width), nn.Linear(input_width, shape.width))
        self.blocks = nn.ModuleList(Block(shape, metrics) for _ in range(shape.layers))
        seen = shape.layers * (shape.hidden + shape.width)
        outputs = len(PAIRS) + len(MODES)
        self.drop = nn.Dropout(shape.dropout)
        # one head per metric, all in one product: (M, seen, outputs)
        self.heads = nn.Parameter(torch.randn(metrics, seen, outputs) * 0.02)
        self.bias = nn.Parameter(torch.zeros(metrics, outputs))

    def forward(self, states: Tensor, mask: Tensor) -> Output:
        """`states` (B, L, D), `mask` (B, L) of the prompts' own tokens; a prompt without any gets a blank one."""
        own = mask.clone()
        own[~own.any(1), 0] = True
        x = self.enter(states)
        heard = []
        for block in self.blocks:
            x, said, weights, index = block(x, own)
            heard.append(said)
        out = torch.einsum("bmf,mfo->bmo", self.drop(torch.cat(heard, -1)), self.heads) + self.bias
        return Output(out[..., : len(PAIRS)], out[..., len(PAIRS) :], index, weights)
