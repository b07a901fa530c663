"""What the memory did while one document was read, token by token: what a figure or a reader can look at.

The document is streamed from an empty state, once with the memory and once as the base alone with the same window. For
every token: how salient the transition into it was, which episode the query before it recalled most strongly and where
that stood in the text, how much of the prediction was left to recall, and what recall did to log p of the token that
came. For every segment end: what was written, replayed, merged and forgotten. And what the store holds in the end.

Shapes: T tokens, E episode slots.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import TextError
from hippoformer.evaluation.provenance import provenance, write_json
from hippoformer.evaluation.report import Report
from hippoformer.evaluation.scoring import describe, encode, reading
from hippoformer.hippocampus.circuit import working_fill
from hippoformer.model.statistics import memory_stats
from hippoformer.text import start_tokens, token_spans

_STORE = ("position", "salience", "priority", "age", "strength", "credit")
_DIGITS = 4
_SHOWN = 12


@dataclass(frozen=True)
class TokenTrace:
    """One column a fact, each with T entries; None where nothing foretold the token (the first) or was recalled.

    Attributes:
        text: the characters of each token; joined they are the text that was read.
        salience: of the transition into the token, in [0, 1]. tagged: above 0.5.
        log_p, log_p_off: log p of the token, in nats, with the memory and of the base alone.
        mixture: lambda, how much recall is believed. nothing: mass on recalling nothing; recall's share of the
            prediction is mixture x (1 - nothing).
        hit: attention on episodes of this very token.
        episode: position of the most strongly recalled episode. weight: its attention. stored: it lay in the store,
            beyond the window, and not among the working episodes.
    """

    text: list[str]
    salience: list[float]
    tagged: list[bool]
    log_p: list[float | None]
    log_p_off: list[float | None]
    mixture: list[float]
    nothing: list[float]
    hit: list[float]
    episode: list[int | None]
    weight: list[float]
    stored: list[bool]


@dataclass(frozen=True)
class SegmentTrace:
    """The store after a segment end, and what happened there.

    Attributes:
        end: tokens read so far. left_window: episodes that left the window and competed for room. written: of these,
            how many are in the store now. reactivated, merged, forgotten: by replay.
        stored: episodes in the store. utilisation: their share of `buffer_size`.
        mean_priority, mean_effective_priority, mean_age, mean_strength, mean_credit: over the store; age in segments.
    """

    end: int
    left_window: int
    written: int
    reactivated: int
    merged: int
    forgotten: int
    stored: int
    utilisation: float
    mean_priority: float
    mean_effective_priority: float
    mean_age: float
    mean_strength: float
    mean_credit: float


@dataclass(frozen=True)
class TraceReport(Report):
    """Everything about one document.

    Attributes:
        model, settings, document: what was read by what.
        tokens: columns. segments: one entry a segment end. store: columns of the stored episodes at the end.
    """

    FORMAT: ClassVar[str] = "hippoformer.trace/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    document: dict[str, Any]
    tokens: TokenTrace
    segments: list[SegmentTrace]
    store: dict[str, list[Any]]
    provenance: dict[str, Any]

    def content(self) -> dict[str, Any]:
        """All fields, the measured numbers rounded to four decimals."""
        plain = super().content()
        return plain | {name: _rounded(plain[name]) for name in ("tokens", "segments", "store")}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace as JSON without blanks: there are many numbers."""
        write_json(path, self.to_dict(), indent=None)

    def to_table(self) -> Table:
        """The tokens that recall helped most, for a terminal."""
        tokens = self.tokens
        change = [None if on is None or off is None else on - off for on, off in zip_columns(tokens)]
        known = [value for value in change if value is not None]
        ratio = math.exp(-sum(known) / len(known))
        caption = (
            f"{len(tokens.text):,} tokens, {sum(tokens.tagged) / len(tokens.tagged):.0%} tagged; perplexity with the "
            f"memory against the base alone: {ratio - 1:+.1%}"
        )
        table = Table(title=Text(f"Where recall helped most in {self.document['title']}"), caption=Text(caption))
        for heading in ("token", "position", "log p off", "log p", "recalled from", "tokens back"):
            table.add_column(heading, justify="left" if heading == "token" else "right")
        for t in sorted((t for t, c in enumerate(change) if c is not None), key=lambda t: -(change[t] or 0.0))[:_SHOWN]:
            episode, off, on = tokens.episode[t], tokens.log_p_off[t], tokens.log_p[t]
            back = ("-", "-") if episode is None else (f"{episode:,}", f"{t - episode:,}")
            table.add_row(Text(repr(tokens.text[t])), f"{t:,}", f"{off:.2f}", f"{on:.2f}", *back)
        return table


