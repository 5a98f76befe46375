"""The life of a job as an enum, with the table of what may follow what."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """accepted: in the ledger, not placed · placed: nodes were told · denoising: some leg is under way · decoding ·
    waiting: what it was placed on is gone, it will be placed again · done, failed, cancelled: the end."""

    ACCEPTED = "accepted"
    PLACED = "placed"
    DENOISING = "denoising"
    DECODING = "decoding"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return not ALLOWED[self]

    @property
    def under_way(self) -> bool:
        """Nodes have it."""
        return self in (Stage.PLACED, Stage.DENOISING, Stage.DECODING)


_ENDS = {Stage.FAILED, Stage.CANCELLED}
ALLOWED: dict[Stage, frozenset[Stage]] = {
    Stage.ACCEPTED: frozenset({Stage.PLACED, Stage.DONE} | _ENDS),
    Stage.PLACED: frozenset({Stage.DENOISING, Stage.DECODING, Stage.WAITING, Stage.DONE} | _ENDS),
    Stage.DENOISING: frozenset({Stage.DECODING, Stage.WAITING, Stage.DONE} | _ENDS),
    Stage.DECODING: frozenset({Stage.WAITING, Stage.DONE} | _ENDS),
    # a result that was on its way when its sender was given up still counts
    Stage.WAITING: frozenset({Stage.PLACED, Stage.DONE} | _ENDS),
    Stage.DONE: frozenset(),
    Stage.FAILED: frozenset(),
    Stage.CANCELLED: frozenset(),
}


class IllegalStage(AssertionError):
    """A job was sent from one stage to another that may not follow it: a defect of ours."""


def advance(before: Stage, after: Stage) -> Stage:
    """`after`, if it may follow `before` (or is the same and no end)."""
    if after not in ALLOWED[before] and (before is not after or before.ended):
        raise IllegalStage(f"{before} -> {after}")
    return after
