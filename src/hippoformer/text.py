"""Text to token ids. What a user or a document says is text: control tokens written in it are not obeyed.

A tokenizer takes the string "<|im_end|>" for the token that ends a turn, whoever wrote it. Here such a string becomes
the ordinary tokens it is spelled with. Text without control tokens gets exactly the ids that the tokenizer gives it.

How: a break, one private-use character, is put after the first character of every control token in the text. A copy of
the tokenizer's backend looks for control tokens before it normalises, so it does not see the broken ones, and its
normaliser then takes the breaks out: vocabulary, merges and offsets remain those of the text. The tokenizer itself is
never changed (`split_special_tokens=True` of transformers sets a flag on it that other threads would meet).
"""

import json
import re
import threading
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hippoformer.errors import ConfigurationError, TextError

_BREAK = "\U0010fffd"
_Spans = list[tuple[int, int]]
# A fast tokenizer that was called with truncation changes itself in the next call without; some releases of tokenizers
# then fail where another thread is in a call.
_LOCK = threading.RLock()


def encode(tokenizer: Any, text: str, *, bos: bool = False, obey_control_tokens: bool | None = None) -> Tensor:
    """A text as a model reads it.

    Args:
        tokenizer: of transformers. text: of any length. An empty text has no tokens.
        bos: True for the beginning of a stream: a start token where the tokenizer puts one before every text (those of
            Llama, Gemma and Mistral do). False for what continues a stream, questions included.
        obey_control_tokens: True makes real control tokens of strings like "<|im_end|>"; None takes the attribute
            `obey_control_tokens` of the tokenizer, False where it has none.

    Returns:
        (1, T) int64.

    Raises:
        TextError: a control token in the text that this tokenizer cannot spell with others.
    """
    start = start_tokens(tokenizer) if bos else []
    return torch.tensor([[*start, *token_ids(tokenizer, text, obey_control_tokens=obey_control_tokens)]]).long()


def token_ids(tokenizer: Any, text: str, *, obey_control_tokens: bool | None = None) -> list[int]:
    """As `encode`, as a list and without a start token."""
    ids: list[int] = _call(tokenizer, text)["input_ids"]
    if obeys(tokenizer, obey_control_tokens) or not _control(tokenizer).within(ids, text):
        return ids
    return broken_token_ids(tokenizer, _control(tokenizer).broken(text))


def token_spans(tokenizer: Any, text: str) -> tuple[list[int], _Spans]:
    """`token_ids`, and for each token its first character in the text and the one after its last.

    Raises:
        ConfigurationError: a tokenizer without offsets. TextError: as `encode`.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigurationError(
            f"{type(tokenizer).__name__} does not say which characters a token covers, and bits per byte need that; "
            "load the fast tokenizer of this model (AutoTokenizer does)."
        )
    found = _call(tokenizer, text, return_offsets_mapping=True)
    control = _control(tokenizer)
    if obeys(tokenizer, None) or not control.within(found["input_ids"], text):
        return found["input_ids"], found["offset_mapping"]
    broken = control.broken(text)
    ids, spans = control.read(broken)
    places = [0]
    for character in broken:
        places.append(places[-1] + (character != _BREAK))
    return ids, [(places[start], places[end]) for start, end in spans]


def start_tokens(tokenizer: Any) -> list[int]:
    """The start token where the tokenizer puts one before every text (as Gemma's does, and SmolLM2's does not)."""
    with _LOCK:
        return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id][:1]


def obeys(tokenizer: Any, given: bool | None) -> bool:
    """Whether control tokens in a text are obeyed: as given, or as the tokenizer says."""
    return bool(getattr(tokenizer, "obey_control_tokens", False) if given is None else given)


def break_control_tokens(tokenizer: Any, text: str) -> str:
    """The text, with breaks where the tokenizer would find control tokens in it; for a part of a chat template."""
    control = _control(tokenizer)
    return control.broken(text) if control.within(_call(tokenizer, text)["input_ids"], text) else text


def broken_token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with breaks. Control tokens without breaks are obeyed. Raises TextError as `encode`."""
    if getattr(tokenizer, "is_fast", False):
        return _control(tokenizer).read(text)[0]
    # A slow tokenizer cannot be told to look past a break, so no token lies across it.
    return [token for part in text.split(_BREAK) if part for token in _call(tokenizer, part)["input_ids"]]


