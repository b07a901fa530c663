"""The results at a glance: what memory does to perplexity, to facts, to speed and to size."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hippoformer.figures.results import Result, of_format
from hippoformer.figures.style import BLUE, CONDITIONS, GREY, MUTED, PURPLE, canvas, forest, percent_change


def draw(results: Sequence[Result]) -> Figure:
    """Perplexity on the left, where it was measured; on the right whatever else there is."""
    panels = [
        (panel, chosen)
        for panel, formats in (
            (_perplexity, ("hippoformer.perplexity/1",)),
            (_facts, ("hippoformer.recall/1",)),
            (_speed, ("hippoformer.speed/1",)),
        )
        if (chosen := of_format(results, *formats))
    ]
    figure = canvas(3.6 * len(panels) + 1.2, 3.9)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for (panel, chosen), where in zip(panels, axes, strict=True):
        panel(where, chosen)
    return figure


def _perplexity(axes: Axes, results: Sequence[Result]) -> None:
    rows = [
        (f"{result.title}: {name}", percent_change(condition["against_off"]["ratio"]), name)
        for result in results
        for name, condition in result.content["conditions"].items()
        if condition["against_off"] is not None
    ]
    forest(axes, [r[0] for r in rows], [r[1] for r in rows], [CONDITIONS.get(r[2], PURPLE) for r in rows])
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set(title="Perplexity", xlabel="against memory off (%)")


def _facts(axes: Axes, results: Sequence[Result]) -> None:
    """Those of the newest result: all of them are in the figure "recall"."""
    cells = max(results, key=lambda result: result.provenance.get("date", "")).content["cells"]
    labels = [f"{cell['kind']}, {cell['distance']:,} ago" for cell in cells]
    rows = range(len(cells))
    axes.hlines(rows, [c["nats"] for c in cells], [c["nats_off"] for c in cells], color=MUTED, linewidth=1.2)
    axes.plot([c["nats_off"] for c in cells], rows, "o", color=GREY, label="memory off")
    axes.plot([c["nats"] for c in cells], rows, "o", color=BLUE, label="memory on")
    axes.set_yticks(rows, labels)
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set(title="Facts told once", xlabel="−log p of the answer (nats)")
    axes.set_xlim(left=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _speed(axes: Axes, results: Sequence[Result]) -> None:
    rows = [(row["measure"], row["ratio"]) for result in results for row in result.content["results"] if row["ratio"]]
    axes.barh(range(len(rows)), [100 * ratio for _, ratio in rows], color=BLUE, height=0.55)
    axes.set_yticks(range(len(rows)), [_wrapped(name) for name, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color=MUTED, linewidth=1)
    axes.grid(visible=False, axis="y")
    axes.set(title="Speed and size", xlabel="% of the reference")


def _wrapped(measure: str) -> str:
    head, _, tail = measure.partition(": ")
    return f"{head}\n{tail}" if tail else measure
