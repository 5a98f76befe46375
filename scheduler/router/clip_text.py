"""The layers of a CLIP text encoder that the router reads, without transformers: a third of its time a prompt, and a
process that only decides need not import it (4 s of the processor's time).

Pre-norm layers with causal attention over token and position embeddings (Radford et al. 2021); the state after the last
layer but one is `hidden_states[-2]` of transformers' `CLIPTextModel`, within rounding: tests hold them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class ClipText:
    """Token ids (B, L) to states (B, L, D) float32, every layer but the last."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]):
        """`config` is config.json of a `CLIPTextModel`, `tensors` its weights under their own names."""
        self.heads: int = config["num_attention_heads"]
        self.eps: float = config.get("layer_norm_eps", 1e-5)
        self.act = ACTIVATIONS[config.get("hidden_act", "quick_gelu")]
        own = {name.removeprefix("text_model."): tensor.float() for name, tensor in tensors.items()}
        self.tokens = own["embeddings.token_embedding.weight"]
        self.positions = own["embeddings.position_embedding.weight"]
        self.layers = [
            {
                name.removeprefix(f"encoder.layers.{i}."): t
                for name, t in own.items()
                if name.startswith(f"encoder.layers.{i}.")
            }
            for i in range(config["num_hidden_layers"] - 1)
        ]
        for layer in self.layers:  # one product for query, key and value
            for part in ("weight", "bias"):
                layer[f"qkv.{part}"] = torch.cat([layer.pop(f"self_attn.{x}_proj.{part}") for x in "qkv"])

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.tokens) + self.positions[: ids.shape[1]]
        batch, length, width = x.shape
        for layer in self.layers:
            y = self._norm(x, layer, "layer_norm1")
            qkv = F.linear(y, layer["qkv.weight"], layer["qkv.bias"])
            q, k, v = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
            x = x + F.linear(y, layer["self_attn.out_proj.weight"], layer["self_attn.out_proj.bias"])
            y = self._norm(x, layer, "layer_norm2")
            y = self.act(F.linear(y, layer["mlp.fc1.weight"], layer["mlp.fc1.bias"]))
            x = x + F.linear(y, layer["mlp.fc2.weight"], layer["mlp.fc2.bias"])
        return x

    def _norm(self, x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer[f"{name}.weight"], layer[f"{name}.bias"], self.eps)
