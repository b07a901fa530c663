"""Conversations: the cache remembers, so each turn reads only what is new.

A chat template renders a whole conversation. Of that text a turn needs the end alone: what closes the reply before it,
the user's message, and the opening of the next reply. It is cut out of a rendering in which a mark stands for the
earlier reply, so a template may rewrite older turns (some leave out earlier reasoning): what was read stays read. The
token that ends a reply is chosen but never read; the template's own closing is, with the next turn.

The template's control tokens are obeyed, those that a user or a system prompt spells are text (see `hippoformer.text`).
Several conversations may go on at once, each in a thread of its own, with one model and one tokenizer.
"""

import json
import signal
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from hippoformer.errors import ChatTemplateError, ConfigurationError, MemoryFileError
from hippoformer.hippocampus.passages import Passage
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.rereading import as_text
from hippoformer.text import break_control_tokens, broken_token_ids, obeys, token_ids

# Stands for a reply while a template is rendered; of a private area of Unicode, so in no text.
_MARK = "\ue000reply\ue001"
_NOTE = "conversation"
# Half of the default window: the other half holds the conversation's last turns.
REREAD_TOKENS = 256
# Of the best passage's score, what others must have to be read again: a small base answers worse from many passages,
# and where the best stands out the others hardly ever hold the answer (docs/notebook/passages.md).
CLEAR = 0.9
# Between passages and a question. Without it a small base talks about the text rather than answer from it.
ABOUT = "Answer this question about the text: "
_ONE_LINE = ("num_beams", "num_return_sequences")


