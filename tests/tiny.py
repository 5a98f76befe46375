"""Tiny checkpoints with random weights: real diffusers and transformers classes, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ["<pad>", "<unk>", "a", "red", "blue", "circle", "square", "and", "blurry", "on", "green", "grey"]
PROMPT, OTHER, NEGATIVE = "a red circle", "a blue square and a green circle", "blurry grey"
SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDXL_SCHEDULERS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
}
DENOISER = {"sdxl": "unet", "sd3": "transformer"}


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", model_max_length=8)


def text_encoder(cls: Any) -> Any:
    return cls(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=8,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
        )
    ).eval()


def vae(seed: int = 0, **config: Any) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **({"scaling_factor": 0.5} | config),
    ).eval()


def unet(seed: int, width: int = 8, **config: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        norm_num_groups=4,
        **config,
    ).eval()


def transformer(seed: int, heads: int = 2, **config: Any) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    options = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": heads,
        "joint_attention_dim": 32,
        "caption_projection_dim": 8 * heads,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 24,
    }
    return SD3Transformer2DModel(**(options | config)).eval()


def build_sdxl(folder: Path) -> Path:
    """Large in `unet`, small in `unet_small`; schedulers of every spacing beside them."""
    torch.manual_seed(1)
    StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet(2),
        scheduler=EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS["leading"]),
        add_watermarker=False,
    ).save_pretrained(folder)
    unet(3, width=4).save_pretrained(folder / "unet_small")
    for name, options in SDXL_SCHEDULERS.items():
        EulerDiscreteScheduler(**SDXL_NOISE, **options).save_pretrained(folder / f"scheduler_{name}")
    EulerDiscreteScheduler(**SDXL_NOISE, **SDXL_SCHEDULERS["karras"]).save_pretrained(folder / "scheduler_small")
    return folder


def build_sd3(folder: Path, *, t5: bool = False) -> Path:
    """Large in `transformer`, small in `transformer_small`, one schedule of shift 3."""
    torch.manual_seed(1)
    t5_config = T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06),
        text_encoder=text_encoder(CLIPTextModelWithProjection),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection),
        text_encoder_3=T5EncoderModel(t5_config).eval() if t5 else None,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer() if t5 else None,
        transformer=transformer(2),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    transformer(3, heads=1).save_pretrained(folder / "transformer_small")
    return folder


def write_family(path: Path, folder: Path, architecture: str, *, large: dict | None = None, small: dict | None = None,
                 **options: Any) -> Path:  # fmt: skip
    """A family's YAML over a tiny folder; by default `small` is the folder's small member."""
    base = {"repo": str(folder), "guidance": 3.0, "steps": 4}
    small_folder = f"{DENOISER[architecture]}_small"
    description = {
        "name": path.stem,
        "architecture": architecture,
        "members": {"large": base | (large or {}), "small": base | {"subfolder": small_folder} | (small or {})},
        "sizes": {"default": [32, 32]},
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(description | options))
    return path
