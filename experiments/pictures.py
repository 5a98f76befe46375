"""Charts as small PNG files: a palette of 256 colours is all that a drawing needs, at a third of the bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from relay.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def png_of(figure: Figure, dpi: float) -> bytes:
    """A figure on white, as PNG."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, facecolor="white")
    colours = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    colours.save(small, format="png", optimize=True)
    return small.getvalue()


def save_png(figure: Figure, path: Path) -> None:
    """The same into a file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png_of(figure, DPI))


def shown(path: Path) -> str:
    """A picture beside a Markdown file, with its name for who cannot see it."""
    return f"![{path.stem.replace('-', ': ')}]({path.name})"
