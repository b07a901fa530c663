"""`hippoformer lm-eval`: lm-evaluation-harness."""

import typer

from hippoformer.cli.app import app

# The harness reads its options itself, its own --help included.
_FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command("lm-eval", context_settings=_FORWARD, add_help_option=False)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness; it knows --model hippoformer, all else is its own."""
    from hippoformer.lm_eval import main

    raise typer.Exit(main(list(context.args)))
