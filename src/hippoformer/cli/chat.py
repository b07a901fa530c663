"""`hippoformer chat`: a conversation in the terminal, with a look at what the model remembers of it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.memory import episodes_table
from hippoformer.cli.options import ModelOptions, with_groups
from hippoformer.cli.terminal import console
from hippoformer.errors import HippoFormerError

COMMANDS = {
    "/memory": "what is remembered: sizes, and the memories held most strongly",
    "/save FILE": "put the conversation away",
    "/load FILE": "take up a saved conversation, or one about something read before",
    "/forget": "start anew",
    "/help": "these lines",
    "/quit": "leave; so does the end of the input",
}


@app.command("chat")
@with_groups
def chat(
    model: ModelOptions,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    memory: Annotated[Path | None, typer.Option(help="Saved conversation or memory to go on from.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the probability to sample from.")] = 0.9,
    reread_tokens: Annotated[
        int, typer.Option("--reread-tokens", min=0, help="Tokens remembered of a turn, read again before its reply.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling and of the replay draws.")] = 0,
) -> None:
    """Talk with a model that remembers what has left its window. Ctrl-C ends a reply; /help lists the commands."""
    from transformers import set_seed

    from hippoformer.chat import Conversation

    loaded, tokenizer = model.load(seed=seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    conversation = Conversation(loaded, tokenizer, system=system, reread_tokens=reread_tokens, **options)
    if memory is not None:
        conversation.load(memory)
    set_seed(seed)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                _command(conversation, *line.split(maxsplit=1))
            elif line:
                _reply(conversation, line)
        except HippoFormerError as error:
            console().print(Text(f"Error: {error}", style="bold red"), soft_wrap=True)


def _reply(conversation: Any, text: str) -> None:
    """Prints a reply as it comes."""
    from transformers import TextStreamer

    from hippoformer.chat import Interrupt

    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with Interrupt() as pressed:
        conversation.say(text, streamer=streamer, stopping_criteria=[pressed])


def _command(conversation: Any, name: str, argument: str | None = None) -> None:
    terminal = console()
    usage = [line for line in COMMANDS if line.split()[0] == name]
    if not usage or (argument is None) == (" " in usage[0]):
        terminal.print(Text(f"There is no {name} like this: {usage[0]}" if usage else f"There is no {name}: see /help"))
    elif name == "/help":
        for line, meaning in COMMANDS.items():
            terminal.print(Text(f"{line:12} {meaning}"))
    elif name == "/memory":
        cache = conversation.cache
        size = f"bytes: {cache.nbytes:,}, {cache.memory_nbytes:,} of them memories"
        terminal.print(f"{_read(conversation)}, {size}")
        decay = cache.config.decay
        terminal.print(episodes_table(cache, conversation.tokenizer, "of this conversation", decay, limit=10))
    elif name == "/forget":
        conversation.forget()
        terminal.print("Forgotten.")
    elif argument is not None and name == "/save":
        conversation.save(argument)
        terminal.print(Text(f"Saved to {argument}."))
    elif argument is not None:
        conversation.load(argument)
        terminal.print(_read(conversation))


def _read(conversation: Any) -> str:
    return f"turns: {conversation.turns}, tokens read: {conversation.cache.lengths[0]:,}"
