"""Ablations: what each part is worth, with intervals."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from hippoformer.figures.results import Result, p_value
from hippoformer.figures.style import BLUE, GREY, MUTED, ORANGE, canvas, forest, percent_change


def draw(results: Sequence[Result]) -> Figure:
    """A row a file: perplexity of each variant against the base alone, and against the first one."""
    heights = [0.8 + 0.34 * len(result.content["variants"]) for result in results]
    figure = canvas(10.5, 0.6 + sum(heights))
    grid = figure.subplots(len(results), 2, squeeze=False, height_ratios=heights)
    for (against_base, against), result in zip(grid, results, strict=True):
        variants, reference = result.content["variants"], result.content["reference"]
        names = [variant["name"] for variant in variants]
        colours = [BLUE if name == reference else GREY for name in names]
        forest(against_base, names, [percent_change(v["against_base"]["ratio"]) for v in variants], colours)
        others = [variant for variant in variants if variant["against"] is not None]
        intervals = [percent_change(variant["against"]["ratio"]) for variant in others]
        forest(against, [_label(variant) for variant in others], intervals, [ORANGE] * len(others))
        for panel in (against_base, against):
            panel.axvline(0, color=MUTED, linewidth=1)
        title = result.title.removeprefix("variants ")
        against_base.set(title=title, xlabel="perplexity against the base alone (%)")
        against.set(title="what the change costs", xlabel=f"perplexity against “{reference}” (%)")
    return figure


def _label(variant: dict[str, Any]) -> str:
    """Its name, with p where the difference was tested."""
    p = p_value(variant.get("test"))
    return variant["name"] if p is None else f"{variant['name']}\np = {p:.2g}"
