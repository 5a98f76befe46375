"""A relay without relay: diffusers' own pipelines, one for the prefix of a program and one for its suffix.

Each member is a stock StableDiffusion3Pipeline or StableDiffusionXLPipeline over the family's own modules. What a leg
walks is given to its scheduler as an explicit list of sigmas, so a prefix ends above 0 and a suffix starts there; all
else (time embedding, guidance, Euler step, decoding) is diffusers'. The prompt is encoded once, by the pipeline, and
given to both legs. Drawn alone the picture is ours (tests/experiments/test_diffusers_relay.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from relay.family import Family
from relay.matching import walk
from relay.program import Program
from relay.request import Job, draw_noise


@dataclass(frozen=True)
class Wanted:
    """One picture: a program of one leg, or of a large and a small one."""

    prompt: str
    seed: int
    program: str


class FlowWindow(FlowMatchEulerDiscreteScheduler):
    """Walks `window` (sigmas, the last one where the leg ends), whatever number of steps is asked for."""

    window: Sequence[float] = (1.0, 0.0)

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        self.sigmas = torch.tensor(self.window, dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index, self._begin_index = None, 0


class EpsilonWindow(EulerDiscreteScheduler):
    """As FlowWindow; latents come at the noise of `window[0]` and are not scaled again."""

    window: Sequence[float] = (1.0, 0.0)

    @property
    def init_noise_sigma(self) -> float:
        return 1.0

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, **_: Any) -> None:
        training = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().numpy()
        at = self._sigma_to_t(np.array(self.window[:-1]), np.log(training))
        self.sigmas = torch.tensor(self.window, dtype=torch.float32)
        self.timesteps = torch.tensor(at, dtype=torch.float32, device=device)
        self.num_inference_steps = len(self.timesteps)
        self._step_index, self._begin_index = None, 0


class DiffusersRelay:
    """`draw` makes one picture or a batch; all images are (3, H, W) in 0..1, as `Family.decode` gives them."""

    def __init__(self, family: Family):
        self.family = family
        self.members = {name: _pipeline(family, name) for name in ("large", "small")}

    @torch.inference_mode()
    def draw(self, wanted: Sequence[Wanted]) -> list[torch.Tensor]:
        """All in one batch as far as diffusers' pipelines allow: the prefix runs until its longest is done, and each
        latent is taken where its own prefix ends; suffixes are batches of those that walk the same sigmas. Programs of
        one schedule length, as `RelayPipeline.plan` makes them."""
        schedules = self.family.schedules(self.family.spec.sizes.default)
        texts = self._encode([w.prompt for w in wanted])
        latents: dict[int, torch.Tensor] = {}
        prefixes: dict[int, list[float]] = {}
        suffixes: dict[tuple[float, ...], list[int]] = defaultdict(list)
        for i, each in enumerate(wanted):
            program = Program.parse(each.program)
            job = Job(program, [each.prompt], None, self.family.spec.sizes.default)
            latents[i] = draw_noise(self.family, job, 1, None, each.seed, None)
            for leg, sigmas in walk(program, schedules):
                if leg.member == "large":
                    prefixes[i] = sigmas
                else:
                    suffixes[tuple(sigmas)].append(i)
        if prefixes:
            latents |= self._walk("large", max(prefixes.values(), key=len), prefixes, latents, texts)
        for shared, rows in suffixes.items():
            latents |= self._walk("small", list(shared), {i: list(shared) for i in rows}, latents, texts)
        return list(self.family.decode(torch.cat([latents[i] for i in range(len(wanted))])))

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        words: dict[str, Any] = {"prompt": prompts, "do_classifier_free_guidance": True}
        if self.family.spec.architecture == "sd3":
            words |= {"prompt_2": prompts, "prompt_3": prompts, "max_sequence_length": self.family.text.t5_tokens}
        found = self.members["large"].encode_prompt(**words)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, found, strict=True))

    def _walk(
        self, member: str, sigmas: list[float], own: dict[int, list[float]], latents: dict[int, torch.Tensor],
        texts: dict[str, torch.Tensor],
    ) -> dict[int, torch.Tensor]:  # fmt: skip
        """One batch of those in `own` over `sigmas`; each one's latent (1, C, h, w) where its own sigmas end."""
        pipeline, rows = self.members[member], list(own)
        pipeline.scheduler.window = sigmas
        taken: dict[int, torch.Tensor] = {}

        def on_step(_: Any, step: int, __: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for row, i in enumerate(rows):
                if len(own[i]) == step + 2:
                    taken[i] = kept["latents"][row : row + 1].clone()
            return {}

        width, height = self.family.spec.sizes.default
        pipeline(
            latents=torch.cat([latents[i] for i in rows]), num_inference_steps=len(sigmas) - 1, width=width, height=height,
            guidance_scale=self.family.spec.members[member].guidance, output_type="latent", callback_on_step_end=on_step,
            **{name: values[rows] for name, values in texts.items()},
        )  # fmt: skip
        return taken


def _pipeline(family: Family, member: str) -> Any:
    """diffusers' pipeline over the family's own modules."""
    import diffusers

    cls = getattr(diffusers, family.architecture.pipeline)
    name = family.architecture.denoiser
    window = FlowWindow if family.spec.architecture == "sd3" else EpsilonWindow
    own: dict[str, Any] = {
        name: getattr(family.denoiser(member), name), "vae": family.vae,
        "scheduler": window.from_config(family.scheduler_config(member)),
    }  # fmt: skip
    if family.spec.architecture == "sd3":  # not optional for diffusers, though an index may say null
        own |= dict.fromkeys(("text_encoder_3", "tokenizer_3")) if not family.text.t5_tokens else {}
    omitted = dict.fromkeys(family.spec.text.omit)
    theirs = cls.from_pretrained(family.spec.members["large"].repo, torch_dtype=torch.float32, **(omitted | own))
    theirs.set_progress_bar_config(disable=True)
    return theirs
