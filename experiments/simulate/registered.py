"""What the nodes of a running service measured of themselves, as a simulation wants it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments.simulate.world import Costs
from relay.family_spec import find_family
from scheduler.decision_log import read_log
from scheduler.message_sizes import computed_sizes

if TYPE_CHECKING:
    from nodes.fleet import Fleet

HANDOFF_S = 0.0005


def registered_costs(running: Fleet, family: str, paces: Mapping[str, float]) -> Costs:
    """The family's step-time curves that these nodes registered (means over those of a member, pace taken out), and their
    encoding and decoding; from the latest decision, so some request must have been decided. `paces`: node -> its pace."""
    states = list(read_log(running.store / "decisions.db"))[-1].context.nodes
    found = find_family(family)
    curves: dict[str, dict[int, list[float]]] = {}
    for state in states.values():
        for member, curve in state.curves.get(found.name, {}).items():
            for size, seconds in curve.items():
                curves.setdefault(member, {}).setdefault(int(size), []).append(seconds / paces[state.name])
    sizes = computed_sizes(found)
    return Costs(
        curves={m: {size: statistics.mean(each) for size, each in sorted(c.items())} for m, c in curves.items()},
        encode_s=statistics.mean(state.encode_s for state in states.values()),
        decode_s=statistics.mean(state.decode_s for state in states.values()),
        handoff_s=HANDOFF_S, latent_bytes=sizes.latent, image_bytes=sizes.image,
    )  # fmt: skip
