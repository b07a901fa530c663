"""Tables for papers and pages: the rows of a report as Markdown or LaTeX, written by tabulate."""

from typing import Literal

from rich.table import Table
from rich.text import Text

from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.packages import needed

Format = Literal["markdown", "latex"]
_FORMATS = {"markdown": "pipe", "latex": "latex_booktabs"}


def rows_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a report's table, as plain text."""
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    return [_plain(column.header) for column in table.columns], [list(row) for row in zip(*columns, strict=True)]


def render(table: Table, form: Format = "markdown") -> str:
    """A report's table (`report.to_table()`) as Markdown or LaTeX, numbers to the right; its caption is left out.

    Raises:
        ConfigurationError: an unknown format. MissingPackageError: tabulate is not installed.
    """
    if form not in _FORMATS:
        raise ConfigurationError(f"table format {form!r} is unknown; choose one of {', '.join(_FORMATS)}.")
    tabulate = needed("tabulate")
    headings, rows = rows_of(table)
    if form == "markdown":  # a bar would end the cell
        headings, rows = [_barred(h) for h in headings], [[_barred(cell) for cell in row] for row in rows]
    sides = ["right" if column.justify == "right" else "left" for column in table.columns]
    text: str = tabulate.tabulate(rows, headings, tablefmt=_FORMATS[form], colalign=sides, disable_numparse=True)
    return text


def _plain(cell: object) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _barred(cell: str) -> str:
    return cell.replace("|", "\\|")
