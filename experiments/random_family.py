"""A family of random weights at a given size: what relay's own code runs on where only time and memory are asked.

It reads no file but the family's YAML. Its pictures are noise.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import diffusers
import msgspec
import torch
import transformers

from experiments.real_sizes import Config, Sizes
from relay.checkpoints import DTYPES, Component
from relay.conditioning import Conditioning
from relay.denoisers import Denoiser
from relay.family import Family, find_family
from relay.family_spec import Sizes as ImageSizes

CLIP_TOKENS = 77
T5_TOKENS = 256  # diffusers' default for SD3


class RandomFamily(Family):
    """`Family` whose configs are data and whose models are drawn, on the device and in the dtype they run in."""

    def __init__(self, name: str, sizes: Sizes, dtype: str, device: str):
        spec = find_family(name)
        super().__init__(msgspec.structs.replace(spec, sizes=ImageSizes(default=sizes.size)), "all", dtype, device)
        self.sizes = sizes
        self._check_configs()

    @cached_property
    def vae_config(self) -> Config:
        return self.sizes.vae

    def denoiser_config(self, member: str) -> Config:
        self.member(member)
        return self.sizes.denoisers[member]

    def scheduler_config(self, member: str) -> Config:
        return self.sizes.scheduler

    @cache  # noqa: B019 - as in `Family`
    def members_share_latent_space(self) -> None:
        """Nothing to check: one VAE is drawn for both."""

    def denoiser(self, member: str) -> Denoiser:
        if member not in self._denoisers:
            source = self.member(member)
            cls = getattr(diffusers, self.architecture.model)
            model = build(cls, self.denoiser_config(member), self.dtype(source), self.device(source))
            self._denoisers[member] = self.wrap(member, model)
        return self._denoisers[member]

    @cached_property
    def text(self) -> Any:
        return RandomText(self)

    def _load_vae(self, source: Component, dtype: str) -> Any:
        return build(diffusers.AutoencoderKL, self.sizes.vae, dtype, self.device(source))

    def _place(self, model: Any, source: Component) -> Any:
        return model.to(self.device(source))  # the YAML may ask for offloading, which would be timed as well


class RandomText:
    """Random prompt embeddings of the family's real shape, where a family has its text encoders."""

    def __init__(self, family: Family):
        config = family.denoiser_config("large")
        self.is_sd3 = family.spec.architecture == "sd3"
        self.t5_tokens = (family.spec.text.t5_tokens or T5_TOKENS) if self.is_sd3 else 0
        self.tokens = CLIP_TOKENS + self.t5_tokens
        if self.is_sd3:
            self.width, self.pooled = config["joint_attention_dim"], config["pooled_projection_dim"]
        else:  # SDXL's added embedding is the pooled one beside six embedded time ids
            self.width = config["cross_attention_dim"]
            added = config["projection_class_embeddings_input_dim"]
            self.pooled = added - 6 * config["addition_time_embed_dim"]
        self.device = family.device(family.spec.text)
        self.dtype = getattr(torch, DTYPES[family.dtype(family.spec.text)])
        self._draw = cache(self._drawn)  # drawn once, or every run would be charged for it

    def encode(
        self, prompts: Sequence[str], negative: Sequence[str] | None, guidance: bool, size: tuple[int, int]
    ) -> Conditioning:
        """The same embeddings for every prompt."""

        def draw(seed: int, *shape: int) -> torch.Tensor:
            return self._draw(seed, *shape).repeat(len(prompts), *[1] * len(shape))

        time_ids = None
        if not self.is_sd3:
            width, height = size
            row = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            time_ids = row.repeat(len(prompts), 1).to(self.device)
        return Conditioning(
            draw(0, self.tokens, self.width),
            draw(1, self.pooled),
            draw(2, self.tokens, self.width) if guidance else None,
            draw(3, self.pooled) if guidance else None,
            time_ids,
        )

    def _drawn(self, seed: int, *shape: int) -> torch.Tensor:
        one = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
        return one.to(self.device, self.dtype)


def diffusers_call(family: RandomFamily, member: str, steps: int, noise: torch.Tensor) -> Callable[[], torch.Tensor]:
    """diffusers' own pipeline over the very weights, embeddings and noise of one member."""
    cls = getattr(diffusers, family.architecture.pipeline)
    denoiser = family.denoiser(member)
    config = family.scheduler_config(member)
    # diffusers decodes in the latents' dtype, or upcasts an fp16 VAE by itself
    vae = family.vae if family.vae.dtype == denoiser.dtype else copy.deepcopy(family.vae).to(denoiser.dtype)
    absent = [name for name in inspect.signature(cls.__init__).parameters if name.startswith(("text_enc", "tokenizer"))]
    theirs = cls(
        vae=vae,
        scheduler=getattr(diffusers, config["_class_name"]).from_config(config),
        **{family.architecture.denoiser: getattr(denoiser, family.architecture.denoiser)},
        **dict.fromkeys(absent),
    )
    theirs.set_progress_bar_config(disable=True)
    cond = family.text.encode([""], None, True, family.spec.sizes.default)
    width, height = family.spec.sizes.default
    words: dict[str, Any] = {
        "prompt_embeds": cond.prompt_embeds,
        "pooled_prompt_embeds": cond.pooled,
        "negative_prompt_embeds": cond.negative_embeds,
        "negative_pooled_prompt_embeds": cond.negative_pooled,
        "num_inference_steps": steps,
        "guidance_scale": family.spec.members[member].guidance,
        "width": width,
        "height": height,
        "output_type": "pt",
    }
    return lambda: theirs(latents=noise.to(denoiser.dtype), **words).images


def build(cls: Any, config: Config, dtype: str, device: torch.device) -> Any:
    """A model with the class's default random weights, drawn on the device and in the dtype: never twice in memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, DTYPES[dtype]))
    try:
        with device:
            torch.manual_seed(0)
            model = cls.from_config(config) if hasattr(cls, "from_config") else cls(_text_config(cls, config))
    finally:
        torch.set_default_dtype(before)
    return model.to(getattr(torch, DTYPES[dtype])).eval().requires_grad_(False)


def parameters(cls: Any, config: Config) -> tuple[int, int]:
    """Parameters of a model, and numbers in its checkpoint (with tables that are not trained); takes no memory."""
    with torch.device("meta"):  # accelerate's init_empty_weights would still compute SD3's table of positions
        model = cls.from_config(config) if hasattr(cls, "from_config") else cls(_text_config(cls, config))
    trained = sum(parameter.numel() for parameter in model.parameters())
    return trained, sum(tensor.numel() for tensor in model.state_dict().values())


def _text_config(cls: Any, config: Config) -> Any:
    kind = transformers.T5Config if cls is transformers.T5EncoderModel else transformers.CLIPTextConfig
    return kind(**config)
