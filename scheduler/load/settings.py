"""What `load:` says in a deployment, and what a simulation tunes: one structure for both.

load:
  deadline_s: 2.0          # the SLO that plans keep; a request's own deadline, where it says one, is kept as well
  margin: 0.9              # share of its deadline at which a request must be expected to end
  tenants: {acme: {share: 2, priority: 1}}
"""

from __future__ import annotations

from typing import Annotated

import msgspec

Positive = Annotated[float, msgspec.Meta(gt=0)]
Part = Annotated[float, msgspec.Meta(gt=0, le=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Inner = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class TenantShare(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`share`: its weight among those who ask. `priority`: while a higher one asks, the lower ones leave room for it."""

    share: Positive = 1.0
    priority: Annotated[int, msgspec.Meta(ge=0, le=9)] = 0


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the module; every number below is a default that `python -m experiments.load tune` may improve for a fleet."""

    deadline_s: Positive
    period_s: Positive = 1.0  # of control
    rise: Part = 0.7  # of the estimator, see scheduler.load.estimator
    fall: Part = 0.1
    arrivals_quantile: Inner = 0.9
    quantile: Inner = 0.99  # of requests that shall keep the deadline, in the queueing estimate
    variation: Positive = 0.5  # of arrivals and work, see scheduler.load.queueing.mean_wait
    margin: Part = 0.9
    tolerance: Share = 0.01  # predicted quality that another allowed level may lie below the assigned one
    classes: Annotated[int, msgspec.Meta(ge=1, le=32)] = 8  # of prompts, for the solver; 1: prompt-agnostic
    levels: str | None = None  # a file of measured levels (scheduler.load.prediction); None: the families' shipped ones
    tenants: dict[str, TenantShare] = {}
    reserve: Share = 0.2  # of the room, kept for higher priorities while they ask
    lend: Share = 0.5  # of the room that others leave unused, lent to who wants more than its share
    remembered_s: Positive = 10.0  # a tenant counts as asking for so long after its last request
