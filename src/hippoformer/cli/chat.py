"""`hippoformer chat`: a conversation in the terminal, with a look at what the model remembers of it.

In a terminal a turn may have several lines, and a paste is one turn. Of a pipe or a file each line is a turn.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hippoformer.cli.arguments import ModelArguments, parse
from hippoformer.cli.memory import episodes_table, passage_lines
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


@dataclass
class ChatArguments:
    """How to talk."""

    system: str | None = field(default=None, metadata={"help": "system prompt"})
    memory: Path | None = field(default=None, metadata={"help": "saved conversation or memory to go on from"})
    max_new_tokens: int = field(default=256, metadata={"help": "longest reply"})
    temperature: float = field(default=0.7, metadata={"help": "of sampling; 0 takes the likeliest token"})
    top_p: float = field(default=0.9, metadata={"help": "share of the probability to sample from"})
    reread_tokens: int = field(default=256, metadata={"help": "tokens of passages a reply may stand on; 0: none"})
    seed: int = field(default=0, metadata={"help": "of the sampling and of the replay draws"})


def main(words: Sequence[str]) -> None:
    """Talks with a model that remembers what has left its window. Ctrl-C ends a reply; /help lists the commands."""
    chosen, how = parse("chat", main.__doc__, words, ModelArguments, ChatArguments)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    ask = _terminal_input() if in_terminal else input
    from transformers import TextStreamer, set_seed

    from hippoformer.chat import Conversation, Interrupt

    model, tokenizer = chosen.load(seed=how.seed)
    options: dict[str, Any] = {"max_new_tokens": how.max_new_tokens, "do_sample": how.temperature > 0}
    if how.temperature > 0:
        options |= {"temperature": how.temperature, "top_p": how.top_p}
    conversation = Conversation(model, tokenizer, system=how.system, reread_tokens=how.reread_tokens, **options)
    if how.memory is not None:
        conversation.load(how.memory)
    set_seed(how.seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    kept = conversation.turns
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
                text = said[1:] if said.startswith("//") and _is_command(said[1:]) else said
                with Interrupt() as pressed:
                    conversation.say(text, streamer=streamer, stopping_criteria=[pressed])
    if conversation.turns != kept:
        _offer_to_save(conversation, ask if in_terminal else None)


def _terminal_input() -> Callable[[str], str]:
    """Asks for a text of one or more lines, with the earlier ones at hand (arrow keys), which are kept in no file."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    except ModuleNotFoundError:
        print("Each line is a turn; turns of several lines need prompt_toolkit: pip install 'hippoformer[chat]'")
        return input
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
    """Nothing that was said is lost without a word; `ask` is None where nobody can answer."""
    turns = f"{conversation.turns} turn{'s' if conversation.turns != 1 else ''}"
    if ask is None:
        print(f"The conversation of {turns} was not saved: /save FILE keeps one.", file=sys.stderr)
        return
    with suppress(EOFError, KeyboardInterrupt):
        while name := ask(f"Save the conversation of {turns} as (Enter: not at all): ").strip():
            with _errors_shown():
                _command(conversation, "/save", name)
                return


@contextmanager
def _errors_shown() -> Iterator[None]:
    try:
        yield
    except HippoFormerError as error:  # was explained: one line, and the talk goes on
        print(f"Error: {error}")


def _command(conversation: Any, name: str, argument: str | None = None) -> bool:
    """Whether the conversation is now kept elsewhere, or given up."""
    usage = next((line for line in COMMANDS if line.split()[0] == name), "")
    if not usage or (argument is None) == (" " in usage):
        print(f"There is no {name} like this: {usage}" if usage else f"There is no {name}: see /help, or say /{name}")
        return False
    match name:
        case "/help":
            print(*(f"{line:12} {meaning}" for line, meaning in COMMANDS.items()), _HELP, sep="\n")
        case "/memory":
            cache = conversation.cache
            print(f"{_read(conversation)}, bytes: {cache.nbytes:,}, {cache.memory_nbytes:,} of them memories")
            print(episodes_table(cache, conversation.tokenizer, "of this conversation", cache.config.decay, limit=10))
        case "/why":
            nothing = ["On nothing but what the model still sees and recalls."]
            print(*passage_lines(conversation) or nothing, sep="\n")
        case "/forget":
            conversation.forget()
            print("Forgotten.")
        case "/save":
            conversation.save(argument)
            print(f"Saved to {argument}.")
        case "/load":
            conversation.load(argument)
            print(_read(conversation))
    return name in ("/forget", "/save", "/load")


def _read(conversation: Any) -> str:
    return f"turns: {conversation.turns}, tokens read: {conversation.cache.lengths[0]:,}"
