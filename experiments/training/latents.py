"""The members' data set: scenes rendered and encoded once, in shards, so that a killed run goes on.

A shard is a function of (data version, seed, number, VAE): its scenes are drawn again from the seed, only the latents
are stored (fp16). Both families share it, since they share the VAE.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from relay.scenes.language import Scene
from relay.scenes.render import render
from relay.scenes.sampling import DATA_VERSION, sample_scene, split_of

SHARD = 4096


def shard_scenes(seed: int, number: int) -> tuple[list[Scene], np.random.Generator]:
    """The scenes of one shard as captioned (what a caption leaves open stays open), and the generator that draws them."""
    rng = np.random.default_rng((5, seed, number))
    scenes: list[Scene] = []
    while len(scenes) < SHARD:
        scene = sample_scene(rng)
        if split_of(scene) == "train":
            scenes.append(scene)
    return scenes, rng


@torch.inference_mode()
def load_latents(
    vae_folder: Path, work: Path, shards: int, seed: int, device: torch.device, say: Callable[[str], None]
) -> tuple[list[Scene], Tensor]:
    """Scenes and their latents (N, 8, 16, 16) fp16; makes the shards that are missing."""
    vae = AutoencoderTiny.from_pretrained(vae_folder, torch_dtype=torch.float32).to(device).eval()
    digest = hashlib.blake2b(
        (vae_folder / "diffusion_pytorch_model.safetensors").read_bytes(), digest_size=4
    ).hexdigest()
    folder = work / f"latents-v{DATA_VERSION}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    scenes: list[Scene] = []
    latents: list[Tensor] = []
    for number in range(shards):
        path = folder / f"{seed}-{number:04d}.pt"
        drawn, rng = shard_scenes(seed, number)
        if not path.exists():
            parts = []
            for i in range(0, SHARD, 128):
                images = render(drawn[i : i + 128], rng).to(device, memory_format=torch.channels_last)
                parts.append(vae.encoder(images).half().cpu())
            partial = path.with_suffix(f".part{torch.randint(1 << 30, ()).item()}")
            torch.save(torch.cat(parts), partial)
            partial.replace(path)
            say(f"latents: shard {number + 1} of {shards}")
        scenes += drawn
        latents.append(torch.load(path, weights_only=True))
    return scenes, torch.cat(latents)
