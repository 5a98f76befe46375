"""MagCache on the large member, with the calibration that it needs for every checkpoint and schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.baselines.base import call, full_cloud
from experiments.baselines.cached import LargeLeg, large_module
from experiments.baselines.hooks import Clock, HookCache, hooked

if TYPE_CHECKING:
    import torch

    from relay.family import Family


def _points(*pairs: tuple[float, int]) -> dict[str, dict[str, Any]]:
    return {
        f"threshold {threshold:g}, {skips} in a row": {"threshold": threshold, "skips": skips}
        for threshold, skips in pairs
    }


class MagCache(HookCache):
    """All blocks are skipped, their last residual added, while the residual's magnitude is known to change little.

    MagCache (Ma et al. 2025, arXiv 2506.09045). The magnitude ratios belong to a checkpoint and a schedule: they are
    calibrated once, on prompts of no test, and that run's time is not counted.
    """

    name = "mag-cache"
    paper = "MagCache, Ma et al. 2025, arXiv 2506.09045"
    note = "ratios calibrated once per checkpoint and schedule on four fixed prompts, outside the measured time"
    reasons = {  # noqa: RUF012
        "sdxl": "apply_mag_cache skips a model's row of transformer blocks, and UNet2DConditionModel has none:"
        " 'No transformer blocks found to apply hooks'",
    }
    points = _points((0.06, 3), (0.12, 3), (0.03, 2), (0.24, 5), (0.4, 8))
    early = _points((0.12, 3), (0.24, 5))
    idle = {"threshold": -1.0, "skips": 0}  # noqa: RUF012
    prompts = (
        "a large red heart at the top left and a small blue circle at the bottom, on a yellow background",
        "a small green square",
        "a large blue circle",
        "two small red circles",
    )

    def __init__(self) -> None:
        self._ratios: dict[tuple[str, int, float], list[float]] = {}

    def prepare(self, family: Family, leg: LargeLeg) -> None:
        """The calibration, where it is not done yet."""
        self.ratios(family, leg)

    def apply(self, family: Family, model: torch.nn.Module, clock: Clock, *, threshold: float, skips: int) -> None:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache

        leg = clock.leg
        config = MagCacheConfig(
            threshold=threshold,
            max_skip_steps=skips,
            num_inference_steps=leg.steps_total,
            mag_ratios=self.ratios(family, leg),
        )
        apply_mag_cache(model, config)

    def ratios(self, family: Family, leg: LargeLeg) -> list[float]:
        """Residual magnitude of each step of the schedule over the step before, measured on first use."""
        key = (family.spec.members["large"].repo or family.name, leg.steps_total, leg.guidance)
        if key not in self._ratios:
            self._ratios[key] = self._calibrate(family, leg.steps_total)
        return self._ratios[key]

    def _calibrate(self, family: Family, total: int) -> list[float]:
        from diffusers.hooks import MagCacheConfig, apply_mag_cache
        from diffusers.hooks.mag_cache import _MAG_CACHE_BLOCK_HOOK

        # One step more than are walked: at the last step diffusers would print the ratios and forget them.
        config = MagCacheConfig(calibrate=True, num_inference_steps=total + 1)
        program = full_cloud(family, total)
        leg, model, count = LargeLeg.of(family, program), large_module(family), len(self.prompts)
        with hooked(family, leg, lambda model, _: apply_mag_cache(model, config)):
            call(family, list(self.prompts), range(count), program, output_type="latent")
            tail: Any = model.transformer_blocks[-1]  # type: ignore[index]
            state = tail._diffusers_hook.get_hook(_MAG_CACHE_BLOCK_HOOK).state_manager.get_state()
            return list(state.calibration_ratios)
