"""Memory along a stream, and replay at work: from a trace, or from the dynamics of a longer stream."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hippoformer.figures.results import Result
from hippoformer.figures.style import (
    BLUE,
    GREEN,
    GREY,
    MUTED,
    ORANGE,
    PURPLE,
    VERMILLION,
    canvas,
    forest,
    percent_change,
)


def draw_dynamics(results: Sequence[Result]) -> Figure:
    """Utilisation, priority, age, and writes beside replay, at every segment end of the last stream."""
    stream = _longest(results)
    segments = stream["segments"]
    read = [segment["end"] for segment in segments]

    def column(name: str) -> list[float]:
        return [segment[name] for segment in segments]

    def mean(name: str) -> list[float]:
        """Of an empty store there is none."""
        return [segment[name] if segment["stored"] else math.nan for segment in segments]

    figure = canvas(10.5, 6.2)
    (use, priority), (age, work) = figure.subplots(2, 2, sharex=True)
    use.fill_between(read, [100 * u for u in column("utilisation")], color=BLUE, alpha=0.15, linewidth=0)
    use.plot(read, [100 * u for u in column("utilisation")], color=BLUE)
    use.set(title="Utilisation", ylabel=f"% of {stream['model']['buffer_size']:,} episodes", ylim=(0, 104))
    priority.plot(read, mean("mean_priority"), color=BLUE, label="mean priority P")
    priority.plot(read, mean("mean_effective_priority"), color=ORANGE, linestyle="--", label="after ageing")
    priority.set(title="Priority", ylabel="priority")
    priority.legend()
    age.plot(read, mean("mean_age"), color=GREEN, label="mean age")
    without = _ages_without_replay(stream["model"], read)
    age.plot(read, without, color=GREY, linestyle=":", label="if nothing were ever replayed")
    age.set(title="Age since last replayed", ylabel="segments", xlabel="tokens read")
    age.legend()
    for name, colour, label in (
        ("written", BLUE, "written"),
        ("reactivated", GREEN, "reactivated"),
        ("merged", ORANGE, "merged"),
        ("forgotten", VERMILLION, "forgotten"),
    ):
        work.plot(read, column(name), color=colour, label=label, marker="o", markersize=3, linewidth=1.5)
    work.set(title="Writes and replay", ylabel="episodes a segment", xlabel="tokens read")
    work.legend(ncols=2)
    return figure


def draw_replay(results: Sequence[Result]) -> Figure:
    """What replay did to the store at the end of the last stream, and what it is worth where that was measured."""
    stream = _longest([result for result in results if "segments" in result.content])
    worth = [variant for result in results for variant in _with_other_replay(result)]
    figure = canvas(10.5 if worth else 7.6, 3.9)
    panels = figure.subplots(1, 3 if worth else 2).tolist()
    _ages(panels[0], stream)
    _priorities(panels[1], stream)
    if worth:
        forest(panels[2], [w[0] for w in worth], [percent_change(w[1]) for w in worth], [GREEN] * len(worth))
        panels[2].axvline(0, color=MUTED, linewidth=1)
        panels[2].set(title="Other rounds of replay", xlabel="change of perplexity (%)")
    return figure


def _longest(results: Sequence[Result]) -> dict[str, Any]:
    """The stream that was read furthest, what is stored at its end as columns."""
    stream = max((result.content for result in results), key=lambda content: content["segments"][-1]["end"])
    if "store" in stream:
        return stream
    names = ("position", "salience", "priority", "age", "credit")
    return stream | {"store": {name: [episode[name] for episode in stream["retained"]] for name in names}}


def _ages_without_replay(model: dict[str, Any], read: Sequence[int]) -> list[float]:
    """Mean age at each segment end of all that left the window, had none of it been replayed, merged or lost."""
    window, segment = model["window"], model["segment_len"]
    entered = _admitted_at(np.arange(1, max(1, max(read) - window)), window, segment)
    sums = np.concatenate(([0], np.cumsum(entered)))
    ages = []
    for tokens in read:
        gone = max(0, tokens - window - 1)  # token 0 completes no episode
        ages.append(float((tokens - sums[gone] / gone) / segment + 1) if gone else math.nan)
    return ages


def _admitted_at(position: NDArray[Any], window: int, segment: int) -> NDArray[Any]:
    """The segment ends, in tokens read, at which episodes leave the window."""
    return -(-(position + window + 1) // segment) * segment


def _ages(axes: Axes, stream: dict[str, Any]) -> None:
    model, store = stream["model"], stream["store"]
    last = stream["segments"][-1]["end"]
    entered = _admitted_at(np.array(store["position"]), model["window"], model["segment_len"])
    alone = ((last - entered) / model["segment_len"] + 1).tolist()
    bins = [edge - 0.5 for edge in range(int(max([*alone, *store["age"], 1])) + 2)]
    axes.hist(store["age"], bins=bins, color=GREEN, alpha=0.8, label="as it is")
    axes.hist(alone, bins=bins, histtype="step", color=GREY, linewidth=2, label="if nothing were replayed")
    axes.set(title="Age", xlabel="segments since written or replayed", ylabel="episodes stored")
    axes.legend()


def _priorities(axes: Axes, stream: dict[str, Any]) -> None:
    store, config = stream["store"], stream["model"]["config"]
    low, high = config["importance_weight_range"]
    salience = np.array(store["salience"])
    written = np.where(salience > 0.5, low + (high - low) * (2 * salience - 1), config["untagged_weight"])
    credit = np.array(store["credit"])
    useful = credit > 0.1
    priority = np.array(store["priority"])
    axes.scatter(
        written[~useful], priority[~useful], s=8, color=GREY, alpha=0.5, label="credit up to 0.1", rasterized=True
    )
    axes.scatter(written[useful], priority[useful], s=16, color=PURPLE, label="credit above 0.1", rasterized=True)
    lowest = float(config["untagged_weight"])
    axes.plot([lowest, high], [lowest, high], color=MUTED, linewidth=1, linestyle="--")
    axes.set(title="Useful memories rise", xlabel="priority when written", ylabel="priority now")
    axes.legend(loc="lower right")


def _with_other_replay(result: Result) -> list[tuple[str, dict[str, Any]]]:
    """(label, ratio to the reference) of every variant that differs from it in replay alone."""
    variants = result.content.get("variants", [])
    return [
        (f"{result.name.removeprefix('variants_').replace('_', ' ')}\n{variant['name']}", variant["against"]["ratio"])
        for variant in variants
        if variant["against"] is not None
        and "max_replay_rounds" in variant["options"]
        and _but_replay(variant["options"]) == _but_replay(variants[0]["options"])
    ]


def _but_replay(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "max_replay_rounds"}
