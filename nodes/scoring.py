"""One picture's scores: what the judge process and a device that scores its own pictures both do.

A family that draws scenes is scored by the scene judge (GenEval's categories; `letters` is RISE's whole-word accuracy),
by the ten CLIP qualities, and by `clip_own`, the CLIP score of our own small model, named so because it is not OpenAI's.
Any other family is scored by the metrics that the config names. What could not be scored is said, never zero.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from nodes.requests import MAX_SIDE
from relay.errors import BadRequest, RelayError
from relay.metrics import Metric, load_metric
from relay.metrics.clip_quality import EMBEDDED

if TYPE_CHECKING:
    from torch import Tensor

OWN = ("scene", "clip_quality")  # of families that draw scenes
OWN_CLIP = "clip_own"  # what `clip_score` is called where our own CLIP gives it
REASON = 300  # characters of why something is missing


class Scored(NamedTuple):
    """`scores`: column -> finite number. `missing`: metric -> why it gave none. What a prompt does not ask for (a word,
    a position) is in neither."""

    scores: dict[str, float]
    missing: dict[str, str]


class Scorer:
    """Loads no model until the first picture."""

    def __init__(self, metrics: Sequence[str | Mapping[str, Any]] = ()):
        """`metrics`: of families that draw no scenes, by name or with options, `{name: ..., option: ...}`. BadRequest
        where there is no such metric, or it compares with a picture that a judge does not have."""
        self.own = [load_metric(name) for name in OWN]
        self.named = [_load(each) for each in metrics]

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it can yield."""
        both = [*self.own, *self.named]
        return tuple(dict.fromkeys(_column(metric, name) for metric in both for name in metric.columns))

    def score(self, png: bytes, prompt: str, scenes: bool) -> Scored:
        """`scenes`: whether the picture's family draws scenes. Never raises for what a picture or a prompt is."""
        try:
            images = read_png(png)
        except RelayError as error:
            return Scored({}, {"picture": _line(error)})
        metrics = self.own if scenes else self.named
        if not metrics:
            return Scored({}, {"metrics": "its family draws no scenes, and `judge.metrics` names none"})
        scores: dict[str, float] = {}
        missing: dict[str, str] = {}
        for metric in metrics:
            try:
                found = _found(metric, images, prompt)
            except Exception as error:  # a plug-in's too: one metric must not cost the others
                missing[metric.name] = _line(error)
                continue
            scores |= {_column(metric, name): value for name, value in found.items() if math.isfinite(value)}
        return Scored(scores, missing)


def _load(entry: str | Mapping[str, Any]) -> Metric:
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise BadRequest(f"judge.metrics: {dict(options)} has no name")
    metric = load_metric(name, **options)
    if metric.needs_reference:
        raise BadRequest(f"judge.metrics: {name} compares with the full-cloud picture, which a judge does not have")
    return metric


def _found(metric: Metric, images: Tensor, prompt: str) -> dict[str, float]:
    if metric.name == "scene" and images.shape[-1] != images.shape[-2]:
        raise BadRequest("the scene judge reads square pictures")
    found = metric.score(images, [prompt])
    return {name: float(found[name][0]) for name in metric.columns if found.get(name)}


def _column(metric: Metric, name: str) -> str:
    return OWN_CLIP if name == "clip_score" and getattr(metric, "model", None) == str(EMBEDDED) else name


def _line(error: Exception) -> str:
    said = str(error) if isinstance(error, RelayError) else f"{type(error).__name__}: {error}"
    return " ".join(said.split())[:REASON]


def read_png(data: bytes) -> Tensor:
    """(1, 3, H, W) float32 in 0..1. BadRequest where it is no PNG, or larger than a picture of ours can be."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if max(image.size) > MAX_SIDE:
                raise BadRequest(f"a picture of {image.width}x{image.height} is over {MAX_SIDE} a side")
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise BadRequest(f"what came is no PNG: {str(error).splitlines()[0][:100]}") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
