"""`hippoformer memory show FILE`: look into a saved memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hippoformer.cli.arguments import ModelArguments, parse, visible
from hippoformer.errors import ConfigurationError

Order = Literal["priority", "salience", "strength", "position"]
_CONTEXT_TOKENS = 12


@dataclass
class ShowArguments:
    """What of a memory to show."""

    row: int = field(default=0, metadata={"help": "which sequence of the memory"})
    limit: int = field(default=20, metadata={"help": "episodes to show"})
    sort: Order = field(default="priority", metadata={"help": "what comes first; priority is the effective one"})


def main(words: Sequence[str]) -> None:
    """Shows the episodes of a saved memory: what was kept, where it stood, and how strongly it is held."""
    about = {"choices": ["show"], "help": "the only thing there is to do"}
    file = {"type": Path, "metavar": "FILE", "help": "saved memory"}
    chosen, options, given = parse("memory", main.__doc__, words, ModelArguments, ShowArguments, verb=about, file=file)
    from hippoformer.model.cache import HippoCache

    model, tokenizer = chosen.load()
    cache = HippoCache.load(given.file, model)
    if not 0 <= options.row < cache.batch_size:
        raise ConfigurationError(f"--row {options.row}: {given.file} holds {cache.batch_size} rows, from 0")
    where = f"in {given.file}, row {options.row}"
    print(episodes_table(cache, tokenizer, where, model.config.decay, options.row, options.limit, options.sort))


def episodes_table(
    cache: Any, tokenizer: Any, where: str, decay: float, row: int = 0, limit: int = 20, sort: Order = "priority"
) -> str:
    """The first `limit` episodes of a cache's row, a line each; `decay` is the model's decay rate."""
    keys = {
        "priority": lambda episode: -episode.priority * decay**episode.age,
        "salience": lambda episode: -episode.salience,
        "strength": lambda episode: -episode.strength,
        "position": lambda episode: episode.position,
    }
    episodes = sorted(cache.episodes(row), key=keys[sort])
    lines = [f"{len(episodes)} episodes {where}; of each text the last token is the one remembered"]
    lines += ["position  where   salience  priority    age  effective  strength  text"]
    for e in episodes[:limit]:
        text = visible(tokenizer.decode(list(e.context[-_CONTEXT_TOKENS:])))
        place, effective = "window" if e.in_window else "store", e.priority * decay**e.age
        lines.append(
            f"{e.position:8}  {place:6}  {e.salience:8.3f}  {e.priority:8.2f}  {e.age:5g}  {effective:9.2f}  "
            f"{e.strength:8g}  {text}"
        )
    return "\n".join(lines)
