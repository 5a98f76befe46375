"""What `python -m experiments.routing table` reads: configs/experiments/routing.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from relay.files import read_yaml
from scheduler.router.settings import MetricSet

Count = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]


class Comparison(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Which routers are compared on which data. `tries`: settings that each learner may try on validation prompts."""

    runs: list[str]  # run folders with the outcomes
    families: Annotated[list[str], msgspec.Meta(min_length=1)]
    routers: Annotated[list[str], msgspec.Meta(min_length=1)]
    metrics: list[MetricSet] = msgspec.field(default_factory=lambda: ["clip", "scene"])
    ablations: list[str] = []  # of the token router, on the first metric set alone, with its settings
    seeds: Count = 5
    tries: Count = 8
    share: Share = 0.5  # of the prompts that may go to the large member
    targets: list[float] = msgspec.field(default_factory=lambda: [40, 50, 60, 70, 80])
    other_seeds: list[str] = []  # run folders with more seeds of the test prompts: what a prompt can tell at most
    curves: str = "docs/results/step-times"  # folder with measured step times, for the costs of the modes
    three_way: list[str] = []  # routers that say what each mode is worth
    budgets: list[Share] = msgspec.field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # of full-cloud
    folder: str = "runs/experiments/routing"


def read_comparison(path: Path) -> Comparison:
    """The config; BadRequest names file and key."""
    return read_yaml(path, Comparison)
