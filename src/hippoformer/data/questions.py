"""Questions about texts, one a line of a .jsonl file: {"context", "question", "answers"}.

`python -m evaluation.questions` of a checkout writes such files from NarrativeQA, SCROLLS, BABILong and bAbI.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hippoformer.errors import ConfigurationError, TextError


@dataclass(frozen=True)
class Question:
    """One question about a text (context); every answer is right.

    `reasons` are the sentences of the text that the answer follows from, where the data lists them.
    """

    name: str
    context: str
    question: str
    answers: tuple[str, ...]
    reasons: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """How it is put after its context; a blank and the answer follow."""
        return f"\n\nQuestion: {self.question}\nAnswer:"


def make_question(
    name: str, context: str, question: str, answers: Iterable[str], reasons: tuple[str, ...] = ()
) -> Question:
    """A question without its empty answers; TextError without context, question or answer."""
    kept = tuple(answer for answer in answers if isinstance(answer, str) and answer.strip())
    if not kept or not context.strip() or not question.strip():
        raise TextError(f"{name}: a question needs a context, a question and an answer; one of them is empty")
    return Question(name, context, question, kept, reasons)


def read_questions(
    name: str | Path, split: str = "validation", data_dir: str | Path = "data", max_samples: int | None = None
) -> list[Question]:
    """The questions of a file; a single "answer" may stand for "answers".

    Args:
        name: of a .jsonl file, or of a data set with a local copy DATA_DIR/NAME/SPLIT.jsonl.
        max_samples: only the first of them.

    Raises:
        ConfigurationError: `max_samples` below 1. TextError: no such file, a damaged line, or no question.
    """
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(f"max_samples={max_samples}; expected at least 1, or none for all")
    path = Path(name) if str(name).endswith(".jsonl") else Path(data_dir) / name / f"{split}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} cannot be read ({error}); expected a .jsonl file in UTF-8") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"] if "answers" in row else [row["answer"]]
            found.append(make_question(f"{path.stem}:{number}", row["context"], row["question"], answers))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TextError(
                f"{path}, line {number}: {error!r}; expected an object with context, question, and answers or answer"
            ) from error
    if not found:
        raise TextError(f"{path} holds no question; expected one a line")
    return found[:max_samples]
