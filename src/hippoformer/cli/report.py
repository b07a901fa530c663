"""`hippoformer figures` and `hippoformer report`: what result files show."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.options import check_output, comma_separated
from hippoformer.cli.terminal import console
from hippoformer.errors import MissingPackageError

ResultsArgument = Annotated[Path, typer.Argument(metavar="RESULTS", help="Folder of result files (JSON).")]


@app.command("figures")
def figures(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option(help="Folder for the figures; made if it is missing.")] = Path("figures"),
    form: Annotated[str, typer.Option("--format", help="Comma-separated: png, pdf, svg.")] = "png,pdf,svg",
    name: Annotated[list[str] | None, typer.Option("--name", help="One figure; can be repeated. Default: all.")] = None,
) -> None:
    """Draw figures from result files, and say which could not be drawn for want of one."""
    _need("matplotlib")
    from hippoformer.figures import draw_all, read_results

    written, missing = draw_all(read_results(results), output, comma_separated(form), name or [])
    terminal = console()
    for path in written:
        terminal.print(Text(str(path)))
    for figure, needs in missing.items():
        terminal.print(Text(f"{figure} not drawn: needs {needs}"))


@app.command("report")
def report(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option(help="The HTML file to write.", callback=check_output)] = Path("report.html"),
) -> None:
    """Write one HTML page with the tables, the figures and a document to read along."""
    _need("matplotlib", "jinja2")
    from hippoformer.figures import read_results
    from hippoformer.report import write_report

    write_report(read_results(results), output)
    console().print(Text(f"Report written to {output}"))


def _need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(
            f"figures and the report need {' and '.join(missing)}; install hippoformer[figures], or that alone."
        )
