"""Questions about bAbI stories hidden in books, at several lengths: exact answers under each condition.

The texts are the books. An answer counts if every token of it is right; with --reply_tokens, if the last word of the
reply is the answer. `evaluation.questions.asking` has the conditions.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.babilong.stories import hidden_questions, sentences
from evaluation.common.results import Result, Row
from evaluation.common.statistics import share
from evaluation.questions.asking import Reply, ask
from evaluation.questions.sources import write_questions
from hippoformer.data.documents import Document
from hippoformer.data.questions import Question
from hippoformer.errors import ConfigurationError
from hippoformer.text import token_ids


@dataclass
class Options:
    """Which stories, where they are hidden, and how they are asked for."""

    tasks: list[str] = field(
        default_factory=lambda: ["qa1", "qa2", "qa3"],
        metadata={"help": "qa1 to qa5 of bAbI; 10k-qa1 and its like: the larger set"},
    )
    lengths: list[int] = field(
        default_factory=lambda: [0, 1_000, 4_000, 16_000, 64_000],
        metadata={"help": "tokens of a text, at least; 0: the story alone"},
    )
    cases: list[int] = field(
        default_factory=lambda: [25], metadata={"help": "questions of each task, one number or one for each length"}
    )
    windows: list[int] = field(default_factory=list, metadata={"help": "windows of the base alone, for comparison"})
    reply_tokens: int = field(default=0, metadata={"help": "tokens a reply may have; 0: the answer must come at once"})
    reread_tokens: int = field(
        default=256, metadata={"help": "also answer after re-reading N retrieved tokens (0 = off)"}
    )
    babi_split: str = field(default="test", metadata={"help": "train or test"})
    babi_dir: Path = field(default=Path("data"), metadata={"help": "folder that holds the bAbI tasks"})
    batch_size: int = field(default=5, metadata={"help": "texts read side by side"})
    write: Path | None = field(
        default=None, metadata={"help": "write questions to train on, with other stories at every length, and ask none"}
    )
    reasons: bool = field(default=False, metadata={"help": "written answers begin with the sentences they follow from"})
    seed: int = field(default=0, metadata={"help": "of stories, books and places"})

    def check(self) -> None:
        """Raises ConfigurationError for a number out of range, or tasks and lengths that are not each there once."""
        numbers = [self.batch_size, *self.windows, *self.cases, self.reply_tokens + 1, self.reread_tokens + 1]
        unique = len(set(self.tasks)) == len(self.tasks) > 0 and len(set(self.lengths)) == len(self.lengths) > 0
        if not unique or min(numbers) < 1 or len(self.cases) not in (1, len(self.lengths)):
            raise ConfigurationError(
                f"{self}; expected tasks and lengths, each once, positive numbers, and one or all numbers of cases"
            )


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """The share of right answers and the nats of the answer under each condition, for every task and length.

    Raises:
        ConfigurationError: an option out of range. TextError: a task that is not available, or books without sentences.
    """
    options.check()
    ids, books = partial(token_ids, tokenizer), [sentences(book.text) for book in documents]
    counts = options.cases * len(options.lengths) if len(options.cases) == 1 else options.cases
    found: dict[tuple[str, int], list[Question]] = {}
    for number, (n_tokens, samples) in enumerate(zip(options.lengths, counts, strict=True)):
        seed = random.Random(f"{options.seed}/{number}").randrange(2**32) if options.write else options.seed
        place = (n_tokens, samples, lambda text: len(ids(text)), seed, options.babi_dir)
        for task in options.tasks:
            found[task, n_tokens] = hidden_questions(task, options.babi_split, books, *place)
    if options.write is not None:
        questions = [_reasoned(one) if options.reasons else one for of in found.values() for one in of]
        random.Random(options.seed).shuffle(questions)
        write_questions(options.write, questions)
        return Result([Row("questions", "written", len(questions))])
    rows: list[Row] = []
    details: list[dict[str, Any]] = []
    for n_tokens in sorted(options.lengths, reverse=True):  # too little memory for the longest shows at once
        for task in options.tasks:
            questions = found[task, n_tokens]
            longest = max(len(ids(f" {one.answers[0]}")) for one in questions)
            how = (options.reply_tokens or longest, options.batch_size, options.reread_tokens, options.windows)
            replies = ask(model, tokenizer, questions, *how)
            right = {
                condition: [_right(r[condition], q, ids, options) for r, q in zip(replies, questions, strict=True)]
                for condition in replies[0]
            }
            cell = [
                Row(f"{task}, {n_tokens:,} tokens", f"{name}, right, %", *share(of), n=len(of))
                for name, of in right.items()
            ]
            for name in right:
                nats = [reply[name].nats for reply in replies]
                cell.append(Row(f"{task}, {n_tokens:,} tokens", f"{name}, nats", sum(nats) / len(nats), n=len(nats)))
            rows = [*cell, *rows]
            details += [
                {"name": question.name, "answer": question.answers[0]}
                | {name: {"said": one.line, "right": right[name][i], "nats": one.nats} for name, one in reply.items()}
                for i, (question, reply) in enumerate(zip(questions, replies, strict=True))
            ]
    return Result(rows, {"questions": details})


def _right(reply: Reply, question: Question, ids: Any, options: Options) -> bool:
    answer = question.answers[0]
    if options.reply_tokens:
        return _last_word(reply.line) == _last_word(answer)
    wanted = ids(f" {answer}")
    return reply.ids[: len(wanted)] == wanted


def _last_word(line: str) -> str:
    return (line.split() or [""])[-1].strip(".,;:!?\"'").lower()


def _reasoned(question: Question) -> Question:
    return replace(question, answers=tuple(" ".join((*question.reasons, answer)) for answer in question.answers))
