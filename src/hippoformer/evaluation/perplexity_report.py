"""What an evaluation of perplexity found: per condition, per document, and as a table."""

import dataclasses
import math
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from hippoformer.evaluation.report import Report, changes, with_range
from hippoformer.evaluation.statistics import Interval, PairedComparison


@dataclasses.dataclass(frozen=True)
class DocumentResult:
    """One document under every condition.

    Attributes:
        title, source: of the document.
        tokens_read: length of the stream, start token included.
        tokens_scored: tokens with a probability of their own in the sums.
        words, utf8_bytes: of the text that the scored tokens cover.
        other_tokens: tokens of other documents read before it under other-document; None where that was not run.
        nll: condition → sum of −log p of the scored tokens, in nats.
    """

    title: str
    source: str
    tokens_read: int
    tokens_scored: int
    words: int
    utf8_bytes: int
    other_tokens: int | None
    nll: dict[str, float]


@dataclasses.dataclass(frozen=True)
class ConditionResult:
    """All documents under one condition.

    Attributes:
        condition: its name.
        nll: sum of −log p over all scored tokens, in nats.
        tokens_scored, tokens_read, words, utf8_bytes: sums over the documents.
        token_perplexity: with its interval; comparable only between models with the same tokenizer.
        window_nbytes, memory_nbytes: largest bytes of state of one row: window keys and values, and memory.
        seconds: wall time of reading, together with the other conditions.
        against_off: paired comparison with the condition off; None for off itself or where off was not run.
    """

    condition: str
    nll: float
    tokens_scored: int
    tokens_read: int
    words: int
    utf8_bytes: int
    token_perplexity: Interval
    window_nbytes: int
    memory_nbytes: int
    seconds: float
    against_off: PairedComparison | None

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats per whitespace word), comparable between tokenizers; None without words or beyond a float."""
        if not self.words or self.nll / self.words > 700:
            return None
        return math.exp(self.nll / self.words)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per UTF-8 byte of the scored text, comparable between tokenizers; None for an empty text."""
        return self.nll / math.log(2) / self.utf8_bytes if self.utf8_bytes else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_read / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "nats_per_token": self.nll / self.tokens_scored,
            "word_perplexity": self.word_perplexity,
            "bits_per_byte": self.bits_per_byte,
            "state_nbytes": self.window_nbytes + self.memory_nbytes,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclasses.dataclass(frozen=True)
class PerplexityReport(Report):
    """Everything one evaluation found, and where it came from.

    Attributes:
        model: base model, window, sinks, segment, buffer, dtype, device, and the whole configuration.
        settings: the options of the evaluation.
        conditions: one result a condition, in the order asked for.
        documents: one result a document, in the order of the list.
        left_out: titles of documents too short to score a token of.
        provenance: see `hippoformer.evaluation.provenance`.
    """

    FORMAT: ClassVar[str] = "hippoformer.perplexity/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    conditions: tuple[ConditionResult, ...]
    documents: tuple[DocumentResult, ...]
    left_out: tuple[str, ...]
    provenance: dict[str, Any]

    def __getitem__(self, condition: str) -> ConditionResult:
        """The result of a condition by its name.

        Raises:
            KeyError: the condition was not run.
        """
        for result in self.conditions:
            if result.condition == condition:
                return result
        raise KeyError(condition)

    def content(self) -> dict[str, Any]:
        """Conditions by their names, with the figures that follow from the sums."""
        return super().content() | {"conditions": {result.condition: result.to_dict() for result in self.conditions}}

    def to_table(self) -> Table:
        """One line a condition, for a terminal."""
        first = self.conditions[0]
        caption = (
            f"{len(self.documents)} documents, {first.tokens_scored:,} scored tokens, {first.words:,} words; "
            f"window {self.model['window']} + {self.model['sink_tokens']} sinks, "
            f"segments of {self.model['segment_len']}, buffer {self.model['buffer_size']}; "
            f"[{self.settings['level']:.0%} bootstrap intervals over documents]"
        )
        if self.left_out:
            caption += f"; {len(self.left_out)} documents too short to score"
        # Text, not str: brackets would be read as markup.
        table = Table(title=Text(f"Perplexity of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("condition")
        for heading in (
            "token ppl",
            "against off",
            "better in",
            "word ppl",
            "bits/byte",
            "window kB",
            "memory kB",
            "tokens/s",
        ):
            table.add_column(heading, justify="right")
        for result in self.conditions:
            table.add_row(*(Text(cell) for cell in (result.condition, *_cells(result))))
        return table


def _cells(result: ConditionResult) -> list[str]:
    perplexity, compared = result.token_perplexity, result.against_off
    words, bits = result.word_perplexity, result.bits_per_byte
    return [
        with_range("{:.2f}", perplexity.estimate, perplexity.low, perplexity.high),
        "-" if compared is None else with_range("{:+.1%}", *changes(compared.ratio)),
        "-" if compared is None else f"{compared.documents_better}/{compared.documents}",
        "-" if words is None else f"{words:.2f}",
        "-" if bits is None else f"{bits:.4f}",
        f"{result.window_nbytes / 1000:,.0f}",
        f"{result.memory_nbytes / 1000:,.0f}",
        f"{result.tokens_per_second:,.0f}",
    ]
