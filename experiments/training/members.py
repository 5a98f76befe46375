"""The members: a large and a small denoiser a family, each trained alone. The small one knows of no relay.

`mini-sd3`: diffusers' `SD3Transformer2DModel`, rectified flow (Esser et al. 2024), sigma logit-normal.
`mini-sdxl`: diffusers' `UNet2DConditionModel`, epsilon prediction on SDXL's beta schedule. A plain epsilon loss fails at
high noise, where the picture hides in a small part of the noise; weight 1 + sigma^2 makes it the loss of a
v-prediction (Salimans & Ho 2022, "SNR + 1" weighting).
Both see exactly what diffusers' pipelines feed: `hidden_states[-2]` of the frozen text encoders, padded, no mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from experiments.training.export import save_half
from experiments.training.latents import SHARD, Latents
from relay.scenes.judge import judge
from relay.scenes.sampling import caption, held_out

SHARDS = 16  # 65,536 scenes
T5_TOKENS = 256  # what StableDiffusion3Pipeline appends (as zeros) when there is no T5 and nothing is said
CAPTION_DROPOUT = 0.1
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)


def build_transformer(layers: int, heads: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=heads,
        caption_projection_dim=64 * heads,
        joint_attention_dim=160,
        pooled_projection_dim=160,
        pos_embed_max_size=24,
    )


def build_unet(
    channels: tuple[int, int], layers: int, heads: tuple[int, int], everywhere: bool
) -> UNet2DConditionModel:
    """Cross-attention at the low resolution: `everywhere` in each of its blocks, else in the middle alone, twice.

    `attention_head_dim` counts heads in this class (a known misnomer).
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D" if everywhere else "DownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D" if everywhere else "UpBlock2D", "UpBlock2D"),
        attention_head_dim=heads,
        transformer_layers_per_block=(1, 1 if everywhere else 2),
        cross_attention_dim=128,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=128 + 6 * 8,
        norm_num_groups=8,
    )


BUILD = {
    "mini-sd3/large": lambda: build_transformer(7, 3),
    "mini-sd3/small": lambda: build_transformer(2, 2),
    "mini-sdxl/large": lambda: build_unet((64, 128), 2, (1, 2), everywhere=True),
    "mini-sdxl/small": lambda: build_unet((32, 64), 1, (1, 1), everywhere=False),
}
PART = {"mini-sd3": "transformer", "mini-sdxl": "unet"}
# Chosen on 120 validation prompts after training (docs/results/schedules.md). Scenes are decided at lower noise than
# photographs: schedules that waste few steps above that draw the large member's pictures as well, and by the same step
# a relay has more of what only the large member can do.
SCHEDULERS = {
    "mini-sd3/large": FlowMatchEulerDiscreteScheduler(shift=0.3),
    "mini-sd3/small": FlowMatchEulerDiscreteScheduler(shift=0.3),
    "mini-sdxl/large": EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        use_karras_sigmas=True, sigma_max=4.0,
    ),
    "mini-sdxl/small": EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
    ),
}  # fmt: skip
GUIDANCE = {"mini-sd3": 3.0, "mini-sdxl": 2.0}
STEPS = {"mini-sd3": 28, "mini-sdxl": 25}


def spread_normal(count: int, generator: torch.Generator) -> Tensor:
    """Standard normal draws, one from each of `count` equally likely strata, shuffled: each batch meets every noise level.

    The low-discrepancy draw of Kingma et al. 2021 (Variational Diffusion Models, appendix I.1): less variance a step.
    """
    strata = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    return torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))