def zip_columns(tokens: TokenTrace) -> Iterator[tuple[float | None, float | None]]:
    """(log p with the memory, log p of the base alone) of each token."""
    return zip(tokens.log_p, tokens.log_p_off, strict=True)


def evaluate_trace(
    model: Any,
    tokenizer: Any,
    document: Document,
    limit_tokens: int | None = None,
    command: str | None = None,
) -> TraceReport:
    """Reads a document from an empty memory and writes down what happened.

    Args:
        model: a HippoFormer; its mode is put back. tokenizer: its fast tokenizer.
        document: what to read.
        limit_tokens: read only the first so many tokens.
        command: recorded in the report.

    Raises:
        TextError: fewer than two tokens to read.
    """
    encoded = encode(tokenizer, document, 0, limit_tokens)
    if encoded.tokens_scored == 0:
        raise TextError(f"{document.title!r} has less than two tokens to read: name a longer text.")
    ids = encoded.input_ids.unsqueeze(0)
    with reading(model):
        with model.memory_off():
            off = model.score(ids).squeeze(0)
        cache = model.new_cache(1)
        columns, segments = _watch(model, ids.to(model.device), cache)
    store = cache.memory.episodes.slots(0, model.config.buffer_size)
    held = store.valid[0]
    salience = columns["salience"]
    return TraceReport(
        model=describe(model),
        settings={"limit_tokens": limit_tokens},
        document={"title": document.title, "source": document.source, "tokens_read": encoded.tokens_read},
        tokens=TokenTrace(
            text=token_texts(tokenizer, document, encoded.tokens_read),
            tagged=[value > 0.5 for value in salience],
            log_p_off=[None, *off.tolist()],
            **columns,
        ),
        segments=segments,
        store={name: getattr(store, name)[0][held].tolist() for name in _STORE},
        provenance=provenance(seed=model.config.seed, documents=[document], command=command),
    )


def token_texts(tokenizer: Any, document: Document, count: int) -> list[str]:
    """The characters of each of the first tokens; those of one character split over several belong to the first."""
    spans = token_spans(tokenizer, document.text)[1]
    ends = [*(0 for _ in start_tokens(tokenizer)), *(end for _, end in spans)][:count]
    return [document.text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _watch(model: Any, ids: Tensor, cache: Any) -> tuple[dict[str, list[Any]], list[SegmentTrace]]:
    """The columns that reading gives, and the segments."""
    config = model.config
    columns: dict[str, list[Any]] = {
        name: [] for name in ("salience", "log_p", "mixture", "nothing", "hit", "episode", "weight", "stored")
    }
    segments: list[SegmentTrace] = []
    foretold: tuple[int | None, float, bool] = (None, 0.0, False)  # by the query before the step
    steps = model.stream(ids, [ids.shape[1]], cache)
    while True:
        # A segment end rearranges the slots before the step is handed out: look where everything lies beforehand.
        done, first_slot = cache.lengths[0], config.buffer_size - cache.memory.stored_bound
        position = cache.memory.episodes.position[0].clone()  # (E,)
        step = next(steps, None)
        if step is None:
            return columns, segments
        new, found = step.new[0], step.found
        written = config.buffer_size + working_fill(done, config)
        position[written : written + new] = torch.arange(done, done + new, device=position.device)
        best = found.recollection.weights[0, :new].max(-1)
        strongest = [
            (int(position[first_slot + slot]), weight, first_slot + slot < config.buffer_size)
            if weight > 0
            else (None, 0.0, False)
            for slot, weight in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        for episode, weight, stored in (foretold, *strongest[:-1]):
            columns["episode"].append(episode)
            columns["weight"].append(weight)
            columns["stored"].append(stored)
        foretold = strongest[-1]
        for name, values in (
            ("salience", found.salience),
            ("log_p", step.target_log_prob),
            ("mixture", found.prior_mixture),
            ("nothing", found.prior_nothing),
            ("hit", found.hit),
        ):
            columns[name] += values[0, :new].float().tolist()
        if done == 0:
            columns["log_p"][0] = None
        if step.report is not None:
            segments.append(_segment(cache, step.report, position, done, new))


def _segment(cache: Any, report: Any, before: Tensor, done: int, new: int) -> SegmentTrace:
    """What a segment end did; `before` are the positions of all slots when the last token had been written."""
    config = cache.config
    stats = memory_stats(cache, [report])
    leaving = working_fill(done, config) + new - working_fill(done + new, config)
    left = set(before[config.buffer_size :][:leaving].tolist()) - {-1}
    kept = set(cache.memory.episodes.position[0, : config.buffer_size].tolist())
    names = [field.name for field in fields(SegmentTrace) if field.name in stats and field.name != "stored"]
    return SegmentTrace(
        end=cache.lengths[0],
        left_window=len(left),
        written=len(left & kept),
        stored=stats["stored"][0],
        **{name: stats[name] for name in names},
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list) else value
