"""A measured table that another command wrote (`docs/results/NAME.md`) as a section of the page, its pictures inside.

So the router's, the scheduler's and the load's tables stand in the same report as the runs that they rest on, beside what
the papers printed, without a second copy of how each of them is computed.
"""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.report.labels import slug
from experiments.report.pictures import data_uri
from experiments.report.sections import Section
from relay.errors import BadRequest

if TYPE_CHECKING:
    from markdown_it.token import Token

DEEPER = {"h1": "h2", "h2": "h3", "h3": "h4", "h4": "h5"}  # the page has a title of its own


def result_section(path: Path) -> Section:
    """BadRequest where the file, or a picture that it shows, is not there. Its text never becomes markup of the page."""
    from markdown_it import MarkdownIt

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be shown: {error}") from None
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    title, tokens = path.stem, reader.parse(text)
    if tokens and tokens[0].type == "heading_open" and tokens[0].tag == "h1":
        title, tokens = tokens[1].content, tokens[3:]
    for token in tokens:
        _fit(token, path.parent)
    return Section(
        f"result-{slug(path.stem)}", title, body=_scrolling(reader.renderer.render(tokens, reader.options, {}))
    )


def _fit(token: Token, folder: Path) -> None:
    """Headings one level down, pictures into the page, links to other files as the words they are."""
    token.tag = DEEPER.get(token.tag, token.tag)
    for child in token.children or ():
        if child.type == "image":
            child.attrs["src"] = _inside(folder / str(child.attrs["src"]))
        elif child.type in ("link_open", "link_close"):
            child.type, child.tag, child.attrs = child.type.replace("link", "s"), "span", {}


def _inside(path: Path) -> str:
    try:
        return data_uri(mimetypes.guess_type(path.name)[0] or "image/png", path.read_bytes())
    except OSError as error:
        raise BadRequest(f"{path} cannot be shown: {error}") from None


def _scrolling(html: Any) -> str:
    """Wide tables scroll in a frame of their own, as the page's other tables do."""
    frame = '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
    return str(html).replace("<table>", frame).replace("</table>", "</table></div>")
