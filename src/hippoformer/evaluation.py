"""Perplexity of texts that are read as streams, with and without memory.

Every document is read in order from an empty state. Each token after the first is scored once, and averages are over
tokens, never over documents. Words and bytes are those of the text that the scored tokens cover. What `memory` gains
over `window-only` is owed to episodes, and to those of this document if `other-document` does not gain it as well.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.ops import place
from hippoformer.text import start_tokens, token_spans


class Condition(NamedTuple):
    """With what memory a document is read; conditions that differ only in `log_prob` share one reading.

    `log_prob` and `nbytes` are fields of `Step` and of the cache; `other_document`: as many tokens of others are read
    first, and their memory stands behind an empty window.
    """

    log_prob: str = "target_log_prob"
    nbytes: str | None = "memory_nbytes"
    frozen: bool = False
    other_document: bool = False


CONDITIONS = {
    "memory": Condition(),
    "off": Condition("base_log_prob", None),
    "unigram": Condition("prior_log_prob", "unigram_nbytes"),
    "window-only": Condition(frozen=True),
    "other-document": Condition(frozen=True, other_document=True),
}


@dataclass
class Options:
    """How a perplexity is measured."""

    conditions: list[str] = field(
        default_factory=lambda: ["memory", "off"], metadata={"help": f"some of {', '.join(CONDITIONS)}"}
    )
    batch_size: int = field(default=4, metadata={"help": "documents read side by side"})
    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens of each document"})
    documents: int | None = field(default=None, metadata={"help": "score the first N documents"})

    def __post_init__(self) -> None:
        least = zip((self.batch_size, self.limit_tokens, self.documents), (1, 2, 1), strict=True)
        known = len({*self.conditions} & {*CONDITIONS}) == len(self.conditions) > 0
        if not known or any(given is not None and given < low for given, low in least):
            names = ", ".join(CONDITIONS)
            raise ConfigurationError(f"{self}; expected conditions among {names}, each once, and positive numbers")


@dataclass(frozen=True)
class EncodedDocument:
    """A document as token ids (T,), with words and UTF-8 bytes of the text that the scored tokens cover."""

    index: int
    document: Document
    input_ids: Tensor
    words: int
    utf8_bytes: int

    @property
    def tokens_scored(self) -> int:
        return max(0, len(self.input_ids) - 1)


@dataclass(frozen=True)
class Scored:
    """A document under a condition: log p (T - 1,) of tokens 1 … T - 1, bytes of its state, its share of the time."""

    document: EncodedDocument
    condition: str
    log_probs: Tensor
    window_nbytes: int
    memory_nbytes: int
    seconds: float

    @property
    def nll(self) -> float:
        """Sum of -log p of the scored tokens, in nats."""
        return -float(self.log_probs.double().sum())


def encode(tokenizer: Any, document: Document, index: int = 0, limit_tokens: int | None = None) -> EncodedDocument:
    """Tokenises a document, with a start token where the tokenizer puts one; raises as `text.token_spans`."""
    tokens, spans = token_spans(tokenizer, document.text)
    start = start_tokens(tokenizer)
    ids = [*start, *tokens][:limit_tokens]
    ends = [*(0 for _ in start), *(end for _, end in spans)]
    # A whole document is scored to its last character, also where the tokenizer drops trailing blanks.
    text = document.text[ends[0] : ends[len(ids) - 1] if len(ids) < len(ends) else None] if len(ids) > 1 else ""
    return EncodedDocument(index, document, torch.tensor(ids).long(), len(text.split()), len(text.encode()))


def encode_all(tokenizer: Any, documents: Sequence[Document], limit: int | None = None) -> list[EncodedDocument]:
    """The documents that have a token to score; TextError if none has."""
    encoded = [encode(tokenizer, document, i, limit) for i, document in enumerate(documents)]
    if not (kept := [document for document in encoded if document.tokens_scored]):
        raise TextError(f"none of {len(encoded)} documents has two tokens; name a longer text")
    return kept


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; the mode of before comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def score(
    model: Any, documents: Sequence[EncodedDocument], conditions: Sequence[str] = ("memory",), batch_size: int = 4,
    others: Sequence[EncodedDocument] | None = None,
) -> Iterator[Scored]:  # fmt: skip
    """Reads every document from an empty state under every condition, those of similar length side by side.

    `others` are what `other-document` reads first: of these the documents after the scored one, then those before it.

    Raises:
        ConfigurationError: no other document. NonFiniteError: a scored token has probability zero or NaN.
    """
    readings: dict[tuple[bool, bool], list[str]] = {}
    for name in conditions:
        readings.setdefault(CONDITIONS[name][2:], []).append(name)
    ordered = sorted(documents, key=lambda document: (-len(document.input_ids), document.index))
    for batch in (ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)):
        for (frozen, elsewhere), names in readings.items():
            alone = all(CONDITIONS[name].nbytes is None for name in names)  # nothing of a memory is asked for
            with reading(model), model.memory_off() if alone else nullcontext():
                cache = model.new_cache(len(batch))
                if elsewhere:
                    other = model.new_cache(len(batch))
                    _read(model, [_other_tokens(document, others or documents) for document in batch], other, [])
                    cache.adopt_memory(other)
                cache.freeze_memory(frozen)
                began = time.perf_counter()
                found = _read(model, [document.input_ids for document in batch], cache, names)
                seconds = (time.perf_counter() - began) / len(batch)
            for name, log_probs in found.items():
                kept = CONDITIONS[name].nbytes
                sizes = cache.window_nbytes // len(batch), getattr(cache, kept) // len(batch) if kept else 0
                for document, row in zip(batch, log_probs, strict=True):
                    scored = Scored(document, name, row[: len(document.input_ids) - 1], *sizes, seconds)
                    if not math.isfinite(scored.nll):
                        raise NonFiniteError(
                            f"a token of {document.document.title!r} ({document.document.source}) has probability zero "
                            f"or NaN under {name}; check the weights, and the precision they are loaded in"
                        )
                    yield scored


def _read(model: Any, rows: Sequence[Tensor], cache: Any, conditions: Sequence[str]) -> dict[str, Tensor]:
    """(R, T - 1) log p of the tokens on the CPU for each condition; the cache moves along."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(model.device)
    columns = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    found = {name: torch.zeros(ids.shape, device=ids.device) for name in conditions}
    for step in model.stream(ids, [len(row) for row in rows], cache):
        for name, log_probs in found.items():
            place(log_probs, getattr(step, CONDITIONS[name].log_prob), step.start, step.new, columns)
    return {name: log_probs[:, 1:].cpu() for name, log_probs in found.items()}


