"""RouteT2I's dual-gate mixture of experts, in a Transformer's feed-forward place (arXiv 2411.13787, Routing Model).

    A = softmax(T E^T)                              token-selection gate: T (L x d) tokens, E (M x d) one row a metric
    expert i reads the K tokens with the largest A[:, i]
    T_i^o[t] = T[t] P_i^o S_i,   o in {+, -}        P_i^o: d x l, S_i: l x h shared by both gates of an expert, l << h, d
    expert i's word on token t: sigmoid(T_i^+ - T_i^-)   what speaks for the metric against what speaks against it

The papers' slides leave open what follows. The softmax runs over the experts, as in expert choice routing (Zhou et al.
2022); special tokens are never selected; an expert's word is weighted with A[t, i], summed over the experts that selected
the token, and brought back to d by one matrix for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Selected:
    """What each expert made of its tokens."""

    words: Tensor  # (B, M, K, h): sigmoid(T+ - T-) of the selected tokens
    weights: Tensor  # (B, M, K): A of the selected tokens, 0 where a prompt has fewer than K
    index: Tensor  # (B, M, K): their places in the prompt


class DualGateMoE(nn.Module):
    """`select` False: every expert reads every token alike (ablation). `dual` False: one gate, sigmoid(T P S)."""

    def __init__(
        self, width: int, experts: int, top_k: int, rank: int, hidden: int, select: bool = True, dual: bool = True
    ):
        super().__init__()
        self.top_k, self.select, self.dual = top_k, select, dual
        self.experts = nn.Parameter(torch.randn(experts, width) / width**0.5)  # E
        gates = 2 if dual else 1
        self.low = nn.Parameter(torch.randn(gates, experts, width, rank) / width**0.5)  # P_i^o
        self.shared = nn.Parameter(torch.randn(experts, rank, hidden) / rank**0.5)  # S_i
        self.back = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Selected]:
        """The update of tokens (B, L, d), and what was selected. `mask` (B, L): tokens that may be."""
        gate = tokens @ self.experts.T
        gate = gate.softmax(-1) if self.select else torch.ones_like(gate)
        gate = (gate * mask[..., None]).transpose(1, 2)  # (B, M, L)
        count = min(self.top_k, tokens.shape[1]) if self.select else tokens.shape[1]
        weights, index = gate.topk(count, dim=-1)
        # T P for every token, then only the selected ones go on: l numbers a token are moved, not d
        gates, experts, width, rank = self.low.shape
        low = tokens @ self.low.permute(2, 1, 0, 3).reshape(width, experts * gates * rank)
        low = low.view(*tokens.shape[:2], experts, gates, rank).transpose(1, 2)
        low = low.gather(2, index[..., None, None].expand(-1, -1, -1, gates, rank))  # (B, M, K, o, l)
        low = low[:, :, :, 0] - low[:, :, :, 1] if self.dual else low[:, :, :, 0]  # S is shared: it may come after
        words = (low @ self.shared).sigmoid()
        batch = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        heard = tokens.new_zeros(*tokens.shape[:2], words.shape[-1])
        heard = heard.index_put((batch.expand_as(index), index), words * weights[..., None], accumulate=True)
        return self.back(heard), Selected(words, weights, index)
