"""The requests of a simulated run: stored prompts at arrival times, and a mix of prompts that may change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from experiments.simulate.scores import Scores, Stored
from experiments.workloads import Demands, TimedRequest, load_arrivals, requests
from relay.errors import BadRequest

Classes = Sequence[str] | None


class Asking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who asks. `arrivals` and `demands` as in experiments.workloads; `pool`: prompts of a split, None for all."""

    arrivals: dict[str, Any]
    demands: Demands = Demands()
    pool: int | None = None
    classes: tuple[str, ...] | None = None


def stream(
    asking: Asking, scores: Scores, split: str, count: int, seed: int, then: tuple[int, Classes] | None = None
) -> list[TimedRequest]:
    """The first `count` requests; same arguments, same requests. `then`: from that request on, prompts of these classes."""
    first = _drawn(asking, scores, split, count, seed, asking.classes)
    if then is None:
        return first
    at, classes = then
    return first[:at] + _drawn(asking, scores, split, count, seed, classes)[at:]


def _drawn(asking: Asking, scores: Scores, split: str, count: int, seed: int, classes: Classes) -> list[TimedRequest]:
    workload = Stored(scores, tuple(classes) if classes is not None else None)
    here = [p for p in scores.prompts.get(split, ()) if classes is None or p.complexity in classes]
    pool = min(asking.pool or len(here), len(here))
    arrivals = load_arrivals(asking.arrivals)
    horizon, before = 1.1 * count / asking.arrivals.get("rate_per_s", 1.0) + 1.0, -1
    while True:
        # A longer horizon adds arrivals but draws other prompts for none: counts differ, streams by purpose do not.
        found = list(
            requests(workload, arrivals, horizon, split=split, seed=seed, pool=max(pool, 1), demands=asking.demands)
        )
        if len(found) >= count:
            return found[:count]
        if len(found) == before:
            raise BadRequest(f"the arrival process has {len(found)} arrivals, and {count} requests are asked for")
        horizon, before = 2 * horizon, len(found)
