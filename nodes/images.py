"""PNG files that say how they were made: the parameters travel as metadata, the file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest
from relay.files import replacing, write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

KEY = "relay"


def save_png(image: Image, path: Path, parameters: dict[str, Any]) -> None:
    with replacing(path) as partial:
        image.save(partial, format="PNG", pnginfo=_info(parameters))


def write_bytes(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all, and is on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, sync=True)


def to_image(pixels: Tensor) -> Image:
    """A PIL picture of (3, H, W) in 0..1, rounded as diffusers rounds."""
    from PIL import Image

    return Image.fromarray((pixels.permute(1, 2, 0).cpu().float().numpy() * 255).round().astype("uint8"))


def png_bytes(image: Image, parameters: dict[str, Any]) -> bytes:
    """The file that `save_png` would write."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_info(parameters))
    return buffer.getvalue()


def _info(parameters: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False))
    return info


def open_image(path: Path) -> Image:
    """Any image file. BadRequest where there is none or it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise BadRequest(f"there is no file {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read as an image: {str(error).splitlines()[0]}") from None
    return image


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters that `save_png` put in. BadRequest where there are none."""
    text = getattr(open_image(path), "text", {}).get(KEY)
    try:
        parameters = json.loads(text) if text else None
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict):
        raise BadRequest(
            f"{path} carries no relay parameters: it was not made by `relay generate`, or was saved again since"
        )
    return parameters
