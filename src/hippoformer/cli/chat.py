"""`hippoformer chat`: a conversation in the terminal, with a look at what the model remembers of it.

In a terminal a turn may have several lines, and a paste is one turn. Of a pipe or a file each line is a turn.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from hippoformer.cli.app import app
from hippoformer.cli.ask import passage_lines
from hippoformer.cli.memory import episodes_table
from hippoformer.cli.options import ModelOptions, with_groups
from hippoformer.cli.terminal import console
from hippoformer.errors import HippoFormerError

COMMANDS = {
    "/memory": "what is remembered: sizes, and the memories held most strongly",
    "/save FILE": "put the conversation away",
    "/load FILE": "take up a saved conversation, or one about something read before",
    "/why": "the passages that the last reply stands on",
    "/forget": "start anew",
    "/help": "these lines",
    "/quit": "leave; so does the end of the input",
}
_HELP = (
    "Enter sends. Alt+Enter, or a backslash at the end of a line, begins another line; a paste of many lines is one "
    "turn. /etc/hosts and other paths are text; //forget says /forget."
)


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
        int, typer.Option("--reread-tokens", min=0, help="Tokens of passages that a reply may stand on; 0: none.")
    ] = 256,
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
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    ask, kept = _terminal_input() if in_terminal else input, conversation.turns
    while True:
        try:
            said = ask("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            break
        if said == "/quit":
            break
        with _errors_shown():
            if _is_command(said):
                if _command(conversation, *said.split(maxsplit=1)):
                    kept = conversation.turns
            elif said:
                _reply(conversation, said[1:] if said.startswith("//") and _is_command(said[1:]) else said)
    if conversation.turns != kept:
        _offer_to_save(conversation, ask if in_terminal else None)


def _terminal_input() -> Callable[[str], str]:
    """Asks for a text of one or more lines, with the earlier ones at hand (arrow keys), which are kept in no file."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    session: PromptSession[str] = PromptSession(multiline=True, prompt_continuation="  ", key_bindings=keys)
    return session.prompt


def _is_command(said: str) -> bool:
    """One line that begins with a slash and a word; "/etc/hosts is empty" and "//help" are text."""
    return "\n" not in said and re.match(r"/[^/\s]+(\s|$)", said) is not None


def _offer_to_save(conversation: Any, ask: Callable[[str], str] | None) -> None:
    """Nothing that was said is lost without a word."""
    turns = f"{conversation.turns} turns" if conversation.turns != 1 else "1 turn"
    if ask is None:
        print(f"The conversation of {turns} was not saved: /save FILE keeps one.", file=sys.stderr)
        return
    while True:
        try:
            name = ask(f"Save the conversation of {turns} as (Enter: not at all): ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not name:
            return
        with _errors_shown():
            _command(conversation, "/save", name)
            return


@contextmanager
def _errors_shown() -> Iterator[None]:
    """An error that was explained is one red line, and the talk goes on."""
    try:
        yield
    except HippoFormerError as error:
        console().print(Text(f"Error: {error}", style="bold red"), soft_wrap=True)


def _reply(conversation: Any, text: str) -> None:
    """Prints a reply as it comes."""
    from transformers import TextStreamer

    from hippoformer.chat import Interrupt

    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with Interrupt() as pressed:
        conversation.say(text, streamer=streamer, stopping_criteria=[pressed])


def _command(conversation: Any, name: str, argument: str | None = None) -> bool:
    """Whether the conversation is now kept elsewhere, or given up."""
    terminal = console()
    usage = [line for line in COMMANDS if line.split()[0] == name]
    if not usage or (argument is None) == (" " in usage[0]):
        instead = (
            f"There is no {name} like this: {usage[0]}" if usage else f"There is no {name}: see /help, or say /{name}"
        )
        terminal.print(Text(instead))
        return False
    elif name == "/help":
        for line, meaning in COMMANDS.items():
            terminal.print(Text(f"{line:12} {meaning}"))
        terminal.print(Text(_HELP))
    elif name == "/memory":
        cache = conversation.cache
        size = f"bytes: {cache.nbytes:,}, {cache.memory_nbytes:,} of them memories"
        terminal.print(f"{_read(conversation)}, {size}")
        decay = cache.config.decay
        terminal.print(episodes_table(cache, conversation.tokenizer, "of this conversation", decay, limit=10))
    elif name == "/why":
        lines = passage_lines(conversation)
        terminal.print(Text("\n".join(lines) if lines else "On nothing but what the model still sees and recalls."))
    elif argument is None:
        conversation.forget()
        terminal.print("Forgotten.")
        return True
    elif name == "/save":
        conversation.save(argument)
        terminal.print(Text(f"Saved to {argument}."))
        return True
    else:
        conversation.load(argument)
        terminal.print(_read(conversation))
        return True
    return False


def _read(conversation: Any) -> str:
    return f"turns: {conversation.turns}, tokens read: {conversation.cache.lengths[0]:,}"
