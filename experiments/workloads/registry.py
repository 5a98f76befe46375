"""Workloads by name: built-in ones, and `package.module:Class` of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from experiments.workloads.prompts import Workload
from experiments.workloads.scenes import Scenes
from experiments.workloads.texts import PRESETS, Dataset, File
from relay.errors import BadRequest
from relay.plugins import make

# Built-in name -> the options it stands for and the class that checks them.
WORKLOADS: dict[str, tuple[type, dict[str, Any]]] = {
    "scenes": (Scenes, {}),
    "letters": (Scenes, {"classes": ["letters"]}),
    "file": (File, {}),
    "dataset": (Dataset, {}),
    **{name: (Dataset, {"preset": name}) for name in PRESETS},
}


def load_workload(name_or_spec: str | Mapping[str, Any] | Workload, **options: Any) -> Workload:
    """A workload by name with its options, as a mapping with `workload: NAME`, or of one's own as `package.module:Class`.

    BadRequest names the workload and the option that is unknown, missing or wrong.
    """
    if isinstance(name_or_spec, Workload):
        return name_or_spec
    name, options = named(name_or_spec, "workload", options)
    if ":" in name:
        return make("workload", name, Workload, options)
    return build(WORKLOADS, name, "workload", options)


def named(spec: str | Mapping[str, Any], kind: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and options of a spec: a name, or a mapping whose key `kind` is the name."""
    if isinstance(spec, str):
        return spec, options
    values = dict(spec) | options
    name = values.pop(kind, None)
    if not isinstance(name, str):
        raise BadRequest(f"{kind}: a mapping needs the key `{kind}` with a name, not {name!r}")
    return name, values


def build(known: dict[str, tuple[type, dict[str, Any]]], name: str, kind: str, options: dict[str, Any]) -> Any:
    """A built-in one, its options checked by the types of its class."""
    if name not in known:
        raise BadRequest(f"unknown {kind} {name!r}: choose one of {', '.join(known)}, or package.module:Class")
    what, preset = known[name]
    own_name = {"name": name} if "name" in what.__struct_fields__ else {}  # type: ignore[attr-defined]
    plain = {key: str(value) if hasattr(value, "__fspath__") else value for key, value in options.items()}
    try:
        return msgspec.convert(own_name | preset | plain, what)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{kind} {name}: {error}") from None