class Conversation:
    """Turns of a user and a model that share one memory.

    Args:
        model: a HippoFormer. tokenizer: of its base, with a chat template.
        system: the system prompt, or None for what the template does without one.
        cache: one row of state to go on from, a saved conversation or the memory of a book; None starts with nothing.
        reread_tokens: tokens of retrieved passages that a reply may stand on, put before the user's words in a copy of
            the state (see `hippoformer.model.rereading`); the base then replies alone, and the conversation does not
            keep them. A first turn, about something that was read before, is answered from the passages in an empty
            window; later turns stand in the window of the conversation. 0: none.
        obey_control_tokens: of the user's words and the system prompt, as for `hippoformer.text.encode`.
        options: of `generate`, for every reply; `max_new_tokens` is 256 unless given.

    Attributes:
        cache: all that is remembered. turns: replies given so far.
        passages: what the last reply stands on, best first; empty where nothing was read again.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or one that refuses the system prompt.
        ConfigurationError: several beams or sequences: a conversation follows one line; or tokens below 0.
    """

    cache: HippoCache
    turns: int
    passages: list[Passage]

    def __init__(
        self,
        model: HippoFormer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        cache: HippoCache | None = None,
        reread_tokens: int = REREAD_TOKENS,
        obey_control_tokens: bool | None = None,
        **options: Any,
    ) -> None:
        if reread_tokens < 0:
            raise ConfigurationError(f"reread_tokens={reread_tokens}; expected 0 for none, or how many")
        if not tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, so nothing says how "
                "it expects turns to be written: take an instruction-tuned model, or set tokenizer.chat_template"
            )
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self._template = f"the chat template of {tokenizer.name_or_path or 'this tokenizer'}"
        self.obey_control_tokens = obeys(tokenizer, obey_control_tokens)
        self.reread_tokens, self.options = reread_tokens, {"max_new_tokens": 256} | _checked(options)
        self._take(model.new_cache() if cache is None else cache)
        self._ends()  # what the template refuses, it refuses now

    def turn_ids(self, text: str, alone: bool = False) -> Tensor:
        """The tokens that a user's turn adds to what was read, (1, T) int64.

        Args:
            alone: the turn is read into an empty cache: with the start token, where the template has one.

        Raises:
            ChatTemplateError: the template cannot be rendered, or leaves the replies out.
            TextError: a control token in the text that this tokenizer cannot spell with others.
        """
        first, written = self.turns == 0, [text, self.system or ""]
        said = written if self.obey_control_tokens else [break_control_tokens(self.tokenizer, part) for part in written]
        turn = self._render_turn(said[0], first, said[1])
        plain = said == written
        ids = (
            token_ids(self.tokenizer, turn, obey_control_tokens=True)
            if plain
            else broken_token_ids(self.tokenizer, turn)
        )
        # A stream has its start token at its start: none where a conversation follows something that was read.
        start = self.tokenizer.bos_token_id
        if first and not alone and self.cache.lengths[0] and ids[:1] == [start] and start not in self._later_turn():
            ids = ids[1:]
        return torch.tensor([ids]).long()

    def say(
        self,
        text: str,
        *,
        streamer: BaseStreamer | None = None,
        stopping_criteria: Iterable[StoppingCriteria] = (),
        **options: Any,
    ) -> str:
        """Reads a user's turn and replies. If anything fails, the conversation is as it was before.

        Args:
            text: what the user says. streamer, stopping_criteria, options: as in `generate`, for this reply.

        Returns:
            The reply, without special tokens.
        """
        ids = self.turn_ids(text).to(self.model.device)
        own, pad = self._ends(), self.model.generation_config.pad_token_id
        asked: dict[str, Any] = {"eos_token_id": own or None, "pad_token_id": [*own, 0][0] if pad is None else pad}
        asked |= self.options | _checked(options) | {"use_cache": True, "return_dict_in_generate": False}
        asked |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList(stopping_criteria)}
        asked |= dict.fromkeys(_ONE_LINE, 1)
        passages = self._retrieve(text, ids.shape[1])
        before = self.cache.copy()
        self.cache.new_turn()
        try:
            if passages and self.model.spelling is not None:
                # The base alone: recall would go on in the words of the text that was just found. A first question is
                # answered from the passages; a later one also from the turns before, which the window holds.
                shown = f"{as_text(passages, self.model.spelling)}\n\n{ABOUT if '?' in text else ''}{text}"
                alone = self.turns == 0
                prompt = self.turn_ids(shown, alone).to(self.model.device)
                with self.model.memory_off():
                    reply = self._generate(prompt, self.model.new_cache() if alone else self.cache.copy(), asked)
            else:
                reply = self._generate(ids, self.cache, asked)
            # What ends a reply is never read; the last token of one that was cut short belongs to the text.
            said = torch.cat((ids, reply), dim=1)
            ended = int(reply[0, -1]) in _listed(asked["eos_token_id"])
            unread = said[:, self.cache.columns : said.shape[1] - ended]
            if unread.shape[1]:
                with torch.no_grad():
                    self.model(unread, past_key_values=self.cache, logits_to_keep=1)
        except BaseException:
            self.cache = before
            raise
        self.turns, self.passages = self.turns + 1, passages
        if passages and self.cache.passages is not None:
            self.cache.passages.rehearse(0, passages)
        return str(self.tokenizer.decode(reply[0], skip_special_tokens=True))

    def _generate(self, ids: Tensor, cache: HippoCache, options: dict[str, Any]) -> Tensor:
        """The reply (1, L) to a prompt (1, T), which the cache reads."""
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)
        return out[:, ids.shape[1] :]

    def _retrieve(self, text: str, turn_tokens: int) -> list[Passage]:
        """What fits the user's words, as far as it leaves the turn room in the window; in a conversation that has begun
        only of what has left the window.
        """
        room = min(self.reread_tokens, self.model.config.window - turn_tokens)
        if self.cache.passages is None or room < 1 or self.cache.lengths[0] <= self.model.config.window:
            return []
        ids = token_ids(self.tokenizer, text, obey_control_tokens=self.obey_control_tokens)
        found = self.cache.retrieve(torch.tensor([ids]).long(), n_tokens=room, beyond_window=self.turns > 0)[0]
        return [passage for passage in found if passage.score >= CLEAR * found[0].score]

    def forget(self) -> None:
        """Starts anew: nothing of the conversation is remembered."""
        self.cache, self.turns, self.passages = self.model.new_cache(), 0, []

    def save(self, path: str | Path) -> None:
        """Writes the memory, as `HippoCache.save`, with a note of how far the conversation is."""
        self.cache.notes[_NOTE] = json.dumps({"turns": self.turns, "system": self.system})
        self.cache.save(path)

    def load(self, path: str | Path) -> None:
        """Takes up a saved conversation; any other memory of one row is something read before the first turn.

        Raises:
            MemoryFileError: as `HippoCache.load`; also where the memory is of several rows.
        """
        self._take(HippoCache.load(path, self.model))

    def _take(self, cache: HippoCache) -> None:
        if cache.batch_size != 1:
            raise MemoryFileError(
                f"this memory has {cache.batch_size} rows, a conversation has one: choose one by cache.select_rows"
            )
        turns, system = 0, self.system
        if _NOTE in cache.notes:
            try:
                note = json.loads(cache.notes[_NOTE])
                turns, system = note["turns"], note["system"]
            except (KeyError, TypeError, ValueError) as error:
                raise MemoryFileError(f"the memory's note about its conversation is damaged: {error!r}") from error
        self.cache, self.turns, self.system, self.passages = cache, turns, system, []

    def _render_turn(self, text: str, first: bool, system_prompt: str) -> str:
        system = [] if self.system is None else [{"role": "system", "content": system_prompt}]
        new = {"role": "user", "content": text}
        if first:
            return self._render([*system, new])
        earlier = [{"role": "user", "content": "..."}, {"role": "assistant", "content": _MARK}]
        _, found, ending = self._render([*system, *earlier, new]).partition(_MARK)
        if not found:
            raise ChatTemplateError(
                f"{self._template} leaves earlier replies out, so a turn cannot be added to them: set another "
                "tokenizer.chat_template"
            )
        return ending

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            advice = "some know no system prompt: leave it out, or put it into the first turn"
            raise ChatTemplateError(f"{self._template} refuses: {error}; {advice}") from error

    def _later_turn(self) -> list[int]:
        """Tokens of some turn that is not the first."""
        return token_ids(self.tokenizer, self._render_turn("...", False, "..."), obey_control_tokens=True)

    def _ends(self) -> list[int]:
        """Tokens that end a reply: those of the model, and the one with which the template closes a turn."""
        own = _listed(self.model.generation_config.eos_token_id) or _listed(self.tokenizer.eos_token_id)
        closing = self._later_turn()[:1]
        return sorted({*own, *(set(closing) & set(self.tokenizer.all_special_ids))})


class Interrupt(StoppingCriteria):
    """Ends a reply at Ctrl-C instead of the program: `with Interrupt() as stop: say(..., stopping_criteria=[stop])`.

    Python delivers Ctrl-C to its main thread alone. In another one, and from another one, `press` ends the reply.
    """

    pressed = False

    def __enter__(self) -> "Interrupt":
        self.pressed, self._before = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, lambda *_: self.press())
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def press(self) -> None:
        """Ends the reply with the next token."""
        self.pressed = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(R,) bool, True everywhere once Ctrl-C was pressed."""
        return torch.full((input_ids.shape[0],), self.pressed, device=input_ids.device)


def _listed(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    several = [name for name in _ONE_LINE if options.get(name, 1) != 1]
    if several:
        raise ConfigurationError(
            f"{several[0]}={options[several[0]]}: a conversation follows one line, whose memory goes on; sample, or "
            "decode greedily"
        )
    return {name: value for name, value in options.items() if name not in _ONE_LINE}
