"""PNG files that say how they were made: the parameters travel as metadata, the file appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.errors import BadRequest

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "relay"


def save_png(image: Image, path: Path, parameters: dict[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(KEY, json.dumps(parameters, ensure_ascii=False))
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
