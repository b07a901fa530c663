"""Answers to questions about long texts, with memory, without, and after rereading: see `evaluation.questions.asking`.

A base model was never taught to answer: absolute figures say little, the difference between conditions counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap
from evaluation.quality.metrics import text_scores
from evaluation.quality.run import compare, means
from evaluation.questions.asking import ask
from evaluation.questions.sources import named_questions, write_questions
from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError


@dataclass
class Options:
    """Which questions, and how they are answered."""

    questions: list[str] = field(
        default_factory=list,
        metadata={"help": "narrativeqa, scrolls-TASK, babilong-4k-qa1, babi-qa1, or a .jsonl file"},
    )
    questions_split: str = field(default="validation", metadata={"help": "which part of a data set"})
    questions_dir: Path = field(default=Path("data"), metadata={"help": "folder of local copies of data sets"})
    samples: int | None = field(default=None, metadata={"help": "ask the first N questions of each"})
    write: Path | None = field(default=None, metadata={"help": "write the questions to this .jsonl file, ask none"})
    new_tokens: int = field(default=24, metadata={"help": "tokens of an answer, at most"})
    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens of each text"})
    batch_size: int = field(default=4, metadata={"help": "questions side by side"})
    reread_tokens: int = field(
        default=0, metadata={"help": "also answer after re-reading N retrieved tokens (0 = off)"}
    )
    seed: int = field(default=0, metadata={"help": "of the bootstrap over questions"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Every text metric under each condition, against the accepted answer that suits best; documents are not read.

    Raises:
        ConfigurationError: no question was named, or a number out of range. TextError: questions not available.
    """
    numbers = [1 if n is None else n for n in (options.samples, options.limit_tokens)]
    if not options.questions or min(options.new_tokens, options.batch_size, options.reread_tokens + 1, *numbers) < 1:
        raise ConfigurationError(f"{options}; expected the name of some questions, and numbers of at least 1")
    place = (options.questions_split, options.questions_dir, options.samples)
    questions = [question for name in options.questions for question in named_questions(name, *place)]
    if options.write is not None:
        write_questions(options.write, questions)
        return Result([Row("questions", "written", len(questions))])
    how = (options.new_tokens, options.batch_size, options.reread_tokens, (), options.limit_tokens)
    replies = ask(model, tokenizer, questions, *how)
    rows, scores = [], {}
    for condition in replies[0]:
        said = [(reply[condition], asked) for reply, asked in zip(replies, questions, strict=True)]
        scores[condition] = np.array([list(text_scores(r.line, q.answers).values()) for r, q in said])
        rows += means(condition, scores[condition], options.seed)
        nats = [reply.nats for reply, _ in said]
        rows.append(Row(condition, "nats of the answer", *bootstrap(np.mean, nats, seed=options.seed), n=len(nats)))
    for condition in scores:
        if condition != "off":
            rows += compare(f"{condition} - off", scores[condition], scores["off"], options.seed)
    told = [
        {"name": asked.name, "question": asked.question, "answers": list(asked.answers)}
        | {"said": {condition: one.line for condition, one in reply.items()}}
        for asked, reply in zip(questions, replies, strict=True)
    ]
    return Result(rows, {"questions": told})
