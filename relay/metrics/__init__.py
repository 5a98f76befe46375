"""What scores a picture: one interface over the scene judge, CLIP's qualities, LPIPS and the real families' metrics.

`load_metric` finds a metric by name, or one of your own as `package.module:Class`. A metric says in `missing()` what it
lacks before anything is loaded; models are loaded at the first `score`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from relay.errors import BadRequest, RelayError
from relay.metrics.missing import MissingModel
from relay.plugins import make

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BUILTIN", "Metric", "MissingModel", "load_metric", "score_all"]

BUILTIN = {
    "scene": "relay.metrics.scene:SceneMetric",
    "clip_quality": "relay.metrics.clip_quality:ClipQuality",
    "clip_score": "relay.metrics.clip_quality:ClipScore",
    "lpips": "relay.metrics.lpips:Lpips",
    "image_reward": "relay.metrics.real:ImageReward",
    "pick_score": "relay.metrics.real:PickScore",
    "aesthetic": "relay.metrics.real:Aesthetic",
    "ocr": "relay.metrics.ocr:Ocr",
}


@runtime_checkable
class Metric(Protocol):
    """Scores pictures (B, 3, H, W) float32 in 0..1 with their prompts, and with references where it needs them."""

    name: str
    needs_reference: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """The scores it yields, one column each."""
        ...

    def missing(self) -> str | None:
        """One line on what is not here and how to get it; None where it can score."""
        ...

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        """One number a picture and column; nan where a column does not apply to a prompt."""
        ...


def load_metric(name: str, **options: Any) -> Metric:
    """A metric by its name or as `package.module:Class`, made with the options; loads no model."""
    where = BUILTIN.get(name, name)
    if ":" not in where:
        raise BadRequest(f"no metric is called '{name}'; metrics: {', '.join(BUILTIN)}, or package.module:Class")
    return make("metric", name, Metric, options, where)


def score_all(
    metrics: Sequence[Metric],
    images: Tensor,
    prompts: Sequence[str],
    references: Tensor | None = None,
    *,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[float]]:
    """All columns of all metrics, batch by batch; `progress(pictures scored, of)` after each, every metric counting.

    What is missing is said before the first picture is scored.
    """
    if len(images) != len(prompts):
        raise BadRequest(f"{len(images)} images but {len(prompts)} prompts; give one prompt an image")
    columns = [column for metric in metrics for column in metric.columns]
    if twice := {c for c in columns if columns.count(c) > 1}:
        raise BadRequest(f"two metrics yield the column {', '.join(sorted(twice))}; leave one out")
    for metric in metrics:
        if metric.needs_reference and (references is None or references.shape != images.shape):
            raise BadRequest(f"{metric.name} needs a reference image of the same size for each image")
        if said := metric.missing():
            raise MissingModel(f"{metric.name}: {said}")
    scores: dict[str, list[float]] = {column: [] for column in columns}
    done, total = 0, len(images) * len(metrics)
    for metric in metrics:
        for i in range(0, len(images), batch):
            part = slice(i, i + batch)
            found = metric.score(images[part], prompts[part], None if references is None else references[part])
            for column in metric.columns:
                if len(found.get(column, ())) != len(images[part]):
                    raise RelayError(f"{metric.name} gave no number a picture for its column {column}")
                scores[column] += found[column]
            done += len(images[part])
            if progress:
                progress(done, total)
    return scores
