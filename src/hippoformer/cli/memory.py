"""`hippoformer memory …`: look into saved memories."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from hippoformer.cli.app import memory_app
from hippoformer.cli.options import ModelOptions, with_groups
from hippoformer.cli.terminal import console, visible

Order = Literal["priority", "salience", "strength", "position"]
_CONTEXT_TOKENS = 12


@memory_app.command("show")
@with_groups
def memory_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Saved memory.")],
    model: ModelOptions,
    row: Annotated[int, typer.Option(min=0, help="Which sequence of the memory.")] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Episodes to show.")] = 20,
    sort: Annotated[Order, typer.Option(help="What comes first; priority is the effective one.")] = "priority",
) -> None:
    """Show the episodes of a saved memory: what was kept, where it stood, and how strongly it is held."""
    from hippoformer.model.cache import HippoCache

    loaded, tokenizer = model.load()
    cache = HippoCache.load(file, loaded)
    console().print(episodes_table(cache, tokenizer, f"in {file}, row {row}", loaded.config.decay, row, limit, sort))


def episodes_table(
    cache: Any, tokenizer: Any, where: str, decay: float, row: int = 0, limit: int = 20, sort: Order = "priority"
) -> Table:
    """The first `limit` episodes of a cache's row; `decay` is the model's decay rate."""
    keys = {
        "priority": lambda episode: -episode.priority * decay**episode.age,
        "salience": lambda episode: -episode.salience,
        "strength": lambda episode: -episode.strength,
        "position": lambda episode: episode.position,
    }
    episodes = sorted(cache.episodes(row), key=keys[sort])
    table = Table(title=Text(f"{len(episodes)} episodes {where}"))
    table.add_column("token")
    table.add_column("context", overflow="fold")
    table.add_column("where")
    for heading in ("position", "salience", "priority", "age", "effective", "strength"):
        table.add_column(heading, justify="right")
    for episode in episodes[:limit]:
        table.add_row(
            visible(tokenizer.decode([episode.token])),
            visible(tokenizer.decode(list(episode.context[-_CONTEXT_TOKENS:]))),
            "window" if episode.in_window else "store",
            str(episode.position),
            f"{episode.salience:.3f}",
            f"{episode.priority:.2f}",
            f"{episode.age:g}",
            f"{episode.priority * decay**episode.age:.2f}",
            f"{episode.strength:g}",
        )
    return table
