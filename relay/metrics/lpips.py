"""LPIPS to a reference picture (Zhang et al. 2018) through the `lpips` package, with its trunk's weights by path.

The package carries the linear heads alone and would fetch the trunk at run time. Here the trunk is a torchvision
state dict on disk. Only torchvision's own ImageNet weights, known by the digest in their file name, make LPIPS: any
other trunk's figures stand under `lpips_unverified_trunk`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from relay.metrics.missing import MissingModel, all_missing, no_file, no_package
from relay.metrics.weights import read_state

if TYPE_CHECKING:
    from torch import Tensor

# torchvision's names: the weights enumeration of each trunk.
TRUNKS = {"alex": "AlexNet_Weights", "vgg": "VGG16_Weights", "squeeze": "SqueezeNet1_1_Weights"}


class Lpips:
    """`trunk`: path of a torchvision state dict (.pth or .safetensors) for `net`: alex, vgg or squeeze. Lower is nearer."""

    name = "lpips"
    needs_reference = True

    def __init__(self, trunk: str | Path | None = None, net: str = "alex", device: str = "cpu", batch: int = 32):
        if net not in TRUNKS:
            raise BadRequest(f"LPIPS has no trunk '{net}'; trunks: {', '.join(TRUNKS)}")
        self.trunk, self.net, self.device, self.batch = trunk, net, device, batch

    @property
    def columns(self) -> tuple[str, ...]:
        if self.trunk is None or not Path(self.trunk).is_file() or self.missing():
            return ("lpips",)
        return ("lpips",) if verified(str(self.trunk), self.net) else ("lpips_unverified_trunk",)

    def missing(self) -> str | None:
        how = (
            f"give trunk: PATH, torchvision's weights of {self.net} "
            "(LPIPS without them is not LPIPS, and they are not downloaded at run time)"
        )
        package = no_package("lpips", "pip install 'relay-inference[experiments]'")
        return all_missing(package, no_file(self.trunk, "LPIPS's trunk", how))

    def score(self, images: Tensor, prompts: Sequence[str], references: Tensor | None = None) -> dict[str, list[float]]:
        import torch

        if said := self.missing():
            raise MissingModel(said)
        if references is None or references.shape != images.shape:
            raise BadRequest("LPIPS needs a reference image of the same size for each image")
        model = _load(str(self.trunk), self.net, self.device)
        found: list[float] = []
        with torch.inference_mode():
            for a, b in zip(images.split(self.batch), references.split(self.batch), strict=True):
                near = model(a.to(self.device) * 2 - 1, b.to(self.device) * 2 - 1)
                found += near.flatten().float().tolist()
        return {self.columns[0]: found}


@cache
def verified(trunk: str, net: str) -> bool:
    """Whether a file is torchvision's own: its download names end in the first digits of their SHA-256."""
    import torchvision.models

    digest = getattr(torchvision.models, TRUNKS[net]).DEFAULT.url.rsplit("-", 1)[1].removesuffix(".pth")
    with Path(trunk).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(digest)


@cache
def _load(trunk: str, net: str, device: str) -> Any:
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips calls torchvision in an old way
        # Random for a moment only: every tensor of the trunk is replaced below, or nothing is scored.
        model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    state = read_state(trunk)
    # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.3.weight is features.3.weight.
    wanted = {key: "features." + key.split(".", 1)[1] for key in model.net.state_dict()}
    lacking = [source for source in wanted.values() if source not in state]
    if lacking:
        raise MissingModel(f"{trunk} is not torchvision's {net}: it has no {lacking[0]}")
    try:
        model.net.load_state_dict({key: state[source] for key, source in wanted.items()})
    except RuntimeError as error:
        raise MissingModel(f"{trunk} is not torchvision's {net}: {error}") from None
    return model.to(device).eval()
