"""One look for all figures: colors that color-blind readers can tell apart, quiet axes.

Figures are matplotlib `Figure` objects drawn with Agg; pyplot and its global state are never
used, so figures can be made in threads and in a process that has its own pyplot session.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color/), strongest contrasts first; yellow is
# left out, as it cannot be read on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Lines differ in dashes and markers too, for print in grey.
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, MUTED, GRID = "#1a1a1a", "#5c5c5c", "#e3e3e3"
# Of rotations and their anchor: the palette's reddish purple, darker so that text can be read.
TURN = "#9C4F78"
DPI = 140
# Above this a picture is stored with a palette of 256 colors.
MAX_BYTES = 140_000


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches with its own Agg canvas and automatic layout."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def panels(figure: Figure, count: int, columns: int, **options: Any) -> list[Any]:
    """So many axes, in lines of `columns`; `options` as of `Figure.subplots`."""
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, **options).flat
    for axes in grid[count:]:
        axes.set_visible(False)
    return list(grid[:count])


def heading(figure: Figure, text: str, **options: Any) -> None:
    """The figure's title, at its left."""
    figure.suptitle(text, fontsize=11.5, x=0.01, ha="left", **options)


def style_axes(axes: Axes, *, title: str = "", xlabel: str = "", ylabel: str = "") -> None:
    """Quiet frame and grid, readable sizes, a left-aligned title."""
    if axes.name != "polar":
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10, colors=MUTED, labelcolor=INK, length=3)
    axes.set_xlabel(xlabel, fontsize=10.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=10.5, color=INK)
    if title:
        axes.set_title(title, fontsize=11.5, color=INK, loc="left")


def color(index: int) -> str:
    """The palette's color of that number, from the start again where it is used up."""
    return PALETTE[index % len(PALETTE)]


def line_style(index: int) -> dict[str, Any]:
    """Color, dashes and marker of curve number `index`: 12 differ before any repeats."""
    return {
        "color": color(index),
        "linestyle": DASHES[(index + index // len(PALETTE)) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def plain(text: Any) -> str:
    """Text that matplotlib shows as it is: no mathematics from dollar signs, no hidden labels."""
    text = printable(text, "\n").replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def printable(text: Any, kept: str) -> str:
    """Text with replacements for control characters and the like, but for those that are kept."""
    return "".join(
        c if c.isprintable() or c in kept else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    )


def shorten(text: Any, limit: int = 28) -> str:
    """Text of at most `limit` characters, with an ellipsis where something was cut."""
    text = str(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def scatter(axes: Axes, x: Any, y: Any, **look: Any) -> None:
    """Many faint points, kept as a picture in vector formats."""
    options: dict[str, Any] = {"s": 12, "color": color(0)} | look
    axes.scatter(x, y, alpha=0.35, linewidths=0, rasterized=True, **options)


def mean_line(axes: Axes, x: Any, values: Any, index: int, **options: Any) -> Line2D:
    """The mean of the values at each x, and where there are several each a band of one deviation.

    Args:
      axes: to draw on.
      x: `[N]`.
      values: N sequences of numbers, one a run.
      index: of `line_style`.
      options: of `Axes.plot`.
    """
    look = line_style(index)
    mean = np.array([np.mean(runs) for runs in values])
    (line,) = axes.plot(x, mean, linewidth=2, **look, **options)
    if min(map(len, values), default=0) > 1:
        deviation = np.array([np.std(runs, ddof=1) for runs in values])
        low, high = mean - deviation, mean + deviation
        axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
    return line


def even_lines(axes: Axes, even: Mapping[str, float]) -> None:
    """The share that uniform attention would give: one line, or one for each modality's."""
    if max(even.values()) - min(even.values()) < 1e-3:
        reference_line(axes, next(iter(even.values())), "even\nshare")
        return
    for i, (name, value) in enumerate(even.items()):
        reference_line(axes, value, f"even, {plain(name)}", color(i))


def named(modality: str, limit: int = 24) -> str:
    """A modality's name as a figure has room for."""
    return plain(shorten(modality, limit))


def reference_line(axes: Axes, value: float, label: str = "", color: str = MUTED) -> None:
    """A thin dotted horizontal line, its name in the margin where it cannot cover any data."""
    axes.axhline(value, color=color, linewidth=1, linestyle=(0, (1, 2)), zorder=1.2)
    note(axes, label, (1, value), (4, 0), color, xycoords=("axes fraction", "data"), va="center")


def note(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    offset: tuple[float, float],
    color: str,
    **options: Any,
) -> None:
    """Small text at so many points from a place; `options` as of `Axes.annotate`."""
    options |= {"xytext": offset, "textcoords": "offset points", "fontsize": 9.5, "color": color}
    axes.annotate(text, place, **options)


def signed(value: float, form: str = ".2f") -> str:
    """The number with a true minus sign; "undefined" where it is none."""
    return format(value, form).replace("-", "−") if math.isfinite(value) else "undefined"


def empty_note(axes: Axes, text: str) -> None:
    """Says why a picture is empty instead of showing bare axes."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def png_bytes(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same content; 256 colors where it is large."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks shows as boxes; that is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png", metadata={"Software": None})
    buffer.seek(0)
    with Image.open(buffer) as image:
        picture = image.convert("RGB")
    small = io.BytesIO()
    picture.save(small, format="png", optimize=True)
    if small.tell() > MAX_BYTES:
        small = io.BytesIO()
        picture.quantize(256, method=Image.Quantize.MEDIANCUT).save(
            small, format="png", optimize=True
        )
    return small.getvalue()


def save_png(figure: Figure | bytes, path: str | Path | epath.Path) -> None:
    """Writes a figure, or the bytes of its PNG, to path (local or gs://); makes its folder."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(figure if isinstance(figure, bytes) else png_bytes(figure))


def legend_below(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """One legend for all panels under them, in as many columns as the figure's width holds."""
    if not labels:
        return
    # About .08 inches for a character at this size, and .85 for the line and the gaps.
    entry = 0.85 + 0.08 * max(len(label) for label in labels)
    fitting = max(1, int(figure.get_figwidth() / entry))
    rows = -(-len(labels) // fitting)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=-(-len(labels) // rows),
        frameon=False,
        fontsize=10,
        handlelength=2.8,
    )


def is_number(value: Any) -> bool:
    """Whether value is a finite number (None, NaN, bool and text are not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)
