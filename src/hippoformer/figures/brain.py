"""Brain-like behaviour: what was measured, beside an untrained gate, other controls and the original's figure."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hippoformer.figures.results import Result
from hippoformer.figures.style import BLUE, GREY, INK, MUTED, ORANGE, SERIES, VERMILLION, forest, grid_of

_COLOURS = {"trained gate": BLUE, "untrained gate": GREY, "surprise": ORANGE}


def draw(results: Sequence[Result]) -> Figure:
    """A panel a measure, of the last file: every rule with its interval, the target and chance as lines."""
    measures = results[-1].content["measures"]
    figure, axes = grid_of(len(measures), 3, 3.9, 2.6)
    for panel, measure in zip(axes, measures, strict=True):
        values = {rule: of for rule, of in measure["values"].items() if of is not None}  # None: a share of nothing
        rules = list(values)
        colours = [_COLOURS.get(rule, SERIES[2 + i % 4]) for i, rule in enumerate(rules)]
        forest(panel, [rule.removeprefix("trained gate, ") for rule in rules], list(values.values()), colours)
        if measure["target"] is not None:
            panel.axvline(measure["target"], color=VERMILLION, linestyle="--", linewidth=1.5)
        if measure["chance"] is not None:
            panel.axvline(measure["chance"], color=MUTED, linestyle=":", linewidth=1.5)
        panel.set_title(measure["label"][:1].upper() + measure["label"][1:], fontsize=10, wrap=True)
        panel.set_xlabel(measure["unit"])
        panel.margins(x=0.15)
        panel.locator_params(axis="x", nbins=5)
    figure.legend(
        handles=[
            Line2D([], [], color=VERMILLION, linestyle="--", label="the original's figure"),
            Line2D([], [], color=MUTED, linestyle=":", label="chance"),
            Line2D([], [], color=INK, marker="o", linestyle="-", label="measured, 95 % interval"),
        ],
        loc="outside lower center",
        ncols=3,
    )
    return figure
