"""Charts as small PNG files: a palette of 256 colours is all that a drawing needs, at a third of the bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def png_of(figure: Figure, dpi: float = DPI, **options: Any) -> bytes:
    """A figure on white, as PNG; `options` go to `Figure.savefig`."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, facecolor="white", **options)
    colours = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(small, format="png", optimize=True)
    return small.getvalue()


def save_png(figure: Figure, path: Path, dpi: float = DPI) -> None:
    """The same into a file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(png_of(figure, dpi))
