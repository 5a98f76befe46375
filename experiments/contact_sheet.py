"""A contact sheet: rows are prompts, columns programs, a line of text under every picture."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

INK, FAINT, PAPER = (20, 20, 25), (110, 110, 120), (255, 255, 255)
SIDE, GAP, TEXT, LABEL = 128, 14, 20, 250


@dataclass
class Cell:
    image: Picture
    note: str


def contact_sheet(title: str, columns: list[str], rows: list[tuple[str, list[Cell]]]) -> Picture:
    """Draw the sheet; pictures are enlarged without smoothing, so one sees the pixels that were made."""
    head = 2 * GAP + 24 + 22 * max(c.count("\n") + 1 for c in columns)
    width = LABEL + len(columns) * (SIDE + GAP) + 2 * GAP
    height = head + len(rows) * (SIDE + TEXT + GAP) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, normal, small = (ImageFont.load_default(size) for size in (20, 15, 13))
    draw.text((GAP, GAP), title, fill=INK, font=large)
    for j, column in enumerate(columns):
        draw.multiline_text((_x(j), GAP + 34), column, fill=INK, font=normal)
    for i, (label, cells) in enumerate(rows):
        top = head + i * (SIDE + TEXT + GAP)
        draw.multiline_text((GAP, top), "\n".join(textwrap.wrap(label, 32)), fill=INK, font=normal, spacing=5)
        for j, cell in enumerate(cells):
            sheet.paste(cell.image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (_x(j), top))
            draw.text((_x(j), top + SIDE + 3), cell.note, fill=FAINT, font=small)
    return sheet


def _x(column: int) -> int:
    return LABEL + GAP + column * (SIDE + GAP)
