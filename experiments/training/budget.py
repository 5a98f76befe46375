"""How long, from which seed and where a training run runs; light, so that the command line can name it at once."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Budget:
    """`total_minutes`: horizon of the learning-rate schedule. `minutes`: length of this piece (default: all that is left)."""

    total_minutes: float
    minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    validate_every: float = 4.0
    command: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
