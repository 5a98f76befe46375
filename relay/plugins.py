"""A class of one's own, named as `package.module:Class` in a config: imported, made with its options, and checked.

One loader for metrics, workloads, arrival processes and baselines. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from relay.errors import BadRequest


def make(kind: str, name: str, protocol: type, options: Mapping[str, Any], where: str | None = None) -> Any:
    """An instance of the class at `where` (default: `name`, as it was written) that has all that `protocol` asks for.

    BadRequest names the kind and the name: what cannot be imported, which options there are, what the class lacks.
    """
    module, _, attribute = (where or name).partition(":")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadRequest(f"{kind} {name} cannot be imported: {error}") from None
    try:
        made = cls(**options)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{kind} {name}: {error}; its options: {_options(cls)}") from None
    if lacking := [member for member in members(protocol) if not hasattr(made, member)]:
        interface = f"{protocol.__module__}.{protocol.__name__}"
        raise BadRequest(f"{name} is not a {kind}: it lacks {', '.join(lacking)} (see {interface})")
    return made


def members(protocol: type) -> list[str]:
    """What a protocol asks for: its attributes, then its methods and properties."""
    asked = [*vars(protocol).get("__annotations__", {}), *vars(protocol)]
    return [name for name in dict.fromkeys(asked) if not name.startswith("_")]


def _options(cls: Any) -> str:
    try:
        return ", ".join(inspect.signature(cls).parameters) or "none"
    except (TypeError, ValueError):  # a class without a signature to look at
        return "unknown"
