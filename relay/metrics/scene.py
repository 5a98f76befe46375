"""The scene judge behind the metrics' interface: does a picture show what its prompt asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import TYPE_CHECKING

from relay.metrics.missing import MissingModel
from relay.scenes.judge import CATEGORIES

if TYPE_CHECKING:
    from torch import Tensor


class SceneMetric:
    """`attributes`: share of what was asked that is right. `strict`: all right, nothing extra. GenEval's categories:
    1 or 0, nan where the prompt does not ask for it."""

    name = "scene"
    needs_reference = False
    columns = ("attributes", "strict", *CATEGORIES)

    def __init__(self, batch: int = 64):
        self.batch = batch

    def missing(self) -> str | None:
        from relay.scenes.detector import WEIGHTS

        return None if WEIGHTS.exists() else f"the judge is not at {WEIGHTS}; train it with `relay-train part judge`"

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        from relay.scenes.judge import judge
        from relay.scenes.language import parse

        if said := self.missing():
            raise MissingModel(said)
        verdicts = judge(images * 2 - 1, [parse(prompt) for prompt in prompts], self.batch)
        found = {"attributes": [v.attributes for v in verdicts], "strict": [float(v.strict) for v in verdicts]}
        for category in CATEGORIES:
            found[category] = [float(v.categories.get(category, nan)) for v in verdicts]
        return found
