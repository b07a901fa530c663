"""Perplexity by position and by distance, and perplexity over bytes of state."""

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from hippoformer.figures.results import Result, of_format
from hippoformer.figures.style import CONDITIONS, MUTED, PURPLE, SERIES, SKY, error_bars, grid_of

_MARKS = {"hippoformer": "o", "window": "s", "kv selection": "^", "model": "D", "adapter": "P"}
Point = tuple[str, float, dict[str, Any], str, str]


def draw_by_position(results: Sequence[Result]) -> Figure:
    """For each text: perplexity by position in the document, and what memory gains by position and by distance."""
    figure, axes = grid_of(3 * len(results), 3, 4.2, 3.7)
    for row, result in enumerate(results):
        content, panels = result.content, axes[3 * row : 3 * row + 3]
        _levels(panels[0], content)
        _gains(panels[1], content["by_position"], content, "position in the document (tokens)")
        order = "2" if "2" in content["by_distance"] else next(iter(content["by_distance"]))
        last = "tokens since the word pair last came" if order == "2" else f"tokens since the {order}-gram last came"
        _gains(panels[2], content["by_distance"][order], content, last)
        panels[0].set_title("Perplexity")
        panels[1].set_title("Gain over memory off")
        panels[2].set_title("Gain by distance")
        _mark_window(panels[2], content["by_distance"][order], content["window"])
        panels[0].legend(title=result.title, title_fontsize=9)
    return figure


def _levels(axes: Axes, content: dict[str, Any]) -> None:
    bins = content["by_position"]
    for condition in content["conditions"]:
        values = [bin["perplexity"][condition] for bin in bins]
        axes.plot(range(len(bins)), values, "o-", color=CONDITIONS.get(condition, PURPLE), label=condition)
    _label_bins(axes, bins)
    axes.set(xlabel="position in the document (tokens)", ylabel="token perplexity")


def _gains(axes: Axes, bins: Sequence[dict[str, Any]], content: dict[str, Any], what: str) -> None:
    shown = [condition for condition in content["conditions"] if condition != "off"]
    for place, condition in enumerate(shown):
        gains = [bin["gain"][condition] for bin in bins]
        shift = 0.12 * (place - (len(shown) - 1) / 2)
        axes.errorbar(
            [x + shift for x in range(len(bins))],
            [gain["estimate"] for gain in gains],
            yerr=error_bars(gains),
            fmt="o-",
            color=CONDITIONS.get(condition, PURPLE),
            capsize=2.5,
            linewidth=1.4,
            markersize=4,
            label=condition,
        )
    axes.axhline(0, color=MUTED, linewidth=1)
    _label_bins(axes, bins)
    axes.set(xlabel=what, ylabel="gain (nats a token)")


def _mark_window(axes: Axes, bins: Sequence[dict[str, Any]], window: int) -> None:
    """Ground behind the bins that lie beyond the window, where the base itself sees nothing."""
    beyond = [x for x, bin in enumerate(bins) if bin["low"] is not None and bin["low"] > window]
    if beyond:
        axes.axvspan(beyond[0] - 0.5, beyond[-1] + 0.5, color=SKY, alpha=0.15, linewidth=0)
        axes.text(beyond[0] - 0.45, 0.02, f"beyond {window:,}", transform=axes.get_xaxis_transform(), fontsize=8)


def _label_bins(axes: Axes, bins: Sequence[dict[str, Any]]) -> None:
    axes.set_xticks(range(len(bins)), [bin["label"] for bin in bins], rotation=40, ha="right", fontsize=8)


def draw_over_bytes(results: Sequence[Result]) -> Figure:
    """A panel a text: bits per byte or perplexity of every way to read it, over the bytes of state it needs."""
    figure, axes = grid_of(len(results), 2, 5.2, 3.9)
    for panel, result in zip(axes, results, strict=True):
        points, quantity = _points(result)
        for family in dict.fromkeys(point[0] for point in points):  # the same way with more and more bytes
            of = sorted((point[1] / 1e6, point[2]["estimate"], point[3]) for point in points if point[0] == family)
            panel.plot([x for x, _, _ in of], [y for _, y, _ in of], color=of[0][2], linewidth=1)
        named = set[str]()
        for number, (name, nbytes, interval, colour, mark) in enumerate(points):
            # Several may need the same bytes: side by side on paper, not in the data.
            same = [i for i, point in enumerate(points) if point[1] == nbytes]
            beside = ScaledTranslation((same.index(number) - (len(same) - 1) / 2) / 9, 0, figure.dpi_scale_trans)
            panel.errorbar(
                [nbytes / 1e6],
                [interval["estimate"]],
                yerr=error_bars([interval]),
                fmt=mark,
                color=colour,
                capsize=3,
                markersize=7,
                linewidth=1.4,
                label=None if name in named else name,
                transform=panel.transData + beside,
            )
            named.add(name)
        panel.set(title=result.title, xlabel="state of a row (MB)", ylabel=quantity)
        sizes = [point[1] for point in points]
        if max(sizes) > 4 * min(sizes):
            panel.set_xscale("log")
            panel.set_xlim(min(sizes) / 1.2e6, 1.2 * max(sizes) / 1e6)
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_locator(NullLocator())
        else:
            middle, half = (max(sizes) + min(sizes)) / 2e6, max(max(sizes) - min(sizes), 0.2 * max(sizes)) / 1e6
            panel.set_xlim(middle - half, middle + half)
        # What stands beside its own place is not seen by the axes when they choose their limits.
        low = min(interval["low"] or interval["estimate"] for _, _, interval, _, _ in points)
        high = max(interval["high"] or interval["estimate"] for _, _, interval, _, _ in points)
        margin = 0.08 * (high - low or high)
        panel.set_ylim(low - margin, high + margin)
        panel.legend()
    return figure


def _points(result: Result) -> tuple[list[Point], str]:
    """(family, bytes of state, interval, colour, mark) of each way to read, and what the interval is of."""
    content = result.content
    if of_format([result], "hippoformer.perplexity/1"):
        conditions = content["conditions"].items()
        return [
            (name, c["state_nbytes"], c["token_perplexity"], CONDITIONS.get(name, PURPLE), "o")
            for name, c in conditions
        ], "token perplexity"
    known = [c for c in content["contestants"] if c["state_nbytes"]]
    families = [_family(c, known) for c in known]
    colours = {family: SERIES[i % len(SERIES)] for i, family in enumerate(dict.fromkeys(families))}
    return [
        (family, c["state_nbytes"], c["bits_per_byte"], colours[family], _MARKS[c["kind"]])
        for family, c in zip(families, known, strict=True)
    ], "bits per byte"


def _family(contestant: dict[str, Any], among: Sequence[dict[str, Any]]) -> str:
    """What a contestant is but for its numbers: "base, keys by h2o" of all its budgets; its name, if it is alone."""

    def without_numbers(name: str) -> str:
        return re.sub(r"\b\d+( \+ \d+)?\b", "…", name).removesuffix(", buffer …")

    own = without_numbers(contestant["name"])
    alone = [c["name"] for c in among if without_numbers(c["name"]) == own] == [contestant["name"]]
    return contestant["name"] if alone else own
