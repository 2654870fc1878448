"""The look of every figure: colours, sizes and labels, and files with reproducible bytes.

A figure answers one question, which its title asks or answers. The colours are Okabe and Ito's palette, which
colour-blind eyes tell apart. Markers and dashes differ as well. A figure is as wide as a column of a paper, and has no
text below `SMALL` points, so it can be read there, and on a slide at twice its size. matplotlib is imported where a
figure is drawn, and its global state does not change.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import NDArray

INK, ORANGE, SKY, GREEN, YELLOW = "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#767676", "#CCCCCC"  # for guides and for lines to labels, not for data
WHITE = "#FFFFFF"  # for text on dark cells
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, VERMILION, SKY, INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PALETTE = frozenset((*COLOURS, YELLOW, GREY, PALE, WHITE))

WIDTH = 3.4  # inches, one column
SMALL, MEDIUM = 8.0, 8.5  # points
DPI = 300
_LINE = 46  # characters of a title that fit into the width


def new_figure(height: float, width: float = WIDTH, title: str = "") -> Figure:
    """An empty figure whose layout makes room for all labels and the title. Sizes are in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.04, w_pad=0.04)  # type: ignore[call-arg, union-attr]
    if title:
        lines = textwrap.fill(title, int(_LINE * width / WIDTH))
        figure.suptitle(lines, x=0.02, ha="left", fontsize=MEDIUM, weight="bold")
    return figure


def panels(figure: Figure | SubFigure, rows: int = 1, columns: int = 1, **more: Any) -> Any:
    """An array (rows, columns) of axes in the common look. `more` goes to `Figure.subplots`."""
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    for ax in axes.flat:
        dress(ax)
    return axes


def dress(ax: Axes) -> None:
    """Remove the box around the data, and set tick labels in small text."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(which="both", labelsize=SMALL)


def name(ax: Axes, x: str = "", y: str = "", title: str = "") -> None:
    """Set the labels of both axes, with units, and the title."""
    if x:
        ax.set_xlabel(x, fontsize=MEDIUM)
    if y:
        ax.set_ylabel(y, fontsize=MEDIUM)
    if title:
        ax.set_title(title, fontsize=MEDIUM)


def grid(ax: Axes) -> None:
    """Draw a pale grid below the data."""
    ax.grid(color=PALE, linewidth=0.5)
    ax.set_axisbelow(True)


def legend(parent: Axes | Figure | SubFigure, *entries: Any, **more: Any) -> None:
    """Draw a legend, for figures in which labels beside the lines would not fit."""
    settings: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "title_fontsize": SMALL, "handlelength": 1.8}
    parent.legend(*entries, **(settings | more))


def legend_above(ax: Axes, columns: int, **more: Any) -> None:
    """Draw a legend between the panel and the title, in one line of `columns` entries or more lines."""
    settings = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "borderpad": 0.2, "ncols": columns}
    legend(ax, **(settings | {"columnspacing": 1.0, "handletextpad": 0.5, "handlelength": 1.4} | more))


def note(ax: Axes, text: str, at: tuple[float, float], **more: Any) -> None:
    """Write small text in the panel, at data coordinates unless `xycoords` says otherwise."""
    settings: dict[str, Any] = {"fontsize": SMALL, "color": INK, "annotation_clip": False}
    ax.annotate(text, at, **(settings | more))


def heat_table(ax: Axes, percentages: NDArray[np.float64]) -> None:
    """Draw numbers of 0 to 100 as cells from white to blue, with the number in each; nan is left white and empty."""
    from matplotlib.colors import LinearSegmentedColormap

    ax.imshow(percentages, aspect="auto", vmin=0, vmax=100, cmap=LinearSegmentedColormap.from_list("", [WHITE, BLUE]))
    for (row, column), value in np.ndenumerate(percentages):
        if np.isfinite(value):
            note(ax, f"{value:.0f}", (column, row), ha="center", va="center", color=WHITE if value > 75 else INK)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def label_ends(
    ax: Axes, ends: Sequence[tuple[float, float, str, str]], line: float = 0.09, inside: bool = False
) -> None:
    """Write names beside the ends of lines, in the order of their heights, so that the pointers to them do not cross.

    `ends` holds x, y, text and colour of each name. `line` is the height of a line of text, relative to the panel. The
    names stand right of the panel, or `inside` it, right of each end. Call it when the limits of the panel are final.
    """
    ax.get_xlim(), ax.get_ylim()  # makes matplotlib update limits that follow the data
    to_panel = ax.transScale + ax.transLimits
    places = [tuple(map(float, to_panel.transform((x, y)))) for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: places[i][1])
    for i, height in zip(order, apart([places[i][1] for i in order], line), strict=True):
        (x, y, text, colour), (across, up) = ends[i], places[i]
        pointer = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 2, "shrinkB": 2, "relpos": (0, 0.5)}
        left = across + 0.03 if inside else 1.06
        is_near = left - across < 0.07 and abs(height - up) < 0.01
        note(
            ax, text, (x, y), xytext=(left, height), textcoords="axes fraction", color=colour, va="center",
            arrowprops=None if is_near else pointer,
        )  # fmt: skip


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Move increasing heights in [0, 1] apart to distances of at least `gap`, by the least sum of squares.

    Subtract n gaps from height n. The results must then not decrease. This is isotonic regression, which is solved by
    pooling neighbours.
    """
    blocks: list[list[float]] = []
    for n, height in enumerate(heights):
        blocks.append([height - n * gap])
        while len(blocks) > 1 and _mean(blocks[-2]) >= _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [_mean(block) for block in blocks for _ in block]
    top = max(1 - (len(level) - 1) * gap, 0.0)
    return [min(max(x, 0.0), top) + n * gap for n, x in enumerate(level)]


def _mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def save(figure: Figure, file: str | Path | IO[bytes], kind: str = "png") -> None:
    """Write a figure as png, svg or pdf, with the same bytes each time: no date, version or random names."""
    import matplotlib

    empty: dict[str, Any] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }[kind]
    with matplotlib.rc_context({"svg.hashsalt": "rasa_theory"}):  # otherwise names in an SVG are random
        figure.savefig(file, format=kind, dpi=DPI, metadata=empty)
