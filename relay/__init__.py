"""Relay inference: a large diffusion model starts, a small one of the same family finishes.

    from relay import RelayPipeline
    pipe = RelayPipeline.from_pretrained("mini-sd3")
    image = pipe("a red heart at the top left", num_inference_steps=28, handoff=14, seed=0).images[0]

Importing this package is cheap: torch and diffusers are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relay.cached import CachedStart
    from relay.errors import BadRequest, FamilyError, HandoffRefused, NonFiniteLatent, RelayError
    from relay.family import Family, find_family, list_families
    from relay.handoff import Handoff
    from relay.pipeline import RelayOutput, RelayPipeline
    from relay.program import Leg, Program

_HOME = {
    "BadRequest": "errors",
    "CachedStart": "cached",
    "Family": "family",
    "FamilyError": "errors",
    "Handoff": "handoff",
    "HandoffRefused": "errors",
    "Leg": "program",
    "NonFiniteLatent": "errors",
    "Program": "program",
    "RelayError": "errors",
    "RelayOutput": "pipeline",
    "RelayPipeline": "pipeline",
    "find_family": "family",
    "list_families": "family",
}
__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"relay.{_HOME[name]}"), name)
    raise AttributeError(f"module 'relay' has no attribute {name!r}")
