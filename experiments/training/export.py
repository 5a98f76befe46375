"""Write weights as a family folder ships them: half precision, atomically, with their provenance beside them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch


def save_half(model: Any, folder: Path, provenance: dict[str, Any], shard: str = "15MB") -> None:
    """`model.save_pretrained` in fp16 into `folder`, replaced in one step; provenance goes to `provenance.json`."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    half = copy.deepcopy(model).to("cpu", torch.float16)
    half.save_pretrained(partial, safe_serialization=True, max_shard_size=shard)
    _load_in_fp32(partial / "config.json")
    write_provenance(partial, provenance)
    replace_folder(partial, folder)


def _load_in_fp32(config: Path) -> None:
    """transformers loads in the dtype that a config names, diffusers in fp32: name fp32, or a plain pipeline is mixed."""
    values = json.loads(config.read_text())
    if "dtype" in values:
        config.write_text(json.dumps(values | {"dtype": "float32"}, indent=2) + "\n")


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def replace_folder(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.replace(old)
    partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
