"""RouteT2I's ten qualities and the CLIP score, over any transformers `CLIPModel`.

q(I, m) = sigmoid(CLIP(I, m+) - CLIP(I, m-)) with CLIP the logit-scaled cosine (RouteT2I, arXiv 2411.13787; the scale is
what its published means need, as in CLIP-IQA). The paper gives one pair of texts, "High definition photo" and "Low
definition photo"; the others follow its form here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relay.metrics.missing import hub_file

if TYPE_CHECKING:
    from torch import Tensor

    from relay.metrics.clip import Clip

QUALITIES = (
    "definition", "detail", "clarity", "sharpness", "harmony", "realism", "color", "consistency", "layout", "integrity",
)  # fmt: skip
PHRASES = {q: (f"High {q} photo", f"Low {q} photo") for q in QUALITIES}
PHRASES_FILE = "phrases.json"  # beside weights that were trained on phrases of their own
EMBEDDED = Path(__file__).resolve().parent.parent / "weights" / "scene-clip"


def phrases_of(path: str | Path) -> dict[str, tuple[str, str]]:
    """The ten pairs (m+, m-) that a checkpoint is asked with: those stored beside it, else the paper's form."""
    stored = hub_file(path, PHRASES_FILE)
    if not stored:
        return PHRASES
    pairs = json.loads(stored.read_text())
    return {q: (pairs[q][0], pairs[q][1]) for q in QUALITIES}


def qualities(clip: Clip, embedded: Tensor, phrases: Mapping[str, tuple[str, str]]) -> Tensor:
    """q(I, m), (B, 10), of pictures' unit embeddings (B, D)."""
    texts = clip.texts([text for q in QUALITIES for text in phrases[q]])
    return (clip.scale * embedded @ (texts[0::2] - texts[1::2]).T).sigmoid()


class ClipQuality:
    """The ten qualities, `q_definition` to `q_integrity`, and `clip_score`; `model` is a path or hub id."""

    name = "clip_quality"
    needs_reference = False

    def __init__(self, model: str | Path = EMBEDDED, device: str = "cpu", batch: int = 64):
        self.model, self.device, self.batch = str(model), device, batch
        self.columns: tuple[str, ...] = (*(f"q_{q}" for q in QUALITIES), "clip_score")

    def missing(self) -> str | None:
        from relay.metrics.clip import missing_clip

        said = missing_clip(self.model)
        if said and Path(self.model) == EMBEDDED:
            return f"the embedded CLIP is not at {self.model}; train it with `relay-train part clip`"
        return said

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        from relay.metrics.clip import load_clip

        clip = load_clip(self.model, self.device)
        embedded = clip.images(images, self.batch)
        scores = clip_scores(embedded, clip.texts(prompts, self.batch))
        if self.columns == ("clip_score",):
            return {"clip_score": scores}
        q = qualities(clip, embedded, phrases_of(self.model))
        return {f"q_{name}": q[:, i].tolist() for i, name in enumerate(QUALITIES)} | {"clip_score": scores}


class ClipScore(ClipQuality):
    """100 x the cosine of picture and prompt, nothing below 0 (CLIPScore, Hessel et al. 2021, in its common form)."""

    name = "clip_score"

    def __init__(self, model: str | Path = EMBEDDED, device: str = "cpu", batch: int = 64):
        super().__init__(model, device, batch)
        self.columns = ("clip_score",)


def clip_scores(images: Tensor, texts: Tensor) -> list[float]:
    """100 x max(0, cosine) of unit embeddings (B, D) pair by pair."""
    return (100 * (images * texts).sum(-1)).clamp(min=0).tolist()
