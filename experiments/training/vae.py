"""The families' autoencoder: diffusers' `AutoencoderTiny`, 64x64x3 -> 16x16x8, trained on rendered scenes.

A little noise on the latent stands where a KL term would: it makes neighbouring latents decode alike. Between encoder
and decoder a per-channel standardisation (BatchNorm without gain) is trained along; on export it is folded into the
encoder's last convolution, so pipelines that know only one scalar scaling factor (1.0 here) see standardised latents.
The decoder clamps its input softly (3 tanh(z / 3)), so nothing could be folded into *its* side exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from experiments.training.export import save_half
from relay.scenes.language import Scene
from relay.scenes.render import render
from relay.scenes.sampling import held_out, sample_scene, split_of

CHANNELS, LATENT_CHANNELS, LATENT_NOISE = 48, 8, 0.05


def build_vae() -> AutoencoderTiny:
    return AutoencoderTiny(
        in_channels=3,
        out_channels=3,
        encoder_block_out_channels=(CHANNELS,) * 3,
        decoder_block_out_channels=(CHANNELS,) * 3,
        num_encoder_blocks=(0, 2, 3),
        num_decoder_blocks=(3, 2, 0),
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def training_images(step: int, seed: int, batch: int, stream: int) -> Tensor:
    """Images (batch, 3, 64, 64) of training scenes; a function of (stream, seed, step) alone."""
    rng = np.random.default_rng((stream, seed, step))
    scenes: list[Scene] = []
    while len(scenes) < batch:
        scene = sample_scene(rng)
        if split_of(scene) == "train":
            scenes.append(scene)
    return render(scenes, rng)


class VaeTask:
    name = "vae"
    learning_rate = 1.5e-3
    batch_size = 32

    def __init__(self, folders: list[Path], seed: int):
        vae = build_vae().to(memory_format=torch.channels_last)
        norm = nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.02, eps=1e-5)
        self.modules: dict[str, Any] = {"vae": vae, "norm": norm}
        self.folders, self.seed = folders, seed
        self.clean = render(held_out(320, "validation"), np.random.default_rng(7))

    def loss(self, step: int, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        images = training_images(step, self.seed, self.batch_size, stream=1)
        images = images.to(device).contiguous(memory_format=torch.channels_last)
        vae, norm = self.modules["vae"], self.modules["norm"]
        latent = norm(vae.encoder(images).float())
        out = vae.decoder(latent + LATENT_NOISE * torch.randn_like(latent)).float()
        error = (out - images).square().mean()
        return error + 0.05 * (out - images).abs().mean(), {"mse": error.item()}

    @torch.inference_mode()
    def validate(self, modules: dict[str, Any]) -> dict[str, float]:
        vae = fold_standardisation(modules["vae"], self.clean)
        latents = vae.encoder(self.clean.contiguous(memory_format=torch.channels_last))
        out = torch.cat([vae.decoder(chunk) for chunk in latents.split(64)])
        spread = latents.std((0, 2, 3))
        return {
            "mse": (out - self.clean).square().mean().item(),
            "mse_clamped": (out.clamp(-1, 1) - self.clean).square().mean().item(),
            "least_spread": spread.min().item(),
            "largest_latent": latents.abs().max().item(),
        }

    def load_shipped(self, weights: Path) -> None:
        shipped = AutoencoderTiny.from_pretrained(weights / self.folders[0].name / "vae", torch_dtype=torch.float32)
        self.modules["vae"].load_state_dict(shipped.state_dict())

    def export(self, modules: dict[str, Any], provenance: dict[str, Any]) -> None:
        vae = fold_standardisation(modules["vae"], self.clean)
        for folder in self.folders:
            save_half(vae, folder / "vae", provenance)
            config = folder / "vae" / "config.json"
            # The class writes this key and then warns of it on loading; it sets it by itself.
            kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "block_out_channels"}
            config.write_text(json.dumps(kept, indent=2) + "\n")


@torch.no_grad()
def fold_standardisation(trained: nn.Module, images: Tensor) -> AutoencoderTiny:
    """A CPU copy whose encoder gives (z - mean) / std per channel, measured on `images` (B, 3, 64, 64)."""
    vae = build_vae().to(memory_format=torch.channels_last)
    vae.load_state_dict(trained.state_dict())
    latents = torch.cat([vae.encoder(chunk) for chunk in images.split(64)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    last = vae.encoder.layers[-1]
    last.weight.div_(std[:, None, None, None])
    last.bias.sub_(mean).div_(std)
    return vae.eval()
