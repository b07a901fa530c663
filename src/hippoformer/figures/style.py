"""One look for all figures: colours that stay apart for colour-blind readers, and how a figure becomes a file.

The colours are those of Okabe & Ito (2008). A colour means the same in every figure: blue is the memory, grey the base
model alone. `INK`, `MUTED`, `GRID` and `PAPER` are used for nothing but text, secondary text, lines and ground, so that
a page can replace them by its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1f2430", "#6a7283", "#d9dde4", "#fefefe"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, GREY = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8d95a5",
)
# Text and lines on a coloured ground, which stays light whatever the page.
ON_COLOUR = "#14161a"
SERIES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
CONDITIONS = {"memory": BLUE, "off": GREY, "window-only": GREEN, "other-document": ORANGE, "marginals": SKY}
SALIENCE = LinearSegmentedColormap.from_list("salience", ["#fffdf8", "#ffe9b8", "#f7b84b", "#d9730d"])
FORMATS = ("png", "pdf", "svg")

_RC: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 2.0,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 180,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "hippoformer",  # the same file from the same numbers
}


@contextmanager
def styled() -> Iterator[None]:
    """Within it everything drawn or saved looks like this."""
    with mpl.rc_context(_RC):  # type: ignore[arg-type]  # names of settings are plain strings here
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure, inches; headless whatever the machine has."""
    return Figure(figsize=(width, height), layout="constrained")


def grid_of(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, `width` x `height` inches each, and the axes in reading order."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = canvas(width * columns, height * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def forest(axes: Axes, labels: Sequence[str], intervals: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    """A dot and its interval a line, from top to bottom; an interval without ends is a dot alone.

    Args:
        intervals: estimate, low and high each.
    """
    for row, (interval, colour) in enumerate(zip(intervals, colours, strict=True)):
        axes.errorbar(
            [interval["estimate"]],
            [row],
            xerr=error_bars([interval]),
            fmt="o",
            color=colour,
            markersize=6,
            capsize=3,
            linewidth=1.6,
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def error_bars(intervals: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Distances from the estimates to the ends of their intervals, below and above."""

    def distance(interval: dict[str, Any], end: str) -> float:
        return 0.0 if interval.get(end) is None else abs(interval["estimate"] - interval[end])

    return [[distance(interval, end) for interval in intervals] for end in ("low", "high")]


def percent_change(interval: dict[str, Any]) -> dict[str, Any]:
    """A ratio's interval as a change in per cent."""
    return {
        name: None if interval.get(name) is None else 100.0 * (interval[name] - 1.0)
        for name in ("estimate", "low", "high")
    }


def save_figure(figure: Figure, path: Path) -> None:
    """Writes one file, its format by its suffix; the same bytes for the same figure."""
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with styled():
        figure.savefig(path, metadata=dated.get(path.suffix[1:]))
