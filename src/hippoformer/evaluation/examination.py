"""Questions about facts in long streams: what is planted, when each is asked for, and what the answer is worth.

A question is put to a copy of the state, so that asking leaves the stream as it was; the answer is decoded greedily and
counts if every token of it is right. The same question is put to the same copy with the memory off, and, where that is
asked for, to one that has read again what it remembers of the question, which the base alone then answers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.generation import decoded, reminded
from hippoformer.evaluation.needles import ALL_KINDS, PIECE, Planted, haystack
from hippoformer.model.rereading import left_padded

# What was said, and -log p of what should have been.
Answer = tuple[list[int], float]


class Posed(Protocol):
    """A question and its answer as token ids."""

    @property
    def question(self) -> list[int]:
        """What is read; the answer continues it."""

    @property
    def answer(self) -> list[int]:
        """The tokens that must come next."""


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
        right_reread, nats_reread: by the base alone after rereading; None where that was not asked for.
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
    right_reread: bool | None = None
    nats_reread: float | None = None


@dataclass(frozen=True)
class Examination:
    """What is read, and what is asked when.

    Attributes:
        ids: (R, L) of the streams. due: (tokens read, distance, fact), in the order of asking.
        settings: what it was made from, for the report.
    """

    ids: Tensor
    due: list[tuple[int, int, Planted]]
    settings: dict[str, Any]

    @property
    def rows(self) -> int:
        """R."""
        return self.ids.shape[0]

    def pieces(self, device: torch.device) -> Iterator[tuple[Tensor, int, list[tuple[int, Planted]]]]:
        """(R, n) ids to read next, tokens read with them, and (distance, fact) of the questions due by then."""
        read = 0
        for piece in self.ids.to(device).split(PIECE, dim=1):
            before, read = read, read + piece.shape[1]
            yield piece, read, [(distance, p) for when, distance, p in self.due if before < when <= read]


def plan(
    tokenizer: Any,
    documents: Sequence[Document],
    distances: Sequence[int],
    facts: int,
    kinds: Sequence[str],
    haystacks: int | None,
    spacing: int,
    seed: int,
) -> Examination:
    """Plants the facts; the arguments are those of `evaluate_recall`."""
    unknown = sorted(set(kinds) - set(ALL_KINDS))
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
            f"spacing={spacing}; expected kinds among {', '.join(ALL_KINDS)} and positive numbers."
        )
    streams, planted = zip(
        *(
            haystack(tokenizer, documents, number, facts, kinds, spacing, max(distances), seed)
            for number in range(haystacks or len(documents))
        ),
        strict=True,
    )
    length = min(len(ids) for ids in streams)
    due = sorted(
        ((p.end + distance, distance, p) for row in planted for p in row for distance in distances),
        key=lambda question: question[:2],
    )
    settings = {
        "distances": list(distances),
        "facts": facts,
        "kinds": list(kinds),
        "haystacks": len(streams),
        "spacing": spacing,
        "tokens_read": length,
        "seed": seed,
    }
    return Examination(torch.tensor([stream[:length] for stream in streams]), due, settings)


def ask(
    model: Any,
    cache: Any,
    ready: list[tuple[int, Planted]],
    read: int,
    without: list[Answer] | None = None,
    reread_tokens: int = 0,
) -> list[Asked]:
    """Puts all questions that are due to copies of the state, side by side.

    Args:
        ready: (distance, fact). read: tokens so far.
        without: what `unaided` gave, where it is known.
        reread_tokens: to read again before each question; 0: this is not asked.
    """
    rows = torch.tensor([p.haystack for _, p in ready])
    needles = [p.needle for _, p in ready]
    with_memory = answers(model, cache.select_rows(rows), needles)
    again: list[Answer] | list[tuple[None, None]] = [(None, None)] * len(ready)
    if reread_tokens:
        questions = [needle.question for needle in needles]
        with model.memory_off():
            again = answers(model, reminded(cache.select_rows(rows), questions, reread_tokens), needles)
    without = unaided(model, cache, ready) if without is None else without
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
            right_reread=None if reread[0] is None else reread[0] == p.needle.answer,
            nats_reread=reread[1],
        )
        for (distance, p), on, off, reread in zip(ready, with_memory, without, again, strict=True)
    ]


def unaided(model: Any, cache: Any, ready: list[tuple[int, Planted]]) -> list[Answer]:
    """The answers with the memory off."""
    rows = torch.tensor([p.haystack for _, p in ready])
    with model.memory_off():
        return answers(model, cache.select_rows(rows), [p.needle for _, p in ready])


def answers(model: Any, cache: Any, posed: Sequence[Posed]) -> list[Answer]:
    """What each row says after its question, as many tokens as the answer has, and -log p of the answer (nats)."""
    nats = answer_nats(model, cache.copy(), posed)
    found = decoded(model, cache, [one.question for one in posed], max(len(one.answer) for one in posed))
    return [(said[: len(one.answer)], value) for said, one, value in zip(found, posed, nats, strict=True)]


def answer_nats(model: Any, cache: Any, posed: Sequence[Posed]) -> list[float]:
    """-log p of each answer after its question (nats); `cache` goes on."""
    together = [[*one.question, *one.answer] for one in posed]
    tokens, mask = left_padded(together, model.device)
    log_probs = model.score(tokens, attention_mask=mask, past_key_values=cache)
    return [-float(row[-len(one.answer) :].double().sum()) for one, row in zip(posed, log_probs, strict=True)]
