"""DeepCache and T-GATE, each through its authors' own package (the `experiments` extra).

An idea is reported under its paper's name only where the paper's own code ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from experiments.baselines.base import Result, Setting, Stopwatch, full_cloud, generators, share
from experiments.baselines.cached import LargeLeg, large_module, untouched
from relay.program import Program

if TYPE_CHECKING:
    from relay.family import Family


def _missing(module: str, pin: str) -> str | None:
    if find_spec(module):
        return None
    return f"the package {module} is not installed: pip install {pin}"


class DeepCache:
    """The U-Net's deep features are kept for some steps and only its shallow layers run (Ma et al. 2024, arXiv 2312.00858).

    The package's own helper patches the U-Net. It asks a pipeline for the U-Net and the timesteps only, so our own loop
    runs it; it wants one timestep for the whole batch, so a pre-hook gives it the batch's one.
    """

    name = "deepcache"
    paper = "DeepCache, Ma et al. 2024, arXiv 2312.00858"
    note = "the package DeepCache 0.1.1, uniform skipping"
    points = {  # noqa: RUF012
        f"every {every} steps, branch {branch}": {"every": every, "branch": branch}
        for every, branch in ((2, 0), (3, 0), (5, 0), (3, 1), (5, 1))
    }
    early: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    idle = {"every": 1, "branch": 0}  # noqa: RUF012

    def applies(self, family: Family) -> str | None:
        if family.spec.architecture != "sdxl":
            return "DeepCache keeps the deep features between a U-Net's skip connections: a transformer has none"
        return _missing("DeepCache", "DeepCache==0.1.1")

    def prepare(self, family: Family, leg: LargeLeg) -> None:
        """Nothing to measure beforehand."""

    @contextmanager
    def on(self, family: Family, leg: LargeLeg, options: dict[str, Any]) -> Iterator[None]:
        from DeepCache import DeepCacheSDHelper

        unet: Any = large_module(family)
        denoiser: Any = family.denoiser("large")
        times = denoiser.timestep(torch.tensor(leg.sigmas[:-1]))
        helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=times)))
        helper.set_params(cache_interval=options["every"], cache_branch_id=options["branch"])
        handle = unet.register_forward_pre_hook(lambda _, args: (args[0], args[1][0], *args[2:]))
        with untouched(unet):
            helper.enable()
            try:
                yield
            finally:
                handle.remove()


class TGate:
    """Cross-attention is fixed, and guidance dropped, from a gate step on (Zhang et al. 2024, arXiv 2404.02747).

    The schedule of what is cached when is a loop of the package's own, `tgate`, over diffusers' pipeline: it runs here on
    the family's very U-Net with our embeddings and noise, and its loop's time is the denoising time.
    """

    name = "t-gate"
    paper = "T-GATE, Zhang et al. 2024, arXiv 2404.02747"
    note = "the package tgate 1.0.0 in its own loop; no guidance after the gate step"
    shares = (0.3, 0.4, 0.5, 0.6, 0.75)

    def applies(self, family: Family) -> str | None:
        if family.spec.architecture != "sdxl":
            return "tgate 1.0.0 has loops for SD, SDXL, PixArt and SVD, none for SD3: joint attention has no cross-attention"
        return _missing("tgate", "tgate==1.0.0") or _missing("DeepCache", "DeepCache==0.1.1 (tgate imports it)")

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        total = steps or family.spec.members["large"].steps
        program = str(full_cloud(family, total))
        # 5, 1 and 2 are the package's own defaults for SDXL's self-attention
        rest = {"sp_interval": 5, "fi_interval": 1, "warm_up": 2}
        gates = dict.fromkeys(share(total, part) for part in self.shares)
        return [Setting(f"gate at {g} of {total}", {"program": program, "gate_step": g} | rest) for g in gates]

    def idle(self, family: Family, steps: int | None = None) -> Setting:
        """A gate and a warm-up that never end."""
        program = full_cloud(family, steps)
        never = program.legs[0].steps_total + 2
        values = {"gate_step": never, "sp_interval": 1, "fi_interval": 1, "warm_up": never}
        return Setting("nothing cached", {"program": str(program)} | values)

    @torch.inference_mode()
    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        options = dict(setting.values)
        program = Program.parse(options.pop("program"))
        size, guidance = family.spec.sizes.default, program.guidance[0]
        unet: Any = large_module(family)
        cond = family.text.encode(prompts, None, guidance > 1, size).to(family.denoiser("large").device, unet.dtype)
        embeds = {
            "prompt_embeds": cond.prompt_embeds,
            "pooled_prompt_embeds": cond.pooled,
            "negative_prompt_embeds": cond.negative_embeds,
            "negative_pooled_prompt_embeds": cond.negative_pooled,
        }
        noise = family.initial_noise(len(seeds), size, generators(seeds)).to(cond.pooled)
        pipe = self._pipeline(family, unet)
        watch = Stopwatch()
        with untouched(unet), watch.running():
            latent = pipe.tgate(
                num_inference_steps=program.steps["large"], guidance_scale=guidance, latents=noise,
                width=size[0], height=size[1], output_type="latent", **embeds, **options,
            ).images  # fmt: skip
        images = family.decode(latent).cpu()
        family.free()
        return Result(images, watch.seconds, program.steps)

    def _pipeline(self, family: Family, unet: torch.nn.Module) -> Any:
        """diffusers' SDXL pipeline over the family's own U-Net, with the package's loop on it."""
        import diffusers
        from tgate import TgateSDXLLoader

        scheduler = diffusers.EulerDiscreteScheduler.from_config(family.scheduler_config("large"))
        parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipe = diffusers.StableDiffusionXLPipeline(**parts, unet=unet, scheduler=scheduler, add_watermarker=False)
        pipe.set_progress_bar_config(disable=True)
        return TgateSDXLLoader(pipe)
