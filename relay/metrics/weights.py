"""Reads a state dict from disk without running anything that lies in it."""

from __future__ import annotations

from typing import Any

from relay.metrics.missing import MissingModel


def read_state(path: str) -> dict[str, Any]:
    """Names to tensors of a .safetensors file or a torch file, on the CPU; `MissingModel` with one line where it is none."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MissingModel(f"{path} cannot be read as a state dict: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MissingModel(f"{path} is not a state dict of tensors")
    return state
