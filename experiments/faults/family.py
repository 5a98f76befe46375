"""The smallest family that runs through the whole service: the embedded texts and VAE, random members of one layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

NAME = "smallest-sd3"
PROMPT = "a red circle"


def smallest_family(folder: Path, impostor: bool = False) -> Path:
    """A family's YAML in `folder`. `impostor`: under the same name, and with another VAE: another latent space."""
    import diffusers
    import torch
    import yaml

    from relay.family_spec import CONFIGS, PACKAGE

    weights = PACKAGE / "weights" / "mini-sd3"
    shutil.copytree(weights, folder / "weights", ignore=shutil.ignore_patterns("transformer*", "curves", "*.md"))
    for i, part in enumerate(("transformer", "transformer_small")):
        config = json.loads((weights / part / "config.json").read_text())
        torch.manual_seed(i)
        one_layer = config | {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64}
        diffusers.SD3Transformer2DModel.from_config(one_layer).save_pretrained(folder / "weights" / part)
    if impostor:
        config = json.loads((weights / "vae" / "config.json").read_text())
        torch.manual_seed(9)
        getattr(diffusers, config["_class_name"]).from_config(config).save_pretrained(folder / "weights" / "vae")
    said = yaml.safe_load((CONFIGS / "mini-sd3.yaml").read_text())
    for member in said["members"].values():
        member |= {"repo": str(folder / "weights"), "steps": 4}
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump(said | {"name": NAME, "device": "cpu", "scenes": False}))
    return path
