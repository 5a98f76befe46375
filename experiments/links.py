"""The links of a config, each with the sizes that its messages are charged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from scheduler.links import LinkProfile, find_link
from scheduler.message_sizes import MessageSizes, computed_sizes, real_sizes

if TYPE_CHECKING:
    from relay.family_spec import FamilySpec


def link_for(entry: Any, spec: FamilySpec, mini_step_s: float | None) -> tuple[LinkProfile, MessageSizes]:
    """A config's link, and the sizes that its messages are charged. In `scaled: {real_step_s: ..., source: ...}` the mini
    step is left to what this run measured; `real_step_s` may be one number, or one a family; `stands_for` names the real
    family whose sizes count where this one's name does not say it.
    """
    if not isinstance(entry, dict) or "scaled" not in entry:
        return find_link(entry), computed_sizes(spec)
    scaled = dict(entry["scaled"])
    stands_for = scaled.pop("stands_for", spec.name)
    if isinstance(real := scaled.get("real_step_s"), dict):
        if spec.name not in real:
            raise BadRequest(f"link {entry.get('name', entry.get('like'))}: scaled.real_step_s has no {spec.name}")
        scaled["real_step_s"] = real[spec.name]
    if "mini_step_s" not in scaled:
        if mini_step_s is None:
            raise BadRequest("a scaled link needs the step time at batch 1: put 1 into times.curve")
        scaled["mini_step_s"] = mini_step_s
    return find_link(entry | {"scaled": scaled}), real_sizes(stands_for)