class MemberTask:
    def __init__(self, family: str, member: str, weights: Path, work: Path, seed: int, quick: bool = False):
        self.name = f"{family}/{member}"
        self.family, self.member, self.seed, self.weights = family, member, seed, weights
        self.flow, self.quick = family == "mini-sd3", quick
        self.batch_size = 64
        self.learning_rate = 1e-3
        self.muon_learning_rate = 2e-3
        self.folder = weights / family
        denoiser = BUILD[self.name]()
        if not self.flow:
            denoiser = denoiser.to(memory_format=torch.channels_last)
        self.modules: dict[str, nn.Module] = {"denoiser": denoiser}
        encoders = ("text_encoder", "text_encoder_2") if self.flow else ("text_encoder_2",)
        self.encoders = [
            CLIPTextModelWithProjection.from_pretrained(self.folder / e, torch_dtype=torch.float32).eval()
            for e in encoders
        ]
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer_2")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data, self.shards = (
            Latents(self.folder / "vae", work, 0, device, 256 if quick else SHARD),
            1 if quick else SHARDS,
        )
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.log_sigmas = (0.5 * ((1 - alphas) / alphas).log()).float()
        self.write_index()

    def muon_parameters(self) -> list[nn.Parameter]:
        """The matrices inside the blocks but the modulation's, whose inputs are one vector a sample."""
        if not self.flow:
            return []
        blocks = self.modules["denoiser"].transformer_blocks.named_parameters()  # type: ignore[union-attr]
        return [p for n, p in blocks if p.ndim == 2 and "norm" not in n]

    # --- one step ---

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng((6, self.seed, step))
        torch_rng = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        # Every new scene is met once before the old ones come again.
        shards = min(self.shards, 1 + step * self.batch_size // self.data.shard)
        self.data.grow(shards)
        scenes, clean = self.data.pick(rng.integers(shards * self.data.shard, size=self.batch_size))
        captions, clean = [caption(scene, rng) for scene in scenes], clean.to(device)
        noise = torch.randn(clean.shape, generator=torch_rng).to(device)
        dropped = torch.rand(self.batch_size, generator=torch_rng) < CAPTION_DROPOUT
        if self.flow:
            captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        states, pooled = self.encode(captions, device)
        if not self.flow:  # StableDiffusionXLPipeline feeds zeros for an absent negative prompt
            keep = (~dropped).to(device, states.dtype)
            states, pooled = states * keep[:, None, None], pooled * keep[:, None]
        loss = self._flow_loss if self.flow else self._epsilon_loss
        return loss(clean, noise, states, pooled, torch_rng, rng), {}

    @torch.no_grad()
    def encode(self, captions: list[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Token states (B, 40, D) and pooled (B, P), as diffusers' `encode_prompt` makes them."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        outs = [e.to(device)(ids.to(device), output_hidden_states=True) for e in self.encoders]
        return torch.cat([o.hidden_states[-2] for o in outs], -1), torch.cat([o.text_embeds for o in outs], -1)

    def _flow_loss(self, clean, noise, states, pooled, torch_rng, rng) -> Tensor:  # noqa: ANN001
        sigma = torch.sigmoid(0.3 + spread_normal(len(clean), torch_rng)).to(clean.device)
        # Zero tokens of an absent T5: mostly none, now and then some, now and then as many as the pipeline's default.
        # They are all alike, so a quarter of the batch is enough to learn to look past them.
        kind = rng.random()
        if kind > 0.86:
            part = len(clean) // 4
            clean, noise, states, pooled, sigma = (t[:part] for t in (clean, noise, states, pooled, sigma))
            extra = T5_TOKENS if kind > 0.92 else int(rng.integers(1, T5_TOKENS))
            states = torch.cat([states, states.new_zeros(part, extra, states.shape[-1])], 1)
        s = sigma[:, None, None, None]
        noisy = (1 - s) * clean + s * noise
        velocity = self.modules["denoiser"](
            noisy, encoder_hidden_states=states, pooled_projections=pooled, timestep=sigma * 1000, return_dict=False
        )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def _epsilon_loss(self, clean, noise, states, pooled, torch_rng, rng) -> Tensor:  # noqa: ANN001
        count = len(clean)
        drawn = 0.2 + 1.3 * spread_normal(count, torch_rng)
        by_sigma = torch.searchsorted(self.log_sigmas, drawn.clamp(self.log_sigmas[0], self.log_sigmas[-1])).clamp(
            max=999
        )
        uniform = torch.randint(1000, (count,), generator=torch_rng)
        time = torch.where(torch.rand(count, generator=torch_rng) < 0.15, uniform, by_sigma)
        sigma = self.log_sigmas[time].exp().to(clean.device)
        s = sigma[:, None, None, None]
        noisy = ((clean + s * noise) / (s**2 + 1).sqrt()).contiguous(memory_format=torch.channels_last)
        added = {"text_embeds": pooled, "time_ids": clean.new_tensor([TIME_IDS]).expand(count, -1)}
        epsilon = self.modules["denoiser"](
            noisy, time.to(clean.device), states, added_cond_kwargs=added, return_dict=False
        )[0]
        error = (epsilon.float() - noise).square().mean((1, 2, 3))
        return (error * (1 + sigma**2)).mean()

    # --- held out, and out ---

    def validate(self, modules: dict[str, nn.Module]) -> dict[str, float]:
        """Validation prompts through diffusers' own pipeline, judged: attributes right and strict, per class."""
        count = 5 if self.quick else 500 if torch.cuda.is_available() else 60
        scenes = held_out(count, "validation")
        rng = np.random.default_rng(17)
        captions = [caption(scene, rng) for scene in scenes]
        pipe = self.pipeline(modules["denoiser"])
        verdicts = []
        for i in range(0, count, 20):
            noise = [torch.Generator().manual_seed(i + j) for j in range(len(captions[i : i + 20]))]
            extra: dict[str, Any] = {"max_sequence_length": 0} if self.flow else {}
            images = pipe(
                captions[i : i + 20],
                num_inference_steps=STEPS[self.family],
                guidance_scale=GUIDANCE[self.family],
                generator=noise,
                output_type="pt",
                height=64,
                width=64,
                **extra,
            ).images
            verdicts += judge(images.float().cpu() * 2 - 1, scenes[i : i + 20])
        share = count // 5
        figures = {
            "attributes": sum(v.attributes for v in verdicts) / count,
            "strict": sum(v.strict for v in verdicts) / count,
        }
        for k, name in enumerate("1234L"):
            some = verdicts[k * share : (k + 1) * share]
            figures[f"attributes_{name}"] = sum(v.attributes for v in some) / share
        return figures

    def pipeline(self, denoiser: nn.Module) -> StableDiffusion3Pipeline | StableDiffusionXLPipeline:
        device = next(denoiser.parameters()).device
        vae = AutoencoderTiny.from_pretrained(self.folder / "vae", torch_dtype=torch.float32)
        if self.flow:
            pipe = StableDiffusion3Pipeline(
                transformer=denoiser, scheduler=SCHEDULERS[self.name], vae=vae, text_encoder=self.encoders[0],
                tokenizer=self.tokenizer, text_encoder_2=self.encoders[1], tokenizer_2=self.tokenizer, text_encoder_3=None,
                tokenizer_3=None,
            )  # fmt: skip
        else:
            pipe = StableDiffusionXLPipeline(
                unet=denoiser, scheduler=SCHEDULERS[self.name], vae=vae, text_encoder=None, tokenizer=None,
                text_encoder_2=self.encoders[0], tokenizer_2=self.tokenizer, add_watermarker=False,
            )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    def load_shipped(self, weights: Path) -> None:
        part = PART[self.family] + ("_small" if self.member == "small" else "")
        live: Any = self.modules["denoiser"]
        shipped = type(live).from_pretrained(weights / self.family / part, torch_dtype=torch.float32)
        live.load_state_dict(shipped.state_dict())

    def export(self, modules: dict[str, nn.Module], provenance: dict[str, Any]) -> None:
        part = PART[self.family] + ("_small" if self.member == "small" else "")
        save_half(modules["denoiser"], self.folder / part, provenance)

    def write_index(self) -> None:
        """`model_index.json` and the scheduler configs: what makes the folder an ordinary diffusers checkpoint."""
        for member in ("large", "small"):
            name = "scheduler" + ("_small" if member == "small" else "")
            SCHEDULERS[f"{self.family}/{member}"].save_pretrained(self.folder / name)
        tokenizer = ["transformers", "PreTrainedTokenizerFast"]
        encoder = ["transformers", "CLIPTextModelWithProjection"]
        index: dict[str, Any] = {"_diffusers_version": "0.42.1", "vae": ["diffusers", "AutoencoderTiny"]}
        if self.flow:
            index |= {
                "_class_name": "StableDiffusion3Pipeline",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "transformer": ["diffusers", "SD3Transformer2DModel"],
                "text_encoder": encoder, "tokenizer": tokenizer, "text_encoder_2": encoder, "tokenizer_2": tokenizer,
                "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": tokenizer,
                "image_encoder": [None, None], "feature_extractor": [None, None],
            }  # fmt: skip
        else:
            index |= {
                "_class_name": "StableDiffusionXLPipeline",
                "scheduler": ["diffusers", "EulerDiscreteScheduler"],
                "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": [None, None], "tokenizer": [None, None],
                "text_encoder_2": encoder, "tokenizer_2": tokenizer,
                "image_encoder": [None, None], "feature_extractor": [None, None],
                "force_zeros_for_empty_prompt": True,
            }  # fmt: skip
        (self.folder / "model_index.json").write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n")
