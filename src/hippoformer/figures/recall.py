"""Recall of planted facts, by how long ago and how deep in the text they were told."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hippoformer.figures.results import Result
from hippoformer.figures.style import MUTED, SERIES, grid_of

_BINS = 4


def draw(results: Sequence[Result]) -> Figure:
    """For each file: exact answers by distance, -log p of the answers by distance, and the gain by depth."""
    figure, axes = grid_of(3 * len(results), 3, 3.6, 3.7)
    kinds = list(dict.fromkeys(cell["kind"] for result in results for cell in result.content["cells"]))
    for row, result in enumerate(results):
        exact, nats, depth = axes[3 * row : 3 * row + 3]
        for number, kind in enumerate(kinds):
            cells = [cell for cell in result.content["cells"] if cell["kind"] == kind]
            colour, shift = SERIES[number % len(SERIES)], 1 + 0.05 * (number - (len(kinds) - 1) / 2)
            _exact(exact, cells, kind, colour, shift)
            _nats(nats, cells, kind, colour, shift)
            _depth(depth, [a for a in result.content["asked"] if a["kind"] == kind], kind, colour)
        for panel in (exact, nats):
            distances = sorted({cell["distance"] for cell in result.content["cells"]})
            panel.set(xscale="log", xlabel="tokens since the fact was told")
            panel.set_xticks(distances, [f"{d:,}" for d in distances])
            panel.set_xticks([], minor=True)
            panel.set_xlim(distances[0] * 0.75, distances[-1] * 1.33)
        exact.set(title="Answered exactly", ylabel="% of the questions", ylim=(-3, 103))
        nats.set(title="How unlikely the answer is", ylabel="−log p of the answer (nats)")
        depth.axhline(0, color=MUTED, linewidth=1)
        depth.set(title="Gain by depth", xlabel="where it was told (token)", ylabel="nats gained by the memory")
        exact.text(0.02, 0.97, result.title, transform=exact.transAxes, va="top", color=MUTED)
    handles = [Line2D([], [], color=SERIES[i % len(SERIES)], marker="o", label=kind) for i, kind in enumerate(kinds)]
    off = Line2D([], [], color=MUTED, marker="o", mfc="none", linestyle="--", linewidth=1, label="memory off")
    figure.legend(handles=[*handles, off], loc="outside lower center", ncols=len(handles) + 1)
    return figure


def _exact(axes: Axes, cells: Sequence[dict[str, Any]], kind: str, colour: str, shift: float) -> None:
    at = [cell["distance"] * shift for cell in cells]
    right = [100 * cell["right"] for cell in cells]
    ends = [
        [max(0.0, 100 * (cell["right"] - cell["low"])) for cell in cells],
        [max(0.0, 100 * (cell["high"] - cell["right"])) for cell in cells],
    ]
    axes.errorbar(at, right, yerr=ends, fmt="o-", color=colour, capsize=3, label=kind)
    axes.plot(at, [100 * cell["right_off"] for cell in cells], "o--", color=colour, mfc="none", linewidth=1)


def _nats(axes: Axes, cells: Sequence[dict[str, Any]], kind: str, colour: str, shift: float) -> None:
    at = [cell["distance"] * shift for cell in cells]
    axes.plot(at, [cell["nats"] for cell in cells], "o-", color=colour, label=kind)
    axes.plot(at, [cell["nats_off"] for cell in cells], "o--", color=colour, mfc="none", linewidth=1)


def _depth(axes: Axes, asked: Sequence[dict[str, Any]], kind: str, colour: str) -> None:
    """Every question as a point, and the means of equally many questions in order of depth."""
    ordered = sorted(asked, key=lambda a: a["position"])
    at = np.array([a["position"] for a in ordered], dtype=float)
    gain = np.array([a["nats_off"] - a["nats"] for a in ordered])
    axes.scatter(at, gain, s=10, color=colour, alpha=0.35, linewidths=0)
    parts = [part for part in np.array_split(np.arange(len(ordered)), _BINS) if len(part)]
    errors = [gain[p].std(ddof=1) / np.sqrt(len(p)) * 1.96 if len(p) > 1 else 0.0 for p in parts]
    axes.errorbar(
        [at[p].mean() for p in parts],
        [gain[p].mean() for p in parts],
        yerr=errors,
        fmt="o-",
        color=colour,
        capsize=3,
        label=kind,
    )
