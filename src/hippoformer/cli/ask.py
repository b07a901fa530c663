"""`hippoformer ask MEMORY "question"`: an answer, and the passages it stands on."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hippoformer.cli.arguments import ModelArguments, check_output, parse, visible
from hippoformer.errors import ConfigurationError

_PIECE = 4096  # tokens between two lines about the reading


@dataclass
class AskArguments:
    """How to read and answer."""

    row: int = field(default=0, metadata={"help": "which sequence of a memory"})
    save: Path | None = field(default=None, metadata={"help": "where to keep the memory of a text that was read"})
    reread_tokens: int = field(default=256, metadata={"help": "tokens of passages an answer may stand on; 0: none"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer"})


def main(words: Sequence[str]) -> None:
    """Answers questions about what was read, each by itself, and shows the passages that each answer stands on."""
    source = {"type": Path, "metavar": "MEMORY", "help": "saved memory (.safetensors), or a text file to read first"}
    asked = {"nargs": "+", "metavar": "QUESTION", "help": "one or more, each in quotes"}
    chosen, options, given = parse(
        "ask", main.__doc__, words, ModelArguments, AskArguments, source=source, questions=asked
    )
    check_output(options.save, "--save")
    import torch

    from hippoformer.chat import Conversation
    from hippoformer.model.cache import HippoCache

    model, tokenizer = chosen.load()
    if given.source.suffix == ".safetensors":
        cache = HippoCache.load(given.source, model)
        if not 0 <= options.row < cache.batch_size:
            raise ConfigurationError(f"--row {options.row}: {given.source} holds {cache.batch_size} rows, from 0")
        cache = cache.select_rows(torch.tensor([options.row]))
    else:
        cache = _read(model, tokenizer, given.source)
        if options.save is not None:
            cache.save(options.save)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": options.max_new_tokens}
    for question in given.questions:
        talk = Conversation(model, tokenizer, cache=cache.copy(), reread_tokens=options.reread_tokens, **how)
        print(question, talk.say(question).strip(), *passage_lines(talk), sep="\n", flush=True)


def passage_lines(conversation: Any) -> list[str]:
    """What the last reply of a conversation stands on, best first: score, place in what was read, text."""
    return [
        f"  {passage.score:6.2f}  tokens {passage.start:,} to {passage.stop:,}: "
        + visible(conversation.model.spelling.text(passage.token_ids).strip())
        for passage in conversation.passages
    ]


def _read(model: Any, tokenizer: Any, path: Path) -> Any:
    """The state after a text file, with a line for every piece that was read."""
    from hippoformer.data import read_documents
    from hippoformer.text import encode

    ids = encode(tokenizer, "\n\n".join(document.text for document in read_documents([path], split="file")), bos=True)
    cache, done = model.new_cache(), 0
    for piece in ids.split(_PIECE, dim=1):
        model.score(piece, past_key_values=cache)
        done += piece.shape[1]
        print(f"read {done:,} of {ids.shape[1]:,} tokens", file=sys.stderr, flush=True)
    return cache
