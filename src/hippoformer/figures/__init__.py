"""Figures drawn from result files, and from nothing else.

results = read_results(Path("results"))
draw("salience", results).savefig("salience.png")
written, missing = draw_all(results, Path("figures"))
"""

from hippoformer.figures.registry import FIGURES, Drawing, draw, draw_all
from hippoformer.figures.results import Result, read_results

__all__ = ["FIGURES", "Drawing", "Result", "draw", "draw_all", "read_results"]
