"""Exact recall: facts planted in long text, asked for thousands of tokens later.

Each haystack is one stream: a document, continued by the next ones where it is too short. Facts are planted one after
another from its beginning on, close together or all along the way (`spacing`), and each is asked for once it lies so
many tokens back, for every distance in turn. A
question is put to a copy of the state, so that asking leaves the stream as it was; the answer is decoded greedily and
counts if every token of it is right. The same question is put to the same copy with the memory off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.generation import left_padded
from hippoformer.evaluation.needles import KINDS, PIECE, Needle, Planted, haystack
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.statistics import LEVEL

SPACING = 384  # tokens of the document before the first fact and between two facts


@dataclass(frozen=True)
class Asked:
    """One question and what was answered.

    Attributes:
        haystack: number of the stream. kind: of the fact.
        position: of the answer's first token in the stream. distance: tokens read between statement and question.
        asked_distance: the cell it belongs to.
        kept: tokens of the answer whose episodes are still remembered. answer_tokens: of the answer.
        right, right_off: every token decoded with the memory, and without it, is that of the answer.
        nats, nats_off: -log p of the whole answer.
    """

    haystack: int
    kind: str
    position: int
    asked_distance: int
    distance: int
    kept: int
    answer_tokens: int
    right: bool
    right_off: bool
    nats: float
    nats_off: float


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
        cells = []
        for kind, distance in sorted(
            {(a.kind, a.asked_distance) for a in self.asked}, key=lambda c: (KINDS.index(c[0]), c[1])
        ):
            cases = [a for a in self.asked if (a.kind, a.asked_distance) == (kind, distance)]
            right = sum(a.right for a in cases)
            interval = binomtest(right, len(cases)).proportion_ci(LEVEL, "wilson")
            cells.append(
                {
                    "kind": kind,
                    "distance": distance,
                    "cases": len(cases),
                    "right": right / len(cases),
                    "low": float(interval.low),
                    "high": float(interval.high),
                    "right_off": sum(a.right_off for a in cases) / len(cases),
                    "kept": sum(a.kept for a in cases) / sum(a.answer_tokens for a in cases),
                    "nats": sum(a.nats for a in cases) / len(cases),
                    "nats_off": sum(a.nats_off for a in cases) / len(cases),
                }
            )
        return cells

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
        for heading in ("tokens ago", "cases", "right", "right, memory off", "answer kept", "nats", "nats off"):
            table.add_column(heading, justify="right")
        for cell in self.cells():
            table.add_row(
                cell["kind"],
                f"{cell['distance']:,}",
                str(cell["cases"]),
                Text(f"{cell['right']:.0%} [{cell['low']:.0%}, {cell['high']:.0%}]"),
                f"{cell['right_off']:.0%}",
                f"{cell['kept']:.0%}",
                f"{cell['nats']:.2f}",
                f"{cell['nats_off']:.2f}",
            )
        return table


def evaluate_recall(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    distances: Sequence[int] = (2_000, 8_000, 32_000),
    facts: int = 9,
    kinds: Sequence[str] = KINDS,
    haystacks: int | None = None,
    spacing: int = SPACING,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> RecallReport:
    """Plants facts in long streams and asks for them later.

    Args:
        model: a HippoFormer. tokenizer: its tokenizer.
        documents: haystack i begins with document i and goes on with those after it, round and round.
        distances: tokens between the end of a fact and its question; met within 512 tokens.
        facts: of each kind in each haystack. kinds: some of `KINDS`.
        haystacks: streams, read side by side; as many as documents where it is None.
        spacing: tokens of the document before the first fact and between two facts.
        seed: of the facts.
        progress: called with (tokens read, tokens in all).
        command: recorded in the report.

    Raises:
        ConfigurationError: an unknown kind or a number out of range. TextError: no text.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if (
        unknown
        or not kinds
        or facts < 1
        or spacing < 1
        or not distances
        or min(distances) < 1
        or (haystacks is not None and haystacks < 1)
    ):
        raise ConfigurationError(
            f"kinds={list(kinds)}, facts={facts}, distances={list(distances)}, haystacks={haystacks}, "
            f"spacing={spacing}; expected kinds among {', '.join(KINDS)} and positive numbers."
        )
    streams, planted = zip(
        *(
            haystack(tokenizer, documents, number, facts, kinds, spacing, max(distances), seed)
            for number in range(haystacks or len(documents))
        ),
        strict=True,
    )
    length = min(len(ids) for ids in streams)
    ids = torch.tensor([stream[:length] for stream in streams], device=model.device)
    due = sorted(
        ((p.end + distance, distance, p) for row in planted for p in row for distance in distances),
        key=lambda question: question[:2],
    )
    asked: list[Asked] = []
    cache = model.new_cache(len(streams))
    with reading(model):
        for start in range(0, length, PIECE):
            piece = ids[:, start : start + PIECE]
            model.score(piece, past_key_values=cache)
            read = start + piece.shape[1]
            ready = [(distance, p) for when, distance, p in due if when <= read]
            due = due[len(ready) :]
            if ready:
                asked += _ask(model, cache, ready, read)
            if progress is not None:
                progress(read * len(streams), length * len(streams))
    return RecallReport(
        model=describe(model),
        settings={
            "distances": list(distances),
            "facts": facts,
            "kinds": list(kinds),
            "haystacks": len(streams),
            "spacing": spacing,
            "tokens_read": length,
            "seed": seed,
        },
        asked=tuple(asked),
        state_nbytes=cache.nbytes // len(streams),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def _ask(model: Any, cache: Any, ready: list[tuple[int, Planted]], read: int) -> list[Asked]:
    """Puts all questions that are due to copies of the state, side by side."""
    rows = torch.tensor([p.haystack for _, p in ready])
    needles = [p.needle for _, p in ready]
    with_memory = answers(model, cache.select_rows(rows), needles)
    with model.memory_off():
        without = answers(model, cache.select_rows(rows), needles)
    remembered = {row: {e.position for e in cache.episodes(row)} for row in set(rows.tolist())}
    return [
        Asked(
            haystack=p.haystack,
            kind=p.needle.kind,
            position=p.answer.start,
            asked_distance=distance,
            distance=read - p.end,
            kept=len(remembered[p.haystack] & set(p.answer)),
            answer_tokens=len(p.answer),
            right=on[0] == p.needle.answer,
            right_off=off[0] == p.needle.answer,
            nats=on[1],
            nats_off=off[1],
        )
        for (distance, p), on, off in zip(ready, with_memory, without, strict=True)
    ]


def answers(model: Any, cache: Any, needles: Sequence[Needle]) -> list[tuple[list[int], float]]:
    """What each row says after its question, as many tokens as the answer has, and -log p of the answer (nats)."""
    judged = cache.copy()
    decoded: list[list[int]] = [[] for _ in needles]
    tokens, mask = left_padded([needle.question for needle in needles], model.device)
    for _ in range(max(len(needle.answer) for needle in needles)):
        logits = model(tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        tokens = logits.argmax(-1, keepdim=True)
        mask = torch.ones_like(tokens)
        for row, token in enumerate(tokens.flatten().tolist()):
            decoded[row].append(token)
    together = [[*needle.question, *needle.answer] for needle in needles]
    tokens, mask = left_padded(together, model.device)
    log_probs = model.score(tokens, attention_mask=mask, past_key_values=judged)
    return [
        (said[: len(needle.answer)], -float(row[-len(needle.answer) :].double().sum()))
        for said, needle, row in zip(decoded, needles, log_probs, strict=True)
    ]
