"""Where a component's files lie and how they are read: local folders and the hub behind the same few functions.

Every failure is a `FamilyError` of one line: what is missing, where it was looked for, how to get it.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import msgspec

from relay.errors import FamilyError

if TYPE_CHECKING:
    import torch


Dtype = Literal["fp32", "fp16", "bf16"]
Offload = Literal["none", "model", "sequential"]

WEIGHTS = ("diffusion_pytorch_model", "model")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a component lies and how it runs; what is None falls back to the family, or to the large member."""

    repo: str | None = None  # hub id, local path, or embedded:NAME
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype | None = None
    device: str | None = None
    offload: Offload | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.repo or "").is_absolute()

    def __str__(self) -> str:
        return "/".join(part for part in (self.repo, self.subfolder) if part)


def read_json(part: Component, file: str) -> dict[str, Any]:
    """A config of a component."""
    path = _fetch(part, file)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FamilyError(f"{path} cannot be read: {error}") from None


def installed(part: Component) -> bool:
    """Whether a component's weights lie on this machine."""
    return bool(weight_files(part))


def weight_files(part: Component) -> list[Path]:
    """Its safetensors files on this machine, none where it is not (wholly) here."""
    if part.is_local:
        folder = Path(part.repo or "", part.subfolder or "")
        return sorted(f for f in folder.glob("*.safetensors") if _variant(part) in f.name)
    from huggingface_hub import try_to_load_from_cache

    names = [f"{stem}{_variant(part)}.safetensors" for stem in WEIGHTS]
    indexes = [f"{name}.index.json" for name in names]
    for name in names + indexes:
        found = try_to_load_from_cache(part.repo or "", _inside(part, name), revision=part.revision)
        if not isinstance(found, str):
            continue
        if name.endswith(".json"):
            shards = {
                Path(found).parent / shard for shard in json.loads(Path(found).read_text())["weight_map"].values()
            }
            return sorted(shards) if all(shard.exists() for shard in shards) else []
        return [Path(found)]
    return []


def download_bytes(part: Component) -> int | None:
    """Bytes that would have to be fetched: 0 where the weights are here, None where the hub cannot be asked."""
    if installed(part):
        return 0
    if part.is_local or not _hub_reachable():
        return None
    from huggingface_hub import HfApi

    try:
        files = (
            HfApi().model_info(part.repo or "", revision=part.revision, files_metadata=True, timeout=5).siblings or []
        )
    except Exception:  # offline, gated, gone: whatever it is, the size is not known
        return None
    folder = f"{part.subfolder}/" if part.subfolder else ""
    wanted = [
        f for f in files if f.rfilename.startswith(folder) and f.rfilename.endswith(f"{_variant(part)}.safetensors")
    ]
    return sum(f.size or 0 for f in wanted)


def load_model(cls: Any, part: Component, dtype: str) -> Any:
    """A model of `cls` (diffusers or transformers) from a component, on the CPU, in eval mode."""
    import torch

    def load() -> Any:
        return cls.from_pretrained(
            part.repo,
            subfolder=part.subfolder or "",
            revision=part.revision,
            variant=part.variant,
            torch_dtype=getattr(torch, DTYPES[dtype]),
            use_safetensors=True,  # never unpickle
        )

    return _or_family_error(part, load).eval()


def load_tokenizer(cls: Any, part: Component) -> Any:
    return _or_family_error(
        part, lambda: cls.from_pretrained(part.repo, subfolder=part.subfolder or "", revision=part.revision)
    )


def place(model: Any, device: torch.device, offload: str, hooks: list[Any]) -> Any:
    """Move a model to its device, or let accelerate fetch it there only while it runs."""
    if offload == "none" or device.type == "cpu":
        return model.to(device)
    from accelerate import cpu_offload, cpu_offload_with_hook

    if offload == "sequential":
        return cpu_offload(model, device)
    # like diffusers' sequence: a component that runs sends the one loaded before it back to the CPU
    model, hook = cpu_offload_with_hook(model, device, prev_module_hook=hooks[-1] if hooks else None)
    hooks.append(hook)
    return model


def vae_factor(config: dict[str, Any]) -> int:
    """Pixels per latent cell and side of a VAE's config (AutoencoderKL or AutoencoderTiny)."""
    blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


def _fetch(part: Component, file: str) -> Path:
    if part.is_local:
        path = Path(part.repo or "", part.subfolder or "", file)
        if not path.is_file():
            raise FamilyError(f"there is no {file} in {path.parent}: the folder is not a whole diffusers checkpoint")
        return path
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(part.repo or "", _inside(part, file), revision=part.revision)
    if isinstance(cached, str):
        return Path(cached)
    return Path(
        _or_family_error(part, lambda: hf_hub_download(part.repo or "", _inside(part, file), revision=part.revision))
    )


def _or_family_error(part: Component, load: Callable[[], Any]) -> Any:
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    reason = "the hub cannot be reached"
    try:
        if part.is_local or weight_files(part) or _hub_reachable():
            return load()
    except (OSError, ValueError, KeyError, HfHubHTTPError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    if part.is_local:
        raise FamilyError(f"{part} cannot be loaded: {reason}")
    raise FamilyError(
        f"{part} is not on this machine and was not fetched ({reason}); run `hf download {part.repo}` "
        "where there is a network, or name a local folder in the family's YAML"
    )


@cache
def _hub_reachable() -> bool:
    """Whether a connection to the hub opens at once: its client would retry for half a minute before it says no."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # a proxy may reach what we cannot
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=3).close()
    except OSError:
        return False
    return True


def _inside(part: Component, file: str) -> str:
    return f"{part.subfolder}/{file}" if part.subfolder else file


def _variant(part: Component) -> str:
    return f".{part.variant}" if part.variant else ""
