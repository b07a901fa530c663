"""Exact recall: facts planted in long text, asked for thousands of tokens later.

Each haystack is one stream: a document, continued by the next ones where it is too short. Facts are planted one after
another from its beginning on, close together or all along the way (`spacing`), and each is asked for once it lies so
many tokens back, for every distance in turn (see `examination`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.examination import Asked, ask, plan
from hippoformer.evaluation.needles import ALL_KINDS, KINDS
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, with_range
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.statistics import LEVEL, share

SPACING = 384  # tokens of the document before the first fact and between two facts


@dataclass(frozen=True)
class RecallReport(Report):
    """All questions, and where the numbers came from.

    Attributes:
        model: what was measured. settings: options. asked: every question.
        state_nbytes: bytes of a row's state at the end of each stream.
    """

    FORMAT: ClassVar[str] = "hippoformer.recall/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    asked: tuple[Asked, ...]
    state_nbytes: int
    provenance: dict[str, Any]

    def cells(self) -> list[dict[str, Any]]:
        """Per kind and distance: cases, share right with and without memory, its interval, answer tokens kept."""
        return cells(self.asked)

    def content(self) -> dict[str, Any]:
        """With the cells."""
        return super().content() | {"cells": self.cells()}

    def to_table(self) -> Table:
        """One line a cell, for a terminal."""
        caption = (
            f"exact answers, greedy; [{LEVEL:.0%} Wilson intervals]; {self.state_nbytes / 1e6:.1f} MB of state a row"
        )
        table = Table(title=Text(f"Recall of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("fact")
        reread = ["right, reread"] if self.settings["reread_tokens"] else []
        for heading in (
            "tokens ago",
            "cases",
            "right",
            "right, memory off",
            "answer kept",
            "nats",
            "nats off",
            *reread,
        ):
            table.add_column(heading, justify="right")
        for cell in self.cells():
            again = [cell[f"{name}_reread"] for name in ("right", "low", "high")] if reread else []
            table.add_row(
                cell["kind"],
                f"{cell['distance']:,}",
                str(cell["cases"]),
                Text(f"{cell['right']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"),
                f"{cell['right_off']:.0%}",
                f"{cell['kept']:.0%}",
                f"{cell['nats']:.2f}",
                f"{cell['nats_off']:.2f}",
                *([Text(with_range("{:.0%}", *again))] if again else []),
            )
        return table


def cells(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    """Per kind and distance: cases, share right with and without memory, its interval, answer tokens kept; and what was
    right after rereading, where that was asked.
    """
    found: list[dict[str, Any]] = []
    for kind, distance in sorted(
        {(a.kind, a.asked_distance) for a in asked}, key=lambda c: (ALL_KINDS.index(c[0]), c[1])
    ):
        cases = [a for a in asked if (a.kind, a.asked_distance) == (kind, distance)]
        right, low, high = share([a.right for a in cases])
        found.append(
            {
                "kind": kind,
                "distance": distance,
                "cases": len(cases),
                "right": right,
                "low": low,
                "high": high,
                "right_off": sum(a.right_off for a in cases) / len(cases),
                "kept": sum(a.kept for a in cases) / sum(a.answer_tokens for a in cases),
                "nats": sum(a.nats for a in cases) / len(cases),
                "nats_off": sum(a.nats_off for a in cases) / len(cases),
            }
        )
        again = [(a.right_reread, a.nats_reread) for a in cases if a.right_reread is not None]
        if again:
            right, low, high = share([bool(one) for one, _ in again])
            nats = sum(value for _, value in again if value is not None) / len(again)
            found[-1] |= {"right_reread": right, "low_reread": low, "high_reread": high, "nats_reread": nats}
    return found


def evaluate_recall(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    distances: Sequence[int] = (2_000, 8_000, 32_000),
    facts: int = 9,
    kinds: Sequence[str] = KINDS,
    haystacks: int | None = None,
    spacing: int = SPACING,
    reread_tokens: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> RecallReport:
    """Plants facts in long streams and asks for them later.

    Args:
        model: a HippoFormer. tokenizer: its tokenizer.
        documents: haystack i begins with document i and goes on with those after it, round and round.
        distances: tokens between the end of a fact and its question; met within 512 tokens.
        facts: of each kind in each haystack. kinds: some of `needles.ALL_KINDS`.
        haystacks: streams, read side by side; as many as documents where it is None.
        spacing: tokens of the document before the first fact and between two facts.
        reread_tokens: of what is remembered of a question, read again before it is asked once more; 0: it is not.
        seed: of the facts.
        progress: called with (tokens read, tokens in all).
        command: recorded in the report.

    Raises:
        ConfigurationError: an unknown kind or a number out of range. TextError: no text.
    """
    if reread_tokens < 0:
        raise ConfigurationError(f"reread_tokens={reread_tokens}; expected 0 for none, or how many")
    examination = plan(tokenizer, documents, distances, facts, kinds, haystacks, spacing, seed)
    asked: list[Asked] = []
    cache = model.new_cache(examination.rows)
    with reading(model):
        for piece, read, ready in examination.pieces(model.device):
            model.score(piece, past_key_values=cache)
            if ready:
                asked += ask(model, cache, ready, read, reread_tokens=reread_tokens)
            if progress is not None:
                progress(read * examination.rows, examination.ids.numel())
    return RecallReport(
        model=describe(model),
        settings=examination.settings | {"reread_tokens": reread_tokens},
        asked=tuple(asked),
        state_nbytes=cache.nbytes // examination.rows,
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )
