"""`hippoformer memory show FILE` and `hippoformer ask MEMORY "question"`: a saved memory, and answers from it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hippoformer.cli.arguments import ModelArguments, check_output, parse, visible
from hippoformer.errors import ConfigurationError

Order = Literal["priority", "salience", "position"]
_CONTEXT_TOKENS = 12
_PIECE = 4096  # tokens between two lines about the reading


@dataclass
class ShowArguments:
    """What of a memory to show."""

    row: int = field(default=0, metadata={"help": "which sequence of the memory"})
    limit: int = field(default=20, metadata={"help": "episodes to show"})
    sort: Order = field(default="priority", metadata={"help": "what comes first; priority is the effective one"})


@dataclass
class AskArguments:
    """How to read and answer."""

    row: int = field(default=0, metadata={"help": "which sequence of a memory"})
    save: Path | None = field(default=None, metadata={"help": "where to keep the memory of a text that was read"})
    reread_tokens: int = field(default=256, metadata={"help": "tokens of passages an answer may stand on; 0: none"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer"})


def show(words: Sequence[str]) -> None:
    """Shows the episodes of a saved memory: what was kept, where it stood, and how strongly it is held."""
    about = {"choices": ["show"], "help": "the only thing there is to do"}
    file = {"type": Path, "metavar": "FILE", "help": "saved memory"}
    chosen, options, given = parse("memory", show.__doc__, words, ModelArguments, ShowArguments, verb=about, file=file)
    model, tokenizer = chosen.load()
    cache = _load(model, given.file, options.row)
    where = f"in {given.file}, row {options.row}"
    print(episodes_table(cache, tokenizer, where, model.config.decay, options.row, options.limit, options.sort))


def ask(words: Sequence[str]) -> None:
    """Answers questions about what was read, each by itself, and shows the passages that each answer stands on."""
    source = {"type": Path, "metavar": "MEMORY", "help": "saved memory (.safetensors), or a text file to read first"}
    asked = {"nargs": "+", "metavar": "QUESTION", "help": "one or more, each in quotes"}
    chosen, options, given = parse(
        "ask", ask.__doc__, words, ModelArguments, AskArguments, source=source, questions=asked
    )
    check_output(options.save, "--save")
    import torch

    from hippoformer.chat import Conversation
    from hippoformer.data import read_documents
    from hippoformer.text import encode

    model, tokenizer = chosen.load()
    if given.source.suffix == ".safetensors":
        cache = _load(model, given.source, options.row).select_rows(torch.tensor([options.row]))
    else:
        text = "\n\n".join(document.text for document in read_documents([given.source], split="file"))
        ids, cache, done = encode(tokenizer, text, bos=True), model.new_cache(), 0
        for piece in ids.split(_PIECE, dim=1):
            model.score(piece, past_key_values=cache)
            done += piece.shape[1]
            print(f"read {done:,} of {ids.shape[1]:,} tokens", file=sys.stderr, flush=True)
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


def episodes_table(
    cache: Any, tokenizer: Any, where: str, decay: float, row: int = 0, limit: int = 20, sort: Order = "priority"
) -> str:
    """The first `limit` episodes of a cache's row, a line each; `decay` is the model's decay rate."""
    keys = {
        "priority": lambda episode: -episode.priority * decay**episode.age,
        "salience": lambda episode: -episode.salience,
        "position": lambda episode: episode.position,
    }
    episodes = sorted(cache.episodes(row), key=keys[sort])
    lines = [f"{len(episodes)} episodes {where}; of each text the last token is the one remembered"]
    lines += ["position  where   salience  priority    age  effective  text"]
    for e in episodes[:limit]:
        text = visible(tokenizer.decode(list(e.context[-_CONTEXT_TOKENS:])))
        place, effective = "window" if e.in_window else "store", e.priority * decay**e.age
        lines.append(
            f"{e.position:8}  {place:6}  {e.salience:8.3f}  {e.priority:8.2f}  {e.age:5g}  {effective:9.2f}  {text}"
        )
    return "\n".join(lines)


def _load(model: Any, path: Path, row: int) -> Any:
    """A saved memory that has this row."""
    from hippoformer.model.cache import HippoCache

    cache = HippoCache.load(path, model)
    if not 0 <= row < cache.batch_size:
        raise ConfigurationError(f"--row {row}: {path} holds {cache.batch_size} rows, from 0")
    return cache
