"""Heat maps of a model: its layers along the width, its kinds of module below each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rasa_theory.common import shortened
from rasa_theory.plotting import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE = 0.24  # inches of one kind
LONGEST = 26  # characters of a name, as a rule
_CHARACTER = 0.065  # inches of one character of a name
_PANEL = 1.7  # inches beside the names, at least


def width_beside(names: Sequence[str]) -> float:
    """The inches of a figure whose panels have these names on their left: a column, or more if they are long."""
    return max(style.WIDTH, _PANEL + _CHARACTER * max(map(len, names), default=0))


def heat_map(
    ax: Axes, values: Sequence[Sequence[float | None]], kinds: Sequence[str], title: str, log: bool = False
) -> None:
    """Draw values[kind][layer] as colours, with a bar of their scale; None is left white. Values are at least 0.

    Rows may differ in length. The scale begins at 0; with `log` it is logarithmic, and 0 is left white.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    grid = np.full((len(values), max(map(len, values))), np.nan)
    for row, line in zip(values, grid, strict=True):
        line[: len(row)] = [np.nan if value is None else value for value in row]
    if log:
        grid[grid == 0] = np.nan
    has_range = log and bool(np.isfinite(grid).any())
    scale = LogNorm(np.nanmin(grid), np.nanmax(grid)) if has_range else Normalize(0, 1 if log else None)
    image = ax.imshow(grid, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    ax.set_yticks(range(len(kinds)), shortened(kinds, LONGEST))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.tick_params(labelsize=style.SMALL)
    style.name(ax, title=title)
    ticks = np.geomspace(*image.get_clim(), 4) if has_range else None
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, ticks=ticks, format="%.2g")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=style.SMALL)
