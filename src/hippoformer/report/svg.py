"""A figure as part of a page: its colours become those of the page, light or dark, and its names its own."""

import io
import re

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from hippoformer.figures import style

_VARIABLES = {
    style.INK: "ink",
    style.MUTED: "muted",
    style.GRID: "line",
    style.PAPER: "paper",
    style.BLUE: "blue",
    style.ORANGE: "orange",
    style.GREEN: "green",
    style.VERMILLION: "vermillion",
    style.PURPLE: "purple",
    style.SKY: "sky",
    style.GREY: "grey",
}
_COLOUR = re.compile("|".join(_VARIABLES))


def inline_svg(figure: Figure, name: str, title: str) -> Markup:
    """An `<svg>` element for an HTML page that holds several of them.

    Args:
        name: put before every id, so that two figures of a page do not share one.
        title: read out in place of the picture.
    """
    file = io.StringIO()
    with style.styled():
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=False)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style.*?</style>", r"<defs>\s*</defs>"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    svg = svg.replace("xlink:href", "href")
    svg = _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", svg)
    width = round(figure.get_figwidth() * 96)
    head = f'<svg viewBox="{_view_box(svg)}" style="width:{width}px" role="img" aria-label="{escape(title)}">'
    return Markup(head + svg[svg.index(">") + 1 :])


def _view_box(svg: str) -> str:
    found = re.search(r'viewBox="([^"]+)"', svg)
    assert found is not None, "an SVG of matplotlib always has a view box"
    return found[1]
