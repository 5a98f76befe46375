"""A drawing becomes a chart: SVG that takes the page's colours, and PNG on white paper for a document.

A chart is drawn twice by the same function, once with a sentinel as its ink, which becomes `currentColor`: so text and
axes are dark on paper and light on a dark screen. Every mark that stands for data carries a `tip`: a title on hover,
for screen readers, and what a test counts to see that a chart is not empty.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.pictures import png_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SENTINEL = "#010203"
PAPER_INK = "#16181d"
PAPER_DPI = 200

# After Okabe and Ito, shifted to keep 3:1 against white and against the page's dark ground.
LARGE, SMALL, RELAY = "#2f7fc4", "#d27d00", "#0a9a6f"
PAPERS, OTHER, NETWORK, RETURN = "#d1495b", "#8b8d98", "#b0589b", "#cf8fc0"
MARKERS = "DvP^X<>hd*"  # of baselines, one each
TIGHT = 0.02


@dataclass
class Chart:
    """`svg` for the page, `png` for papers; `rows` are the figures behind it, as CSV beside the PNG."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes
    rows: list[dict[str, Any]]
    note: str = ""


class Tips:
    """Collects what marks say on hover."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def __call__(self, artist: Any, text: str) -> Any:
        name = f"mark-{len(self.texts)}"
        self.texts[name] = text
        artist.set_gid(name)
        return artist


Draw = Callable[["Figure", str, Tips], None]  # figure, ink, tips


def make_chart(
    name: str, title: str, alt: str, draw: Draw, rows: list[dict[str, Any]], size: tuple[float, float] = (5.1, 3.6),
    note: str = "",
) -> Chart:  # fmt: skip
    """Draw a chart of `size` inches. `name` becomes its files' name and makes its ids unique in the page."""
    svg, tips = _rendered(draw, SENTINEL, size, "svg")
    png, _ = _rendered(draw, PAPER_INK, size, "png")
    return Chart(name, title, alt, _for_page(svg.decode(), name, alt, tips.texts), png, rows, note)


def _rendered(draw: Draw, ink: str, size: tuple[float, float], kind: str) -> tuple[bytes, Tips]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style(ink)):  # type: ignore[arg-type]  # its keys are literals
        figure, tips, out = Figure(figsize=size, layout="constrained"), Tips(), io.BytesIO()
        FigureCanvasAgg(figure)
        draw(figure, ink, tips)
        if kind == "png":
            return png_of(figure, PAPER_DPI), tips
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return out.getvalue(), tips


def _style(ink: str) -> dict[str, Any]:
    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return dict.fromkeys(coloured, ink) | {
        "svg.fonttype": "none", "svg.hashsalt": "relay", "font.family": "DejaVu Sans", "font.size": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8, "axes.titlesize": 9.5,
        "axes.labelsize": 9.5, "axes.titlelocation": "left", "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.frameon": False, "legend.fontsize": 9, "lines.solid_capstyle": "round", "axes.axisbelow": True,
        "hatch.linewidth": 1.0, "text.parse_math": False,  # names of users are no formulas
    }  # fmt: skip


def _for_page(svg: str, name: str, alt: str, tips: dict[str, str]) -> str:
    """matplotlib's file as an inline element: named, without fixed size or foreign addresses, ids its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box
    width = float(box[1].split()[2])
    for mark, text in tips.items():
        opened = f'<g id="{mark}">'
        body = body.replace(opened, f'<g class="mark"><title>{html.escape(text)}</title>', 1)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{name}-", body).replace("xlink:href", "href")
    body = body.replace(SENTINEL, "currentColor")
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-label="{html.escape(alt, quote=True)}" class="chart"'
        f' style="max-width:{width * 1.55:.0f}px"><desc>{html.escape(alt)}</desc>{body}'
    )


def plain_axes(ax: Axes, ink: str, grid: str = "y") -> None:
    """Faint grid, no more."""
    ax.grid(axis=grid, color=ink, alpha=0.12, linewidth=0.8)  # type: ignore[arg-type]
    ax.tick_params(length=3, width=0.8)


def log_axis(ax: Axes, which: str, low: float, high: float) -> None:
    """A logarithmic axis `which` with ticks that read as plain numbers (matplotlib would write them as formulas)."""
    steps = [m * 10.0**k for k in range(-9, 10) for m in (1, 2, 5)]
    ticks = [t for t in steps if low / 1.5 <= t <= high * 1.5]
    getattr(ax, f"set_{which}scale")("log")
    axis = getattr(ax, f"{which}axis")
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_ticks([], minor=True)


def over_s(share: float) -> Any:
    """A colour from the small member's (0) over rose to the large one's (1)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("s", [SMALL, "#bf5b8e", LARGE])(share)


@contextmanager
def measured(ax: Axes) -> Iterator[Callable[[Any], Any]]:
    """Where artists really lie, in pixels: labels are placed against it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    yield lambda artist: artist.get_window_extent(renderer)


def place_labels(ax: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], **style: Any) -> None:
    """Write each text beside its point, where it covers neither a point nor a text; dropped where there is no room.

    The important ones come first.
    """
    from matplotlib.transforms import Bbox

    gap = 6
    sides = [  # offset in points, and what of the text lies there
        ((gap, -gap), "left", "top"), ((-gap, gap), "right", "bottom"), ((gap, gap), "left", "bottom"),
        ((-gap, -gap), "right", "top"), ((gap + 2, 0), "left", "center"), ((-gap - 2, 0), "right", "center"),
        ((0, -gap - 3), "center", "top"), ((0, gap + 3), "center", "bottom"),
    ]  # fmt: skip
    with measured(ax) as extent:
        taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in ax.transData.transform(points)]
        taken += [extent(text) for text in ax.texts]
        inside = ax.get_window_extent()
        for point, text in zip(points, texts, strict=True):
            for offset, across, upright in sides:
                label = ax.annotate(
                    text,
                    point,
                    offset,
                    textcoords="offset points",
                    ha=across,
                    va=upright,
                    **({"fontsize": 8.5} | style),
                )
                box = extent(label)
                fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 + 4 and inside.y0 <= box.y0 and box.y1 <= inside.y1
                if fits and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break
                label.remove()


def end_labels(ax: Axes, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Name each line at its right end (x, y, text, colour), pushed apart where lines end close together."""
    low, high = ax.get_ylim()
    least = 0.068 * (high - low)
    ends = sorted(ends, key=lambda end: end[1])
    placed: list[float] = []
    for _, y, _, _ in ends:
        placed.append(max(y, placed[-1] + least) if placed else y)
    ceiling = high
    for i in reversed(range(len(placed))):  # and down again where they left the axes
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - least
    for (x, y, text, colour), at in zip(ends, placed, strict=True):
        ax.annotate(
            text, (x, y), (8, (at - y) / (high - low) * ax.get_window_extent().height * 72 / ax.figure.dpi),
            textcoords="offset points", va="center", ha="left", fontsize=8.5, color=colour, annotation_clip=False,
        )  # fmt: skip


def seconds_text(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"
