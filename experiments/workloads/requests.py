"""Timed requests: prompts at arrival times, each with what its asker wants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec
import numpy as np

from experiments.workloads.arrivals import Arrivals, Times
from experiments.workloads.prompts import Prompt, Workload, generator
from relay.errors import BadRequest

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


class TimedRequest(msgspec.Struct, frozen=True):
    """One request as it reaches the gateway."""

    index: int
    arrival_s: float  # from the start of the workload
    prompt: Prompt
    preference: float  # 0: quality is all, 1: speed is all, as everywhere
    deadline_s: float | None  # after the arrival; None: whenever
    seed: int  # of the image


class Demands(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What askers want: preference uniform in its range, deadline log-uniform in its range of s (None: no deadline).

    `with_deadline` is the share of requests that have one.
    """

    preference: tuple[Share, Share] = (0.0, 1.0)
    deadline_s: tuple[Positive, Positive] | None = None
    with_deadline: Share = 1.0

    def __post_init__(self) -> None:
        for key in ("preference", "deadline_s"):
            bounds = getattr(self, key)
            if bounds is not None and not bounds[0] <= bounds[1]:
                raise BadRequest(f"demands: {key} must go from low to high, not {bounds[0]} to {bounds[1]}")
        if self.deadline_s is not None and self.deadline_s[0] <= 0:
            raise BadRequest(f"demands: deadline_s must be above 0, not {self.deadline_s[0]}")

    def preferences(self, count: int, seed: int) -> Times:
        """Preferences in 0..1."""
        return generator(seed, "preferences").uniform(*self.preference, size=count)

    def deadlines(self, count: int, seed: int) -> Times:
        """Deadlines in s after the arrival; infinite where there is none."""
        if self.deadline_s is None:
            return np.full(count, np.inf)
        low, high = np.log(self.deadline_s)
        drawn = np.exp(generator(seed, "deadlines").uniform(low, high, size=count))
        return np.where(generator(seed, "has deadline").random(count) < self.with_deadline, drawn, np.inf)


def requests(
    workload: Workload,
    arrivals: Arrivals,
    horizon_s: float,
    *,
    split: str = "train",
    seed: int = 0,
    pool: int = 200,
    demands: Demands | None = None,
) -> Iterator[TimedRequest]:
    """Requests of `horizon_s` seconds in the order they arrive; same arguments, same requests.

    Prompts are drawn with equal chance, with repeats, from `pool` different prompts of the split. BadRequest before the first.
    """
    demands = demands or Demands()
    times = arrivals.times(horizon_s, seed)
    prompts = workload.prompts(split, pool, seed)
    count = len(times)
    which = generator(seed, "choice").integers(len(prompts), size=count)
    image_seeds = generator(seed, "image seeds").integers(2**31, size=count)
    columns = (times, which, demands.preferences(count, seed), demands.deadlines(count, seed), image_seeds)
    return (
        TimedRequest(
            i, float(time), prompts[int(k)], float(preference), None if np.isinf(late) else float(late), int(own)
        )
        for i, (time, k, preference, late, own) in enumerate(zip(*columns, strict=True))
    )
