"""The root of the command line, and where an error becomes an exit code.

An error that the package raises on purpose becomes one red line and exit code 2; `hippoformer --debug …` shows where
it came from.
"""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from hippoformer.errors import HippoFormerError


class _ErrorsInOneLine(TyperGroup):
    """The root command; the only place where errors of the package are turned into an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HippoFormerError as error:
            if ctx.params.get("debug"):
                raise
            line = " ".join(str(error).split())
            Console(stderr=True).print(Text(f"Error: {line}", style="bold red"), soft_wrap=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_ErrorsInOneLine,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="A hippocampus for causal language models.",
)
eval_app = typer.Typer(no_args_is_help=True, help="Measure a model.")
memory_app = typer.Typer(no_args_is_help=True, help="Look into saved memories.")
app.add_typer(eval_app, name="eval")
app.add_typer(memory_app, name="memory")


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
) -> None:
    """A hippocampus for causal language models."""
    # --debug is read by the group above, which also sees errors raised before any command runs.
