"""Salience over real text: the end of a traced document word by word, and the whole of it as a strip."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from hippoformer.figures.results import Result
from hippoformer.figures.style import BLUE, ON_COLOUR, SALIENCE, VERMILLION

_WORDS = 230
_WIDTH = 700.0  # of a line of text, in points, which are the units of the axes
_LINE, _SIZE = 18.0, 9.0
_MARGIN, _STRIP = 52.0, 100.0
# From here on a change of log p, in nats, is marked.
NOTABLE = 0.5


def draw(results: Sequence[Result]) -> Figure:
    """The last trace of the folder: its last tokens coloured by salience, and salience along the whole text."""
    trace = results[-1].content
    tokens = trace["tokens"]
    texts = [text.replace("\n", " ") for text in tokens["text"]]
    first = max(1, len(texts) - _WORDS)
    boxes = _layout(texts[first:])
    block = _LINE * (1 + max(line for line, _, _ in boxes))
    # Placed by hand: letters have a size of their own, and their boxes must fit them.
    width, height = _MARGIN + _WIDTH + 70, 24 + block + 20 + _STRIP + 40
    figure = Figure(figsize=(width / 72, height / 72))
    text_axes = figure.add_axes((_MARGIN / width, (60 + _STRIP) / height, _WIDTH / width, block / height))
    strip_axes = figure.add_axes((_MARGIN / width, 40 / height, _WIDTH / width, _STRIP / height))
    bar_axes = figure.add_axes(((_MARGIN + _WIDTH + 12) / width, 40 / height, 10 / width, _STRIP / height))
    ground = _text(text_axes, texts[first:], boxes, tokens, first)
    _strip(strip_axes, tokens["salience"])
    figure.colorbar(ground, cax=bar_axes, label="salience σ", ticks=[0, 0.5, 1])
    text_axes.set_title(f"{trace['document']['title'].replace('_', ' ')}, tokens {first:,} to {len(texts) - 1:,}")
    return figure


def _layout(texts: Sequence[str]) -> list[tuple[int, float, float]]:
    """Line, left end and width of every token in a block of text; a line is broken only before a blank."""
    boxes: list[tuple[int, float, float]] = []
    line, x = 0, 0.0
    widths = [_letters(text) for text in texts]
    for i, (text, width) in enumerate(zip(texts, widths, strict=True)):
        word = width
        for following, more in zip(texts[i + 1 :], widths[i + 1 :], strict=True):
            if following[:1] in ("", " "):
                break
            word += more
        if text[:1] == " " and x + word > _WIDTH:
            line, x = line + 1, 0.0
        boxes.append((line, x, width))
        x += width
    return boxes


def _letters(text: str) -> float:
    """Width of a text in points: a blank in front or behind counts, ink alone would not."""
    if not text:
        return 0.0
    wide = TextPath((0, 0), f"|{text}|", size=_SIZE).get_extents().width
    return float(wide - TextPath((0, 0), "||", size=_SIZE).get_extents().width)


def _text(
    axes: Axes, texts: Sequence[str], boxes: Sequence[tuple[int, float, float]], tokens: dict[str, Any], first: int
) -> PatchCollection:
    """The words on their grounds, and the marks of recall; returns the grounds."""
    ground = PatchCollection(
        [Rectangle((x, -_LINE * line), width, 0.78 * _LINE) for line, x, width in boxes], cmap=SALIENCE, linewidths=0
    )
    ground.set_array(np.array(tokens["salience"][first:]))
    ground.set_clim(0.0, 1.0)
    axes.add_collection(ground)
    change = np.array(tokens["log_p"][first:], dtype=float) - np.array(tokens["log_p_off"][first:], dtype=float)
    marks = [
        ([(x + 1, -_LINE * line), (x + width - 1, -_LINE * line)], BLUE if gain > 0 else VERMILLION)
        for (line, x, width), gain in zip(boxes, change, strict=True)
        if abs(gain) >= NOTABLE
    ]
    axes.add_collection(
        LineCollection([m[0] for m in marks], colors=[m[1] for m in marks], linewidths=2.2, label="recall")
    )
    for text, (line, x, width) in zip(texts, boxes, strict=True):
        begin = x + _letters(text[: len(text) - len(text.lstrip())])
        end = x + width - _letters(text[len(text.rstrip()) :])
        middle = (begin + end) / 2, _LINE * (0.36 - line)
        axes.text(*middle, text.strip(), fontsize=_SIZE, ha="center", va="center_baseline", color=ON_COLOUR)
    axes.set(xlim=(0, _WIDTH), ylim=(-_LINE * (max(line for line, _, _ in boxes) + 0.1), 0.9 * _LINE))
    axes.set_axis_off()
    return ground


def _strip(axes: Axes, salience: Sequence[float]) -> None:
    values = np.array(salience)
    edges = np.arange(len(values) + 1)
    axes.pcolormesh(edges, [0, 1], values[None, :], cmap=SALIENCE, vmin=0, vmax=1, rasterized=True)
    width = max(1, len(values) // 60)
    tagged = np.convolve(values > 0.5, np.ones(width) / width, mode="valid")
    axes.plot(np.arange(len(tagged)) + width / 2, tagged, color=ON_COLOUR, linewidth=1.4)
    axes.set(xlabel="position in the text (tokens)", ylim=(0, 1), xlim=(0, len(values)))
    axes.set_ylabel(f"tagged share\n(mean of {width})")
    axes.grid(visible=False)
