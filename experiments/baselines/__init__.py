"""Baselines to compare relays with, on the same models, prompts, seeds, noise and guidance.

`load_baseline(name)` gives one, `NAMES` lists the built-in ones, `table(family)` says which of them a family takes and why
it does not take the others. Names import nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from relay.plugins import make

if TYPE_CHECKING:
    from experiments.baselines.base import Baseline
    from relay.family import Family

__all__ = ["NAMES", "load_baseline", "table"]

_PROGRAMS = {
    "fewer-steps": "programs:FewerSteps",
    "small-first": "programs:SmallFirst",
    "img2img": "img2img:ImageToImage",
    "t-gate": "packages:TGate",
    "sada": "absent:Sada",
}
_CACHES = {
    "deepcache": "packages:DeepCache",
    "pyramid-attention": "hooks:PyramidAttention",
    "faster-cache": "hooks:FasterCache",
    "taylorseer": "hooks:TaylorSeer",
    "mag-cache": "mag_cache:MagCache",
    "first-block-cache": "absent:FirstBlockCache",
    "sea-cache": "absent:SeaCache",
    "text-kv-cache": "absent:TextKVCache",
}
NAMES = (*_PROGRAMS, *_CACHES, *(f"relay+{name}" for name in _CACHES))


def load_baseline(name: str) -> Baseline:
    """A baseline by its name, or a class of one's own by `package.module:Class`. BadRequest where there is none."""
    if ":" in name:
        from experiments.baselines.base import Baseline

        return make("baseline", name, Baseline, {})
    if name in _PROGRAMS:
        return _make(_PROGRAMS[name])
    relay, _, cache = name.rpartition("+")
    if cache not in _CACHES or relay not in ("", "relay"):
        raise BadRequest(f"unknown baseline {name!r}: known are {', '.join(NAMES)}, or package.module:Class")
    from experiments.baselines.cached import Cached, RelayCached

    made = _make(_CACHES[cache])
    return RelayCached(made) if relay else Cached(made)


def _make(where: str) -> Any:
    module, _, cls = where.partition(":")
    return getattr(import_module(f"{__name__}.{module}"), cls)()


def table(family: Family, names: tuple[str, ...] = NAMES) -> str:
    """Markdown: each baseline with its paper and its operating points on this family, or the reason why it has none."""
    lines = [f"| baseline | on {family.name} | what it is |", "| --- | --- | --- |"]
    for name in names:
        baseline = load_baseline(name)
        reason = baseline.applies(family)
        told = "; ".join(setting.label for setting in baseline.settings(family)) if reason is None else f"no: {reason}"
        what = f"{baseline.paper} ({baseline.note})" if baseline.note else baseline.paper
        lines.append(f"| {name} | {told} | {what} |")
    return "\n".join(lines)
