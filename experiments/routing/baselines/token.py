"""The token-level router of `scheduler.router` with the interface and the search of those it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from experiments.routing.baselines.base import GAMMAS, Floats
from experiments.routing.data import RoutingData, Split
from experiments.training.router import Recipe, RouteT2I, read

# The paper's three, as settings.
ABLATIONS: dict[str, dict[str, Any]] = {
    "no multi-metric": {"multi": False},
    "no token selection": {"select": False},
    "no dual gate": {"dual": False},
}
_SHAPE = ("width", "layers", "rank", "hidden", "top_k", "dropout", "select", "dual")


@dataclass
class TokenRouter:
    """Settings left None are the recipe's own."""

    gamma: float | None = None
    rate: float | None = None
    decay: float | None = None
    quality_weight: float | None = None
    width: int | None = None
    layers: int | None = None
    rank: int | None = None
    top_k: int | None = None
    dropout: float | None = None
    multi: bool | None = None
    select: bool | None = None
    dual: bool | None = None
    name = "token"
    capped = True
    SPACE: ClassVar[dict[str, Any]] = {
        "gamma": GAMMAS, "rate": (3e-4, 1e-3, 3e-3), "decay": (0.01, 0.1), "quality_weight": (0.0, 0.5),
        "width": (32, 64), "layers": (1, 2), "rank": (4, 8), "top_k": (3, 6, 12), "dropout": (0.1, 0.3),
    }  # fmt: skip

    def recipe(self) -> Recipe:
        """The training's recipe with what the settings say otherwise."""
        said = {key: value for key, value in vars(self).items() if value is not None and not key.startswith("_")}
        base = Recipe()
        shape = msgspec.structs.replace(base.shape, **{k: v for k, v in said.items() if k in _SHAPE})
        return msgspec.structs.replace(base, shape=shape, **{k: v for k, v in said.items() if k not in _SHAPE})

    @staticmethod
    def meaning(settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a cell is known by: a recipe whose defaults change is another cell only where they count."""
        return msgspec.to_builtins(TokenRouter(**settings).recipe())

    def fit(self, data: RoutingData, seed: int) -> None:
        self._router = RouteT2I(self.recipe())
        self._router.fit(data, seed)

    def score(self, split: Split) -> Floats:
        return self._router.score(split)

    def values(self, split: Split) -> Floats:
        """(N, 3): each mode's advantage over edge-only, 1/2 - PRS."""
        fitted, reader = self._router.fitted, self._router._reader
        assert fitted is not None
        assert reader is not None
        return fitted.trained.predict(read(reader, split.prompts)).advantage()
