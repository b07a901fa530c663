"""`hippoformer ask MEMORY "question"`: an answer, and the passages it stands on."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.options import ModelOptions, check_output, with_groups
from hippoformer.cli.terminal import console, visible
from hippoformer.errors import ConfigurationError

_PIECE = 4096  # tokens between two lines about the reading


@app.command("ask")
@with_groups
def ask(
    source: Annotated[Path, typer.Argument(metavar="MEMORY", help="Saved memory, or a text file to read first.")],
    question: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more, each in quotes.")],
    model: ModelOptions,
    row: Annotated[int, typer.Option(min=0, help="Which sequence of a memory.")] = 0,
    save: Annotated[
        Path | None, typer.Option(help="Where to keep the memory of a text that was read.", callback=check_output)
    ] = None,
    reread_tokens: Annotated[int, typer.Option("--reread-tokens", min=0, help="Tokens an answer may stand on.")] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Answer questions about what was read, each by itself, and show the passages that each answer stands on."""
    from hippoformer.chat import Conversation
    from hippoformer.model.cache import HippoCache

    loaded, tokenizer = model.load()
    if source.suffix == ".safetensors":
        cache = HippoCache.load(source, loaded)
        if not row < cache.batch_size:
            raise ConfigurationError(f"--row {row}: {source} holds {cache.batch_size} rows, from 0")
        cache = cache.select_rows(_index(row))
    else:
        cache = _read(loaded, tokenizer, source)
        if save is not None:
            cache.save(save)
    terminal = console()
    for asked in question:
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens}
        conversation = Conversation(loaded, tokenizer, cache=cache.copy(), reread_tokens=reread_tokens, **options)
        answer = conversation.say(asked)
        terminal.print(Text(asked, style="bold"))
        terminal.print(Text(answer.strip()))
        for line in passage_lines(conversation):
            terminal.print(Text(line, style="dim"))


def passage_lines(conversation: Any) -> list[str]:
    """What the last reply of a conversation stands on, best first: score, place in what was read, text."""
    spelling = conversation.model.spelling
    return [
        f"  {passage.score:6.2f}  tokens {passage.start:,} to {passage.stop:,}: "
        + visible(spelling.text(passage.token_ids).strip()).plain
        for passage in conversation.passages
    ]


def _index(row: int) -> Any:
    import torch

    return torch.tensor([row])


def _read(model: Any, tokenizer: Any, path: Path) -> Any:
    """The state after a text file, with a line for every piece that was read."""
    from hippoformer.data import read_documents
    from hippoformer.text import encode

    ids = encode(tokenizer, "\n\n".join(document.text for document in read_documents([path], split="file")), bos=True)
    cache, done = model.new_cache(), 0
    for piece in ids.split(_PIECE, dim=1):
        model.score(piece, past_key_values=cache)
        done += piece.shape[1]
        typer.echo(f"read {done:,} of {ids.shape[1]:,} tokens", err=True)
    return cache
