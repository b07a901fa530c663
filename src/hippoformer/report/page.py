"""The report: one HTML page that needs nothing beside itself, made from result files and nothing else.

Tables and figures of whatever the folder holds, a traced document to read along, and for each the command and commit
it came from. What is missing is said to be missing. The page loads nothing: its policy forbids it.
"""

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hippoformer.errors import ResultError
from hippoformer.figures.registry import FIGURES, draw
from hippoformer.figures.results import Result, of_format
from hippoformer.report.reading import reading
from hippoformer.report.svg import inline_svg
from hippoformer.report.tables import cards, tables


def write_report(results: Sequence[Result], path: Path) -> None:
    """Writes the page.

    Raises:
        ResultError: nothing in the results that could be shown, or a place that cannot be written.
    """
    page = render(results)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ResultError(f"{path} cannot be written ({error.strerror or error}): choose another place.") from error


def render(results: Sequence[Result]) -> str:
    """The page as text.

    Raises:
        ResultError: nothing in the results that could be shown.
    """
    drawn = {name: drawing.sources(results) for name, drawing in FIGURES.items()}
    shown_tables = tables(results)
    if not shown_tables and not any(drawn.values()):
        raise ResultError("none of the result files holds anything to show: run `hippoformer eval …` with --output.")
    traces = of_format(results, "hippoformer.trace/1")
    environment = Environment(
        loader=PackageLoader("hippoformer.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        model=next((result.content["model"] for result in results if result.config), None),
        cards=cards(results),
        tables=[table | {"origins": [origin(result) for result in table["results"]]} for table in shown_tables],
        reading=reading(traces[-1]) | {"origins": [origin(traces[-1])]} if traces else None,
        figures=[
            {
                "name": name,
                "title": FIGURES[name].title,
                "caption": FIGURES[name].caption,
                "svg": inline_svg(draw(name, results), name, FIGURES[name].title),
                "origins": [origin(result) for result in sources],
            }
            for name, sources in drawn.items()
            if sources
        ],
        missing=[
            {"title": FIGURES[name].title, "needs": FIGURES[name].needs}
            for name, sources in drawn.items()
            if not sources
        ],
        origins=[origin(result) for result in results],
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    )


def origin(result: Result) -> dict[str, Any]:
    """Where a result came from, as words; what was not recorded is said to be so."""
    facts = result.provenance
    commit = facts.get("commit")
    data = facts.get("data") or {}
    machine = facts.get("gpu") or facts.get("cpu")
    return {
        "name": result.name,
        "file": result.file,
        "format": result.format,
        "command": facts.get("command") or "not recorded",
        "commit": commit[:12] if commit else "not recorded",
        "dirty": bool(facts.get("dirty")),
        "date": (facts.get("date") or "not recorded")[:10],
        "seed": facts.get("seed"),
        "machine": f"{machine}, {facts.get('cpus')} CPUs" if machine else "not recorded",
        "data": data.get("sha256", "")[:12],
    }
