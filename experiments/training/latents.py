"""The members' data set: scenes rendered and encoded once, in shards, so that a killed run goes on.

A shard is a function of (data version, seed, number, VAE): its scenes are drawn again from the seed, only the latents
are stored (fp16). Both families share it, since they share the VAE. Shards are made when training first reaches them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from relay.files import replacing
from relay.scenes.language import Scene
from relay.scenes.render import render
from relay.scenes.sampling import DATA_VERSION, sample_scene, split_of

SHARD = 4096


class Latents:
    """Scenes as captioned (what a caption leaves open stays open) and their latents (N, 8, 16, 16) fp16."""

    def __init__(self, vae_folder: Path, work: Path, seed: int, device: torch.device, shard: int = SHARD):
        weights = (vae_folder / "diffusion_pytorch_model.safetensors").read_bytes()
        digest = hashlib.blake2b(weights, digest_size=4).hexdigest()
        self.folder, self.shard = work / f"latents-v{DATA_VERSION}-{digest}-{shard}", shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self.vae_folder, self.seed, self.device = vae_folder, seed, device
        self.scenes: list[Scene] = []
        self.shards: list[Tensor] = []

    def grow(self, shards: int) -> None:
        """Have at least so many shards at hand."""
        while len(self.shards) < shards:
            number = len(self.shards)
            scenes, rng = shard_scenes(self.seed, number, self.shard)
            path = self.folder / f"{self.seed}-{number:04d}.pt"
            if not path.exists():
                latents = self._encode(scenes, rng)
                with replacing(path) as partial:
                    torch.save(latents, partial)
            self.scenes += scenes
            self.shards.append(torch.load(path, weights_only=True))

    def pick(self, indices: np.ndarray) -> tuple[list[Scene], Tensor]:
        """Scenes and latents (B, 8, 16, 16) fp32 at these indices."""
        rows = [self.shards[i // self.shard][i % self.shard].float() for i in indices]
        return [self.scenes[i] for i in indices], torch.stack(rows)

    @torch.inference_mode()
    def _encode(self, scenes: list[Scene], rng: np.random.Generator) -> Tensor:
        vae = AutoencoderTiny.from_pretrained(self.vae_folder, torch_dtype=torch.float32).to(self.device).eval()
        parts = []
        for i in range(0, self.shard, 128):
            images = render(scenes[i : i + 128], rng).to(self.device, memory_format=torch.channels_last)
            parts.append(vae.encoder(images).half().cpu())
        return torch.cat(parts)


def shard_scenes(seed: int, number: int, count: int) -> tuple[list[Scene], np.random.Generator]:
    """The scenes of one shard, and the generator that draws what they leave open."""
    rng = np.random.default_rng((5, seed, number))
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if split_of(scene) == "train":
            scenes.append(scene)
    return scenes, rng
