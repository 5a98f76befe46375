"""Preference metrics for real families, by path or hub id: ImageReward, PickScore and the aesthetic predictor.

None of their weights is shipped, and none is downloaded behind the user's back: `missing()` says what to fetch. They were
trained on photographs and paintings; on rendered scenes their figures mean little.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.metrics.missing import MissingModel, all_missing, no_file, no_package
from relay.metrics.weights import read_state

if TYPE_CHECKING:
    from torch import Tensor

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the authors take the processor of the model they tuned
AESTHETIC_CLIP = "openai/clip-vit-large-patch14"


def to_pil(images: Tensor) -> list[Any]:
    """(B, 3, H, W) in 0..1 to PIL pictures."""
    from PIL import Image

    levels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]


class PickScore:
    """logit scale x cosine of picture and prompt under PickScore's CLIP (Kirstain et al. 2023); about 16 to 26.

    `tokenizer`: where the tokenizer lies if not beside the model, as for the authors' checkpoint.
    """

    name = "pick_score"
    needs_reference = False
    columns = ("pick_score",)

    def __init__(self, model: str = PICKSCORE, tokenizer: str | None = None, device: str = "cpu", batch: int = 16):
        self.model, self.device, self.batch = str(model), device, batch
        self.tokenizer = tokenizer or (PICKSCORE_TOKENIZER if model == PICKSCORE else None)

    def missing(self) -> str | None:
        from relay.metrics.clip import missing_clip

        return missing_clip(self.model, self.tokenizer)

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        from relay.metrics.clip import load_clip

        clip = load_clip(self.model, self.device, self.tokenizer)
        cosines = (clip.images(images, self.batch) * clip.texts(prompts, self.batch)).sum(-1)
        return {"pick_score": (clip.scale * cosines).tolist()}


class Aesthetic:
    """A head over a CLIP's unit picture embedding: LAION's linear one or the "improved" stack of linear layers.

    `head`: a state dict whose matrices, in order, lead from the embedding to one number. LAION's improved predictor
    (sac+logos+ava1-l14-linearMSE.pth, over ViT-L/14) has no activation between its layers, nor has this.
    """

    name = "aesthetic"
    needs_reference = False
    columns = ("aesthetic",)

    def __init__(
        self, head: str | Path | None = None, model: str = AESTHETIC_CLIP, device: str = "cpu", batch: int = 16
    ):
        self.head, self.model, self.device, self.batch = head, str(model), device, batch

    def missing(self) -> str | None:
        from relay.metrics.clip import missing_clip

        how = "give head: PATH, e.g. LAION's sac+logos+ava1-l14-linearMSE.pth"
        return all_missing(no_file(self.head, "the aesthetic head", how), missing_clip(self.model, text=False))

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        from relay.metrics.clip import load_clip

        if said := self.missing():
            raise MissingModel(said)
        layers = _load_head(str(self.head))
        clip = load_clip(self.model, self.device, text=False)
        states = clip.images(images, self.batch)
        if layers[0][0].shape[1] != states.shape[1]:
            raise MissingModel(
                f"the aesthetic head {self.head} takes {layers[0][0].shape[1]} numbers, "
                f"but {self.model} embeds a picture in {states.shape[1]}: they do not belong together"
            )
        for weight, bias in layers:
            states = states @ weight.T + bias
        return {"aesthetic": states[:, 0].tolist()}


@cache
def _load_head(path: str) -> list[tuple[Any, Any]]:
    """(weight, bias) of each layer, checked to lead on from one another to a single number."""
    import torch

    state = read_state(path)
    names = [key.removesuffix("weight") for key, value in state.items() if key.endswith("weight") and value.ndim == 2]
    layers = []
    for name in names:
        weight = state[f"{name}weight"].float()
        bias = state.get(f"{name}bias")
        layers.append((weight, torch.zeros(len(weight)) if bias is None else bias.float()))
    fits = all(a.shape[0] == b.shape[1] for (a, _), (b, _) in pairwise(layers))
    if not layers or not fits or layers[-1][0].shape[0] != 1:
        raise MissingModel(f"{path} is no aesthetic head: its matrices do not lead from an embedding to one number")
    return layers


class ImageReward:
    """ImageReward (Xu et al. 2023) through its own package. `model`: the path of ImageReward.pt, `med_config`: of its
    med_config.json."""

    name = "image_reward"
    needs_reference = False
    columns = ("image_reward",)

    def __init__(self, model: str | Path | None = None, med_config: str | Path | None = None, device: str = "cpu"):
        self.model, self.med_config, self.device = model, med_config, device

    def missing(self) -> str | None:
        how = "fetch it with `hf download THUDM/ImageReward ImageReward.pt med_config.json`"
        return all_missing(
            no_package("ImageReward", "pip install image-reward"),
            no_file(self.model, "ImageReward's checkpoint (model: PATH)", how)
            or no_file(self.med_config, "ImageReward's med_config.json (med_config: PATH)", how),
        )

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        if said := self.missing():
            raise MissingModel(said)
        model = _load_image_reward(str(self.model), str(self.med_config), self.device)
        return {"image_reward": [float(model.score(p, i)) for p, i in zip(prompts, to_pil(images), strict=True)]}


@cache
def _load_image_reward(model: str, med_config: str, device: str) -> Any:
    try:
        import ImageReward

        return ImageReward.load(model, device=device, med_config=med_config)
    except (ImportError, OSError, RuntimeError, KeyError, ValueError, AttributeError) as error:
        # The package is written for an old transformers and often fails on a new one.
        raise MissingModel(f"ImageReward does not load here: {type(error).__name__}: {error}") from None
