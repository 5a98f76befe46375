"""diffusers' own cache hooks (diffusers.hooks 0.42.1) on the large member, where they take its architecture.

Neither SD3Transformer2DModel nor UNet2DConditionModel has `enable_cache`, so the hooks are put on with diffusers'
`apply_*` functions. What they need from a pipeline, a cache context and the present timestep, a pre-hook tells them.
Which hook works on which architecture was found by running each; the tests run each again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from experiments.baselines.cached import LargeLeg, large_module, untouched

if TYPE_CHECKING:
    from relay.family import Family

ONE_CALL = "cond and uncond"  # our guided step is one forward of both branches, hence one cache context


class Clock:
    """Before each forward of the large member: which step this is, told to the hooks."""

    def __init__(self, leg: LargeLeg):
        self.leg, self.step, self.timestep = leg, -1, 0.0

    def tick(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context  # CacheMixin.cache_context calls no more

        self.step += 1
        times = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.timestep = float(times.reshape(-1)[0])
        _set_cache_context(
            model,
            CacheContext(
                ONE_CALL,
                step_index=self.step,
                num_inference_steps=self.leg.steps_total,
                timestep=self.timestep,
                sigma=self.leg.sigmas[self.step],
            ),
        )

    def now(self) -> float:
        """The present timestep, 0..1000."""
        return self.timestep


class HookCache:
    """A cache hook of diffusers. `reasons`: architecture -> why it cannot be used there."""

    name: str
    paper: str
    note = ""
    reasons: dict[str, str] = {}  # noqa: RUF012 - a constant of each class
    points: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    early: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    idle: dict[str, Any] = {}  # noqa: RUF012
    apply: Callable[..., None]  # (family, model, clock, **options): each hook has options of its own

    def applies(self, family: Family) -> str | None:
        return self.reasons.get(family.spec.architecture)

    def prepare(self, family: Family, leg: LargeLeg) -> None:
        """Nothing to measure beforehand."""

    @contextmanager
    def on(self, family: Family, leg: LargeLeg, options: dict[str, Any]) -> Iterator[None]:
        with hooked(family, leg, lambda model, clock: self.apply(family, model, clock, **options)):
            yield


@contextmanager
def hooked(family: Family, leg: LargeLeg, apply: Callable[[torch.nn.Module, Clock], None]) -> Iterator[None]:
    """The large member with a hook put on by `apply`, and with the clock that the hook reads."""
    model, clock = large_module(family), Clock(leg)
    with untouched(model):
        apply(model, clock)
        handle = model.register_forward_pre_hook(clock.tick, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class PyramidAttention(HookCache):
    """Attention outputs are broadcast to the next steps, those of cross-attention twice as far.

    Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588), within diffusers' default timesteps, 100..800. A
    relay's first leg lies above them for the most part, so there they reach up to 950.
    """

    name = "pyramid-attention"
    paper = "PAB, Zhao et al. 2024, arXiv 2408.12588"
    note = "attention only; SD3's joint attention counts as spatial"
    points = {f"attention every {n} steps": {"every": n, "below": 800} for n in (2, 3, 4)}  # noqa: RUF012
    early = {f"attention every {n} steps, t < 950": {"every": n, "below": 950} for n in (2, 3)}  # noqa: RUF012
    idle = {"every": 1, "below": 800}  # noqa: RUF012

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, every: int, below: int) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        across = 1 if every == 1 else 2 * every
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=every,
            cross_attention_block_skip_range=across,
            spatial_attention_timestep_skip_range=(100, below),
            cross_attention_timestep_skip_range=(100, below),
            current_timestep_callback=clock.now,
        )
        apply_pyramid_attention_broadcast(model, config)


class FasterCache(HookCache):
    """The unconditional branch is predicted from the conditional one, attention from its last two outputs.

    FasterCache (Lv et al. 2024, arXiv 2410.19355), within diffusers' default timesteps, below 641 and 681. A relay's first
    leg lies above them, so there they reach up to 950.
    """

    name = "faster-cache"
    paper = "FasterCache, Lv et al. 2024, arXiv 2410.19355"
    note = "pooled_projections named as an input to be split, which diffusers' default list lacks"
    reasons = {  # noqa: RUF012
        "sdxl": "FasterCacheDenoiserHook halves tensors only: SDXL's added_cond_kwargs is a dict and keeps both branches,"
        " so the U-Net fails on the first skipped step; and its attention patterns match no layer of a U-Net",
    }
    points = {  # noqa: RUF012
        f"unconditional branch every {n} steps": {"every": n, "below": 641} for n in (2, 3, 5, 8)
    }
    early = {  # noqa: RUF012
        f"unconditional branch every {n} steps, t < 950": {"every": n, "below": 950} for n in (2, 3)
    }
    idle = {"every": 1, "below": 641}  # noqa: RUF012

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, every: int, below: int) -> None:
        from diffusers.hooks import FasterCacheConfig, apply_faster_cache

        config = FasterCacheConfig(
            unconditional_batch_skip_range=every,
            unconditional_batch_timestep_skip_range=(-1, below),
            spatial_attention_block_skip_range=min(every, 2),
            spatial_attention_timestep_skip_range=(-1, below + 40),  # diffusers' defaults are 641 and 681
            # weight 0.5 at all steps is diffusers' own default, said here so that it does not warn
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
            is_guidance_distilled=clock.leg.guidance <= 1,  # one branch only
            current_timestep_callback=clock.now,
            _unconditional_conditional_input_kwargs_identifiers=[
                "hidden_states", "encoder_hidden_states", "timestep", "pooled_projections",
            ],
        )  # fmt: skip
        with _quiet("diffusers.hooks.faster_cache"):
            apply_faster_cache(model, config)


class TaylorSeer(HookCache):
    """Outputs of attention and feed-forward layers are extrapolated from earlier steps by a Taylor expansion.

    TaylorSeer (Liu et al. 2025, arXiv 2503.06923).
    """

    name = "taylorseer"
    paper = "TaylorSeer, Liu et al. 2025, arXiv 2503.06923"
    note = "layers named: attention and feed-forward, as in the paper; diffusers' default patterns miss a U-Net's"
    layers = r".*transformer_blocks\.\d+\.(attn\d?|ff|ff_context)"
    points = {  # noqa: RUF012
        f"every {n} steps, order {order}": {"every": n, "order": order}
        for n, order in ((3, 1), (5, 1), (2, 1), (3, 2), (5, 2))
    }
    idle = {"every": 1, "order": 1}  # noqa: RUF012

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, every: int, order: int) -> None:
        from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

        config = TaylorSeerCacheConfig(
            cache_interval=every,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[self.layers],
        )
        apply_taylorseer_cache(model, config)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of one module of diffusers: one a run would drown what a command shows."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
