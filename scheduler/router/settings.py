"""What the router's modes stand for, which metrics it weighs and what it may spend: configs/router.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from relay.files import read_yaml
from relay.metrics.clip_quality import QUALITIES
from relay.scenes.judge import CATEGORIES

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "router.yaml"

MODES = ("full-cloud", "relay", "edge-only")  # the order of every axis over modes
FULL, RELAY, EDGE = range(3)
METRIC_SETS: dict[str, tuple[str, ...]] = {
    "clip": tuple(f"q_{quality}" for quality in QUALITIES),  # RouteT2I's ten, in the paper's order
    "scene": CATEGORIES,  # 1 or 0, nan where the prompt does not ask for it
}
MetricSet = Literal["clip", "scene"]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The relay that stands for the mode: s steps of the large member, n of the small one (None: the rest of T)."""

    handoff: Annotated[int, msgspec.Meta(ge=1)]
    small_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Shares(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Largest shares of requests that full-cloud and relay may take; `relay` 0 is RouteT2I's two-way setting."""

    full: Share = 0.5
    relay: Share = 0.0


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    references: dict[str, Reference]
    metrics: MetricSet = "clip"
    budget: Shares = Shares()


def read_settings(path: Path = CONFIG) -> Settings:
    """The settings; BadRequest names file and key."""
    return read_yaml(path, Settings)
