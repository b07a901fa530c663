"""`hippoformer eval trace`: what the memory did while one document was read."""

from pathlib import Path
from typing import Annotated

import typer

from hippoformer.cli.app import eval_app
from hippoformer.cli.options import (
    BufferOption,
    DeviceOption,
    DtypeOption,
    LimitOption,
    ModelOption,
    OutputOption,
    SinkOption,
    SplitOption,
    WindowOption,
    check_output,
    load,
    show,
)
from hippoformer.errors import TextError


@eval_app.command("trace")
def eval_trace(
    model: ModelOption,
    text: Annotated[Path, typer.Option("--text", help="Text file.")],
    title: Annotated[str | None, typer.Option(help="Which document of the file; the first if not given.")] = None,
    window: WindowOption = None,
    sink_tokens: SinkOption = None,
    buffer_size: BufferOption = None,
    limit_tokens: LimitOption = 3000,
    split: SplitOption = "auto",
    output: OutputOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read one document and write down, token by token, what was salient, recalled, and what recall changed."""
    from hippoformer.data import read_documents
    from hippoformer.evaluation.trace import evaluate_trace

    check_output(output)
    documents = read_documents(text, split=split)
    chosen = [document for document in documents if title in (None, document.title)]
    if not chosen:
        titles = ", ".join(document.title for document in documents[:5])
        raise TextError(f"{text} has no document called {title!r}; its first ones are {titles}.")
    loaded, tokenizer = load(model, device, dtype, window=window, sink_tokens=sink_tokens, buffer_size=buffer_size)
    show(evaluate_trace(loaded, tokenizer, chosen[0], limit_tokens=limit_tokens), output)