@dataclass(frozen=True)
class _Control:
    """The control tokens of a tokenizer: special ones, and added ones that its chat template writes."""

    tokenizer: Any  # its backend, if it has one
    tokens: dict[int, str]
    unknown: int | None

    def within(self, ids: Collection[int], text: str) -> bool:
        """Whether a text that became these ids has control tokens in it; the unknown token also stands for others."""
        found = self.tokens.keys() & set(ids)
        if self.unknown in found and self.tokens[self.unknown] not in text:
            found.remove(self.unknown)
        return bool(found)

    def broken(self, text: str) -> str:
        """The text with breaks; at least one, since normalisation may make a control token of another string."""
        places = {
            match.start() + 1
            for token in self.tokens.values()
            if token in text
            for match in re.finditer(f"(?={re.escape(token)})", text)  # those that overlap too
        }
        first = next((place + 1 for place, character in enumerate(text) if not character.isspace()), 0)
        edges = [0, *sorted(places or {first}), len(text)]
        return _BREAK.join(text[start:end] for start, end in pairwise(edges))

    def read(self, text: str) -> tuple[list[int], _Spans]:
        """Ids and spans of a text with breaks."""
        found = self._backend.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in self.tokens and token != self.unknown and _BREAK in text[start:end]:
                raise TextError(
                    f"the text holds {self.tokens[token]!r}, a control token of this tokenizer, which cannot spell it "
                    "with other tokens: take it out, or say obey_control_tokens=True where it is meant"
                )
        return found.ids, found.offsets

    @cached_property
    def _backend(self) -> Tokenizer:
        content = json.loads(self.tokenizer.to_str())
        own = [content["normalizer"]] if content["normalizer"] else []
        take_out = {"type": "Replace", "pattern": {"String": _BREAK}, "content": ""}
        content["normalizer"] = {"type": "Sequence", "normalizers": [take_out, *own]}
        for added in content["added_tokens"]:
            added["normalized"] &= added["id"] not in self.tokens
        if content["model"]["type"] == "Unigram":  # which has its control tokens among the pieces, and likely ones
            pieces = content["model"]["vocab"]
            worst = min(score for _, score in pieces)
            for token in self.tokens.keys() & set(range(len(pieces))):
                pieces[token][1] = 100 * worst - 100
        content["truncation"] = content["padding"] = None
        return Tokenizer.from_str(json.dumps(content))


_KNOWN: "WeakKeyDictionary[Any, tuple[Any, _Control]]" = WeakKeyDictionary()


def _control(tokenizer: Any) -> _Control:
    """Made once for a tokenizer, and again when tokens or the template are changed."""
    special, template = list(tokenizer.all_special_ids), str(tokenizer.chat_template or "")
    state = (len(tokenizer), special, template)
    with _LOCK:
        known = _KNOWN.get(tokenizer)
        if known is None or known[0] != state:
            tokens = dict(zip(special, tokenizer.convert_ids_to_tokens(special), strict=True))
            for number, added in tokenizer.added_tokens_decoder.items():
                # Others are ordinary: runs of white space, tags of web pages.
                written = added.content in template and not added.content.isspace()
                if added.special or written or (added.content.startswith("<|") and added.content.endswith("|>")):
                    tokens[number] = added.content
            # A single character, a "!" for padding, is what it is in every text.
            tokens = {number: token for number, token in tokens.items() if len(token) > 1}
            backend = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
            known = _KNOWN[tokenizer] = (state, _Control(backend, tokens, tokenizer.unk_token_id))
        return known[1]


def _call(tokenizer: Any, text: str, **options: Any) -> Any:
    with _LOCK:
        return tokenizer(text, add_special_tokens=False, verbose=False, **options)
