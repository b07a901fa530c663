"""Exact recall: facts hidden in long streams, asked for thousands of tokens later.

Each stream is a document, continued by the next ones. A question is put to a copy of the state once its fact lies a
distance back, for every distance in turn; the greedily decoded answer counts if every token is right. Conditions:
`memory`; `off`, the same state with the memory off; `reread`, the base alone after reading N retrieved tokens again.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from evaluation.common.results import Result, Row
from evaluation.common.statistics import share
from evaluation.recall.needles import KINDS, PIECE, Needle, haystack
from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation import reading
from hippoformer.model.rereading import left_padded, reread


@dataclass
class Options:
    """What is hidden, and when it is asked for."""

    distances: list[int] = field(
        default_factory=lambda: [2_000, 8_000, 32_000], metadata={"help": "tokens from a fact to its question"}
    )
    facts: int = field(default=9, metadata={"help": "facts of each kind in each stream"})
    kinds: list[str] = field(default_factory=lambda: list(KINDS[:3]), metadata={"help": f"some of {', '.join(KINDS)}"})
    streams: int | None = field(default=None, metadata={"help": "read side by side; as many as documents"})
    spacing: int = field(default=384, metadata={"help": "tokens of text before each fact"})
    reread_tokens: int = field(
        default=0, metadata={"help": "also answer after re-reading N retrieved tokens (0 = off)"}
    )
    seed: int = field(default=0, metadata={"help": "of the facts"})

    def __post_init__(self) -> None:
        numbers = [self.facts, self.spacing, *self.distances, 1 if self.streams is None else self.streams]
        if (
            not self.kinds
            or not self.distances
            or {*self.kinds} - {*KINDS}
            or min(*numbers, self.reread_tokens + 1) < 1
        ):
            raise ConfigurationError(f"{self}; expected kinds among {', '.join(KINDS)} and positive numbers")


@dataclass(frozen=True)
class Answer:
    """Whether every token was right, -log p of the right answer (nats), and how many of its tokens are still stored."""

    row: int
    kind: str
    position: int
    asked_distance: int
    distance: int
    condition: str
    right: bool
    nats: float
    kept: int
    answer_tokens: int


@torch.no_grad()
def ask(model: Any, cache: Any, needles: Sequence[Needle]) -> list[tuple[bool, float]]:
    """Of each row of the state, whether its question is answered rightly, and -log p of the right answer (nats)."""
    together, mask = left_padded([[*needle.question, *needle.answer] for needle in needles], model.device)
    log_probs = model.score(together, attention_mask=mask, past_key_values=cache.copy())
    token, mask = left_padded([needle.question for needle in needles], model.device)
    said = []
    for _ in range(max(len(needle.answer) for needle in needles)):
        token = model(token, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        mask = torch.ones_like(token)
        said.append(token)
    return [
        (row[: len(needle.answer)] == needle.answer, -float(log_prob[-len(needle.answer) :].double().sum()))
        for row, needle, log_prob in zip(torch.cat(said, 1).tolist(), needles, log_probs, strict=True)
    ]


def answers(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> list[Answer]:
    """Reads the streams and asks every question.

    Raises:
        TextError: no text.
    """
    planned = (options.facts, options.kinds, options.spacing, max(options.distances), options.seed)
    rows = range(options.streams or max(1, len(documents)))
    made = [haystack(tokenizer, documents, row, *planned) for row in rows]
    streams, length = [ids for ids, _ in made], min(len(ids) for ids, _ in made)
    due = [(needle.end + ago, ago, needle) for _, hidden in made for needle in hidden for ago in options.distances]
    due.sort(key=lambda question: question[:2])
    cache, read, found = model.new_cache(len(streams)), 0, list[Answer]()
    with reading(model):
        for piece in torch.tensor([ids[:length] for ids in streams], device=model.device).split(PIECE, dim=1):
            model.score(piece, past_key_values=cache)
            before, read = read, read + piece.shape[1]
            if ready := [(distance, needle) for when, distance, needle in due if before < when <= read]:
                found += _answers(model, cache, ready, read, options.reread_tokens)
    return found


def _answers(
    model: Any, cache: Any, ready: Sequence[tuple[int, Needle]], read: int, reread_tokens: int
) -> list[Answer]:
    needles = [needle for _, needle in ready]
    rows = torch.tensor([needle.row for needle in needles])
    found = {"memory": ask(model, cache.select_rows(rows), needles)}
    with model.memory_off():
        found["off"] = ask(model, cache.select_rows(rows), needles)
        if reread_tokens:
            cues = left_padded([needle.question for needle in needles], model.device)
            found["reread"] = ask(model, reread(cache.select_rows(rows), *cues, n_tokens=reread_tokens), needles)
    remembered = {row: {episode.position for episode in cache.episodes(row)} for row in {*rows.tolist()}}
    answered = []
    for condition, of in found.items():
        for (distance, needle), (right, nats) in zip(ready, of, strict=True):
            stands = needle.answer_positions
            kept = len(remembered[needle.row] & {*stands})
            where = (needle.row, needle.kind, stands.start, distance, read - needle.end)
            answered.append(Answer(*where, condition, right, nats, kept, len(needle.answer)))
    return answered


def rows(found: Sequence[Answer]) -> list[Row]:
    """Per condition, kind and distance: exact answers with Wilson's interval, nats, and answer tokens still stored."""
    cells: dict[tuple[str, str, int], list[Answer]] = {}
    for answer in sorted(found, key=lambda answer: (KINDS.index(answer.kind), answer.asked_distance)):
        cells.setdefault((answer.condition, answer.kind, answer.asked_distance), []).append(answer)
    made = []
    for (condition, kind, distance), of in cells.items():
        name, n = f"{kind}, {distance:,} tokens ago", len(of)
        made += [
            Row(condition, f"{name}: right, %", *share([answer.right for answer in of]), n),
            Row(condition, f"{name}: nats", sum(answer.nats for answer in of) / n, n=n),
        ]
        if condition == "memory":
            kept = sum(answer.kept for answer in of) / sum(answer.answer_tokens for answer in of)
            made.append(Row(condition, f"{name}: answer stored, %", 100 * kept, n=n))
    return made


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Exact answers per kind and distance, with memory and without.

    Raises:
        TextError: no text.
    """
    found = answers(model, tokenizer, documents, options)
    return Result(rows(found), {"answers": [asdict(answer) for answer in found]})
