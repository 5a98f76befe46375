"""What a metric needs and does not find, said in one line before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from relay.errors import RelayError


class MissingModel(RelayError):
    """A metric's model or package is not here; the message says how to get it."""


def absent(path: str | Path, file: str, what: str) -> str | None:
    """None where `path` is a folder with `file` or a hub id in the local cache, else one line."""
    if Path(path).is_dir():
        if (Path(path) / file).exists():
            return None
        return f"{path} is a folder but not {what}: it has no {file}"
    if str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        return f"{what} is not at {path}; give the path of a downloaded folder or a hub id"
    if hub_file(path, file):
        return None
    return f"{what} {path} is not in the Hugging Face cache; fetch it with `hf download {path}` or give a local path"


def hub_file(path: str | Path, file: str) -> Path | None:
    """A file of a local folder or of a hub id's cached snapshot; asks no network."""
    if Path(path).is_dir():
        found = Path(path) / file
        return found if found.exists() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(path), file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def no_package(name: str, how: str) -> str | None:
    """None where a package can be imported, else one line."""
    return None if importlib.util.find_spec(name) else f"the package {name} is not installed; {how}"


def no_file(path: str | Path | None, what: str, how: str) -> str | None:
    """None where `path` is a file, else one line."""
    if path is None:
        return f"{what} is not given; {how}"
    return None if Path(path).is_file() else f"{what} is not at {path}; {how}"


def all_missing(*said: str | None) -> str | None:
    """Everything that is missing in one line, so that it can be fetched in one go; None where nothing is."""
    return "; and ".join(filter(None, said)) or None
