"""The routers that are compared, by name: `make("hybrid-llm", embeddings, settings)`. See `base` for what they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from experiments.routing.baselines.learned import HybridLlm, RouteLlmBert, RouteLlmMatrix, Zooter
from experiments.routing.baselines.simple import NounCount, OracleDeltaP, OraclePrs, Random
from experiments.routing.baselines.token import ABLATIONS, TokenRouter
from experiments.routing.baselines.tree import BoostedTree
from experiments.routing.data import PromptRouter
from experiments.routing.embeddings import Embeddings
from relay.errors import BadRequest

ROUTERS: dict[str, Any] = {
    each.name: each
    for each in (
        Random, NounCount, RouteLlmBert, RouteLlmMatrix, HybridLlm, Zooter, BoostedTree, TokenRouter, OraclePrs, OracleDeltaP,
    )
}  # fmt: skip


def make(name: str, embeddings: Embeddings, settings: Mapping[str, Any]) -> PromptRouter:
    """A router that has learned nothing yet, with the given settings and its defaults for the rest."""
    cls = _class(name)
    takes = {each.name for each in fields(cls)}
    given = {"embeddings": embeddings} if "embeddings" in takes else {}
    return cls(**given, **settings)


def meaning(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the router would be fitted with, besides `settings`: its defaults, so far as they are plain values."""
    cls = _class(name)
    if hasattr(cls, "meaning"):
        return cls.meaning(settings)
    return {f.name: f.default for f in fields(cls) if isinstance(f.default, (int, float, str))}


def candidates(name: str, tries: int, seed: int = 0) -> list[dict[str, Any]]:
    """Settings to try: the defaults, then `tries` - 1 random draws from the router's space; one where it has none."""
    space: Mapping[str, Sequence[Any]] = getattr(_class(name), "SPACE", {})
    if not space:
        return [{}]
    rng = np.random.default_rng(seed)
    drawn: list[dict[str, Any]] = [{}]
    most = int(np.prod([len(values) for values in space.values()]))
    while len(drawn) < min(tries, most):
        one = {key: values[int(rng.integers(len(values)))] for key, values in space.items()}
        if one not in drawn:
            drawn.append(one)
    return drawn


def _class(name: str) -> Any:
    if name not in ROUTERS:
        raise BadRequest(f"no router is called '{name}'; routers: {', '.join(ROUTERS)}")
    return ROUTERS[name]


__all__ = ["ABLATIONS", "ROUTERS", "candidates", "make", "meaning"]
