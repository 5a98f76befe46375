"""Whether the nodes that name one family hold the same latent space, by the fingerprints that they register with.

A receiver checks the fingerprint of every latent before a byte of it is used; that would end each job that was placed
across two spaces in a failed try, and lets an edge-only picture of the wrong decoder pass. So who differs is not placed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Claim(NamedTuple):
    """A node says that it holds a family. `edge`: the operator's own machine, which counts for more than a user's."""

    node: str
    edge: bool
    fingerprint: dict[str, Any]


def foreign(claims: Sequence[Claim]) -> dict[str, str]:
    """Node -> why it is not of the family, for those who differ from the space of most edges, then of most nodes, then
    of who came first."""
    spaces: list[list[Claim]] = []
    for claim in claims:
        own = next((space for space in spaces if not _apart(space[0].fingerprint, claim.fingerprint)), None)
        if own is None:
            spaces.append([claim])
        else:
            own.append(claim)
    if len(spaces) < 2:
        return {}
    spaces.sort(
        key=lambda space: (sum(claim.edge for claim in space), len(space)), reverse=True
    )  # stable: first comes first
    (known, *_), *others = spaces
    return {
        claim.node: f"not the latent space of {known.node}: {_apart(known.fingerprint, claim.fingerprint)}"
        for space in others
        for claim in space
    }


def _apart(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """Why two fingerprints are of two latent spaces; None where they are of one."""
    if ours == theirs:
        return None
    import msgspec

    from relay.fingerprint import Fingerprint, compatible

    try:
        return compatible(msgspec.convert(ours, Fingerprint), msgspec.convert(theirs, Fingerprint))
    except msgspec.ValidationError as error:
        return f"a fingerprint that cannot be read: {error}"
