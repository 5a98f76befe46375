"""Policies that do not learn, by name: what a learned one must beat."""

from __future__ import annotations

from typing import Any

from relay.errors import BadRequest
from scheduler.policy import Policy

NAMES = ("fixed", "round-robin", "least-finish-time")


def load_policy(name: str, **options: Any) -> Policy:
    """A policy by name with its options; BadRequest where there is none."""
    from scheduler.baselines.fixed import Fixed
    from scheduler.baselines.least_finish_time import LeastFinishTime
    from scheduler.baselines.round_robin import RoundRobin

    makers: dict[str, Any] = {"fixed": Fixed, "round-robin": RoundRobin, "least-finish-time": LeastFinishTime}
    if name not in makers:
        raise BadRequest(f"unknown policy {name!r}: choose one of {', '.join(NAMES)}")
    try:
        return makers[name](**options)
    except TypeError as error:
        raise BadRequest(f"policy {name}: {error}") from None
