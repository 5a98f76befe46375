"""Baselines that a reader will look for and that none of the architectures takes: their reasons stand in the tables.

The hooks are written out all the same, so that a test runs each and its reason stays true, and so that a diffusers that
mends one needs a line taken away here and no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.baselines.base import Result, Setting
from experiments.baselines.hooks import Clock, HookCache

if TYPE_CHECKING:
    import torch

    from relay.family import Family


class FirstBlockCache(HookCache):
    """The blocks after the first are skipped while the first one's residual changes little (ParaAttention's FBCache)."""

    name = "first-block-cache"
    paper = "FBCache of ParaAttention, after TeaCache, Liu et al. 2024, arXiv 2411.19108"
    reasons = {  # noqa: RUF012
        "sd3": "FBCBlockHook subtracts the text stream at the last block, and SD3's last block returns none:"
        " TypeError, None - Tensor, in the first step (diffusers 0.42.1)",
        "sdxl": "apply_first_block_cache wants a row of transformer blocks on the model, and UNet2DConditionModel has"
        " none: IndexError, pop from empty list",
    }

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, threshold: float = 0.05) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

        apply_first_block_cache(model, FirstBlockCacheConfig(threshold=threshold))


class SeaCache(HookCache):
    """Blocks are skipped while a filtered view of the latent changes little (arXiv 2602.18993)."""

    name = "sea-cache"
    paper = "SeaCache, arXiv 2602.18993"
    reasons = {  # noqa: RUF012
        "sd3": "it records a residual only where the last block returns a text stream, and SD3's returns none: every"
        " step runs in full ('a cache hit without residual history')",
        "sdxl": "ValueError, 'SeaCache found no repeated transformer blocks on the model': a U-Net has no row of them",
    }

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, threshold: float = 0.25) -> None:
        from diffusers.hooks import SeaCacheConfig, apply_sea_cache

        def frames(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
            latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return [image[:, None] for image in latents]  # (C, T = 1, H, W)

        apply_sea_cache(model, SeaCacheConfig(threshold=threshold, raw_vision_callback=frames))


class TextKVCache(HookCache):
    """Keys and values of the prompt are computed once."""

    name = "text-kv-cache"
    paper = "diffusers' own"
    reasons = dict.fromkeys(
        ("sd3", "sdxl"),
        "apply_text_kv_cache hooks NucleusMoEImageTransformerBlock only: no block of this model is one",
    )

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock) -> None:
        from diffusers.hooks import TextKVCacheConfig, apply_text_kv_cache

        apply_text_kv_cache(model, TextKVCacheConfig())


class Sada:
    """Steps and tokens are skipped where the trajectory is stable (Jiang et al. 2025): RISE compares itself with it."""

    name = "sada"
    paper = "SADA, Jiang et al. 2025, arXiv 2507.17135, one of RISE's baselines"
    note = ""

    def applies(self, family: Family) -> str | None:
        return (
            "its code is a repository (Ting-Justin-Jiang/sada-icml) and no package: `sada` on the registry is a payment"
            " client"
        )

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        return []

    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        raise NotImplementedError(self.applies(family))
