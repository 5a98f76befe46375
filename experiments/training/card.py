"""The model card beside a family's weights: where every part came from, and its curve."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from relay.scenes.sampling import DATA_VERSION

HEAD = """---
library_name: diffusers
license: apache-2.0
pipeline_tag: text-to-image
---
# {name}

{what} Trained from nothing on scenes that the project renders itself; it draws those scenes and nothing else. The
large member is this folder's pipeline, the small one lies beside it in `{small}` with `{scheduler}`. Half precision.

```python
{use}
```

Made by `relay-train family {name}` (or the parts below); the small member was trained alone and knows of no relay.
Data: scene language, renderer and splits of data version {version}; held-out scenes are kept apart by a hash of their
canonical caption. What the members are worth is measured in the project's README.

| part | parameters | samples seen | steps | minutes | batch loss at the end | held out | seed | precision, device | command |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
WHAT = {
    "mini-sd3": "A small text-to-image family in the manner of SD3: an MMDiT on a rectified flow.",
    "mini-sdxl": "A small text-to-image family in the manner of SDXL: an epsilon-predicting U-Net on Karras sigmas.",
}
USE = {
    "mini-sd3": """from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(folder)
image = pipe("a red heart at the top left", num_inference_steps=28, guidance_scale=3.0).images[0]
small = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer_small")
pipe = StableDiffusion3Pipeline.from_pretrained(folder, transformer=small)""",
    "mini-sdxl": """from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

pipe = StableDiffusionXLPipeline.from_pretrained(folder)
image = pipe("a red heart at the top left", num_inference_steps=26, guidance_scale=2.0).images[0]
small = UNet2DConditionModel.from_pretrained(folder, subfolder="unet_small")
own = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler_small")
pipe = StableDiffusionXLPipeline.from_pretrained(folder, unet=small, scheduler=own)""",
}
PARTS = {
    "mini-sd3": {
        "vae": "vae",
        "text_encoder": "text",
        "transformer": "mini-sd3-large",
        "transformer_small": "mini-sd3-small",
    },
    "mini-sdxl": {"vae": "vae", "text_encoder_2": "text", "unet": "mini-sdxl-large", "unet_small": "mini-sdxl-small"},
}


def write_card(weights: Path, name: str, work: Path) -> Path:
    """Write README.md and curves/ into the family's folder; curves of runs that are not at hand stay as they are."""
    folder = weights / name
    rows = []
    for part, run in PARTS[name].items():
        log = folder / "curves" / f"{run}.csv"
        if (work / run / "curve.csv").exists():
            log.parent.mkdir(exist_ok=True)
            shutil.copy(work / run / "curve.csv", log)
        if (folder / part / "provenance.json").exists():
            rows.append(_row(folder / part, json.loads((folder / part / "provenance.json").read_text()), log))
    small = "transformer_small" if name == "mini-sd3" else "unet_small"
    text = HEAD.format(
        name=name, what=WHAT[name], small=small, scheduler="scheduler_small", use=USE[name], version=DATA_VERSION
    )
    card = folder / "README.md"
    card.write_text(text + "\n".join(rows) + "\n\nCurves over steps and minutes: `curves/`.\n")
    return card


def _row(folder: Path, facts: dict[str, Any], log: Path) -> str:
    held_out = ", ".join(f"{k} {v:g}" for k, v in facts["figures"].items())
    cells = [
        folder.name, f"{_parameters(folder) / 1e6:.2f} M", f"{facts['samples']:,}", f"{facts['steps']:,}",
        f"{facts['minutes']:g}", _last_loss(log), held_out, str(facts["seed"]),
        f"{facts['precision']}, {facts['device']}, {facts['threads']} thread(s)", f"`{facts['command']}`",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _parameters(folder: Path) -> int:
    from math import prod

    from safetensors import safe_open

    count = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            count += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    return count


def _last_loss(log: Path) -> str:
    """Mean of the last ten logged batch losses."""
    if not log.exists():
        return "not logged"
    with log.open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)][-10:]
    return f"{sum(losses) / len(losses):.4g}" if losses else "not logged"
