"""The small member finishes its image; its latent is noised again and the large member finishes it once more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from experiments.baselines.base import Result, Setting, Stopwatch, call, generators, share
from relay import codecs
from relay.pipeline import RelayPipeline
from relay.sampling import walk_leg

if TYPE_CHECKING:
    from relay.family import Family


class ImageToImage:
    """SDEdit (Meng et al. 2022, arXiv 2108.01073), as diffusers' img2img pipelines do it, from the small member's latent.

    The noise added is the second draw of the image's own generator: the first one is in the image already. `strength` as
    in diffusers: the large member takes that share of its T steps.
    """

    name = "img2img"
    paper = "SDEdit, Meng et al. 2022, arXiv 2108.01073"
    note = (
        "from the small member's final latent, sent up in the family's codec, not decoded and encoded again; fresh noise"
        " from the image's own seed"
    )
    points = ((0.5, 0.25), (0.5, 0.5), (0.5, 0.75), (1.0, 0.25), (1.0, 0.5))  # share of T for the small one, strength

    def applies(self, family: Family) -> str | None:
        return None

    def settings(self, family: Family, steps: int | None = None) -> list[Setting]:
        total = steps or family.spec.members["large"].steps
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for small, strength in self.points:
            n, kept = share(total, small), min(share(total, strength), total - 1)
            program = RelayPipeline(family).plan(num_inference_steps=n, mode="edge-only")
            found[n, kept] = {"program": str(program), "steps": total, "kept": kept}
        return [
            Setting(f"{n} small steps, then the last {kept} of {total}", v, ("small", "large"))
            for (n, kept), v in found.items()
        ]  # fmt: skip

    @torch.inference_mode()
    def run(self, family: Family, prompts: list[str], seeds: list[int], setting: Setting) -> Result:
        first = call(family, prompts, seeds, setting.values["program"], output_type="latent")
        size = family.spec.sizes.default
        sigmas = family.schedules(size)["large"](setting.values["steps"]).sigmas[-setting.values["kept"] - 1 :]
        codec = family.spec.codec
        sent = codecs.decode(codecs.encode(first.images, codec), codec, first.images.shape)
        denoiser, guidance = family.denoiser("large"), family.spec.members["large"].guidance
        cond = family.text.encode(prompts, None, guidance > 1, size)
        watch = Stopwatch()
        with watch.running():
            latent = noised(family, sent, second_draw(family, seeds), sigmas[0])
            latent = walk_leg(denoiser, latent, sigmas, cond, guidance, member="large")
        images = family.decode(latent).cpu()
        family.free()
        took = first.steps | {"large": len(sigmas) - 1}
        return Result(images, sum(first.denoising_s.values()) + watch.seconds, took)


def second_draw(family: Family, seeds: list[int]) -> torch.Tensor:
    """Unit noise (B, C, h, w): what each image's generator gives after its starting noise."""
    made, size = generators(seeds), family.spec.sizes.default
    family.initial_noise(len(seeds), size, made)
    return family.initial_noise(len(seeds), size, made)


def noised(family: Family, clean: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """Clean latents brought to `sigma`, in the family's parameterisation."""
    kept = 1 - sigma if family.parameterisation == "flow" else 1.0
    return kept * clean + sigma * noise