def _other_tokens(document: EncodedDocument, pool: Sequence[EncodedDocument]) -> Tensor:
    """As many tokens of other documents as the document has, or all that there are."""
    after = [other.input_ids for other in pool if other.index > document.index]
    before = [other.input_ids for other in pool if other.index < document.index]
    if not after + before:
        raise ConfigurationError("other-document needs a second document: name another text, or leave it out")
    return torch.cat(after + before)[: len(document.input_ids)]


def measure(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> dict[str, list[Scored]]:
    """The documents that have a token to score, in their order, under each condition; raises as `score`."""
    encoded = encode_all(tokenizer, documents[: options.documents], options.limit_tokens)
    others = None
    if "other-document" in options.conditions:
        others = [encode(tokenizer, document, i, options.limit_tokens) for i, document in enumerate(documents)]
    found: dict[str, list[Scored]] = {name: [] for name in options.conditions}
    for scored in score(model, encoded, options.conditions, options.batch_size, others):
        found[scored.condition].append(scored)
    return {name: sorted(of, key=lambda scored: scored.document.index) for name, of in found.items()}


def figures(of: Sequence[Scored]) -> dict[str, Any]:
    """What a condition comes to over all documents together; None where it is undefined."""
    documents, nats = [scored.document for scored in of], sum(scored.nll for scored in of)
    units = ("tokens_scored", "words", "utf8_bytes")
    tokens, words, nbytes = (sum(getattr(document, unit) for document in documents) for unit in units)
    return {
        "perplexity": math.exp(nats / tokens),
        "word perplexity": math.exp(nats / words) if words and nats / words < 700 else None,
        "bits/byte": nats / math.log(2) / nbytes if nbytes else None,
        "window, bytes": max(scored.window_nbytes for scored in of),
        "memory, bytes": max(scored.memory_nbytes for scored in of),
        "tokens/s": sum(len(d.input_ids) for d in documents) / max(1e-9, sum(scored.seconds for scored in of)),
    }


def table(cells: Mapping[str, Mapping[str, float | str | None]], corner: str = "condition") -> str:
    """A Markdown table: a row a condition, a column a metric; "-" for None."""
    metrics = list(dict.fromkeys(metric for of in cells.values() for metric in of))
    lines = [[corner, *metrics]]
    lines += [[name, *(number(of.get(metric, "")) for metric in metrics)] for name, of in cells.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


def number(value: float | str | None) -> str:
    """A figure as a table shows it: four digits, thousands with commas."""
    if value is None or isinstance(value, str):
        return "-" if value is None else value
    return f"{value:,.0f}" if 1_000 <= abs(value) < 1e9 else f"{value:.4g}"
