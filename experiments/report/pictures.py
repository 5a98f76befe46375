"""The image grids: a few prompts in rows, s in columns, as they were stored; for the page and as a contact sheet."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.contact_sheet import Cell, contact_sheet
from experiments.report.data import Entry, Group
from experiments.report.labels import class_name

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = 5
WIDEST = 320  # pixels in the page; larger pictures are made smaller there


@dataclass
class Shown:
    uri: str
    alt: str
    score: str


@dataclass
class Grid:
    title: str
    slug: str
    columns: list[str]
    rows: list[tuple[str, str, list[Shown | None]]]  # prompt, its class, a picture a column
    sheet: bytes  # PNG


def picture_grid(group: Group) -> Grid | None:
    """The first prompts of each complexity class in turn, through every s; None where no picture is there."""
    shown = _spread(group, group.walk)
    rows: list[tuple[str, str, list[Shown | None]]] = []
    for_sheet = []
    for prompt in shown:
        cells: list[Shown | None] = []
        pictures = []
        for entry in group.walk:
            digest, score = entry.images.get(prompt, ("", 0.0))
            picture = group.image(digest) if digest else None
            cells.append(Shown(_uri(picture), f"{entry.label}: {prompt}", f"{score:.2f}") if picture else None)
            if picture:
                pictures.append(Cell(picture, f"{score:.2f}"))
        if any(cells):
            rows.append((prompt, class_name(group.prompts[prompt]), cells))
        if all(cells):
            for_sheet.append((prompt, pictures))
    if not rows:
        return None
    columns = [entry.label for entry in group.walk]
    sheet = contact_sheet(f"{group.label}: {group.score_name}", [c.replace(", ", "\n") for c in columns], for_sheet)
    return Grid(group.label, group.slug, columns, rows, _png(sheet))


def _spread(group: Group, entries: list[Entry]) -> list[str]:
    """Prompts that all of these drew, class by class in turn, in the workload's order: nothing is picked for its looks."""
    drawn = [text for text in group.prompts if entries and all(text in e.images for e in entries)]
    classes: dict[str, list[str]] = {}
    for text in drawn:
        classes.setdefault(group.prompts[text], []).append(text)
    in_turn = [some[i] for i in range(PROMPTS) for _, some in sorted(classes.items()) if i < len(some)]
    chosen = set(in_turn[: max(PROMPTS, len(classes))])
    return sorted(chosen, key=lambda text: (group.prompts[text], drawn.index(text)))


def _uri(picture: Image) -> str:
    if picture.width <= WIDEST:
        kind, data = "png", _png(picture)
    else:
        out = io.BytesIO()
        small = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)))
        small.save(out, "WEBP", quality=85)
        kind, data = "webp", out.getvalue()
    return data_uri(f"image/{kind}", data)


def data_uri(kind: str, data: bytes) -> str:
    """A file as an address that holds it; `kind`: its media type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _png(picture: Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
