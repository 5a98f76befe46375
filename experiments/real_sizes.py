"""The real architectures as data: the config values of the published checkpoints, and a tiny form of each.

Sources, the repositories' own files: stabilityai/stable-diffusion-xl-base-1.0 and segmind/Segmind-Vega (`unet`, `vae`,
`text_encoder*`, `scheduler`), stabilityai/stable-diffusion-3.5-large and -medium (`transformer`, `vae`,
`text_encoder*`, `scheduler`). Only what differs from the class's default or fixes a shape is listed. Vega's U-Net was
read from ComfyUI's table of U-Nets (transformer depths 0, 1, 2 down, the same up, no attention in the middle) and
agrees with the published count. Values of weights are no part of this: a step's time does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """What a member's parameter count is checked against."""

    parameters: float
    source: str


@dataclass(frozen=True)
class Sizes:
    """What a family is built from: configs by component, classes by name."""

    denoisers: dict[str, Config]  # by member, of the architecture's denoiser class
    vae: Config
    scheduler: Config
    text: dict[str, tuple[str, Config]]  # encoder -> transformers class, config
    published: dict[str, Published]
    size: tuple[int, int] = (1024, 1024)  # pixels: width, height


_UNET: Config = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),  # diffusers' old name for the number of heads: 64 channels a head
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SDXL_UNET = _UNET | {"transformer_layers_per_block": (1, 2, 10)}
_VEGA_UNET = _UNET | {
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [0, [1, 1], [2, 2]],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
}

_MMDIT: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
_SD35_LARGE = _MMDIT | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_SD35_MEDIUM = _MMDIT | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),  # Medium alone attends over the image a second time
}

_VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "force_upcast": True,
}
_SDXL_VAE = _VAE | {"latent_channels": 4, "scaling_factor": 0.13025}
_SD3_VAE = _VAE | {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

_CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
_CLIP_G: Config = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}
_T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

# Vega's own scheduler config says the same.
_EULER: Config = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_FLOW: Config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

SIZES = {
    "sdxl-vega": Sizes(
        denoisers={"large": _SDXL_UNET, "small": _VEGA_UNET},
        vae=_SDXL_VAE,
        scheduler=_EULER,
        text={"CLIP-L": ("CLIPTextModel", _CLIP_L), "CLIP-bigG": ("CLIPTextModelWithProjection", _CLIP_G)},
        published={
            "large": Published(2.57e9, "U-Net of SDXL base, arXiv 2307.01952 (2.6 B), 5.14 GB in fp16"),
            "small": Published(0.74e9, "U-Net of Segmind-Vega, arXiv 2401.02677"),
        },
    ),
    "sd35": Sizes(
        denoisers={"large": _SD35_LARGE, "small": _SD35_MEDIUM},
        vae=_SD3_VAE,
        scheduler=_FLOW,
        text={
            "CLIP-L": ("CLIPTextModelWithProjection", _CLIP_L),
            "CLIP-bigG": ("CLIPTextModelWithProjection", _CLIP_G),
            "T5-XXL": ("T5EncoderModel", _T5_XXL),
        },
        published={
            "large": Published(8.06e9, "SD3.5 Large without its position table (announced: 8.1 B)"),
            "small": Published(2.24e9, "SD3.5 Medium without its position table of 0.23 B (announced: 2.5 B)"),
        },
    ),
}


def tiny(sizes: Sizes) -> Sizes:
    """The same classes and block structure, small enough for tests on one CPU thread. Its figures mean nothing."""

    def denoiser(config: Config) -> Config:
        if "block_out_channels" in config:
            depths = config["transformer_layers_per_block"]
            return config | {
                "sample_size": 16,
                "block_out_channels": (32, 64, 64),
                "attention_head_dim": (2, 2, 2),
                "cross_attention_dim": 32,
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 16 + 6 * 8,
                "transformer_layers_per_block": (1, 1, 2) if depths == (1, 2, 10) else depths,
            }
        dual = {"dual_attention_layers": (0,)} if "dual_attention_layers" in config else {}
        heads = 2 if dual else 4
        return config | dual | {
            "sample_size": 16,
            "num_layers": 2,
            "num_attention_heads": heads,
            "attention_head_dim": 8,
            "caption_projection_dim": 8 * heads,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 24,
        }  # fmt: skip

    def encoder(config: Config) -> Config:
        if "d_model" in config:
            return config | {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        width = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
        return config | width | {"num_hidden_layers": 1, "num_attention_heads": 2}

    vae = {
        "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "sample_size": 32,
    }  # fmt: skip
    return replace(
        sizes,
        denoisers={member: denoiser(config) for member, config in sizes.denoisers.items()},
        vae=sizes.vae | vae,
        text={name: (cls, encoder(config)) for name, (cls, config) in sizes.text.items()},
        published={},
        size=(32, 32),
    )
