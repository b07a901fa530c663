"""Answers to questions about long texts, memory on and off.

The text is read from an empty memory, then the question, and the answer is decoded greedily up to the end of its line.
A base model was never taught to answer, so absolute figures say little; all conditions get the same prompt, and what
counts is the difference. Under `reread` a copy of the state first reads again what is remembered of the question, and
the base alone answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.table import Table
from rich.text import Text

from hippoformer.data.questions import Question
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.generation import continued, decoded, first_line, read_texts, reminded
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.quality import Difference, differences, means, shown_test
from hippoformer.evaluation.report import Report, shown
from hippoformer.evaluation.scoring import describe, reading
from hippoformer.evaluation.statistics import RESAMPLES, Interval
from hippoformer.evaluation.text_metrics import TEXT_METRICS, best_answer
from hippoformer.text import start_tokens, token_ids

_READ_ONCE = ("memory", "off")


@dataclass(frozen=True)
class QuestionsReport(Report):
    """Every metric under each condition, and every answer.

    Attributes:
        source: which questions. conditions: condition -> metric -> mean. differences: metric -> memory minus off.
        reread_differences: metric -> reread minus off; empty where nothing was read again.
        asked: name, tokens read, question, accepted answers, and what was answered under each condition.
    """

    FORMAT: ClassVar[str] = "hippoformer.questions/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    source: str
    conditions: dict[str, dict[str, Interval]]
    differences: dict[str, Difference]
    reread_differences: dict[str, Difference]
    asked: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a metric."""
        tokens = [row["tokens_read"] for row in self.asked]
        caption = f"{len(self.asked)} questions of {self.source}, {min(tokens):,} to {max(tokens):,} tokens read"
        table = Table(title=Text(f"Answers by {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("metric")
        compared = {"memory": self.differences} | (
            {"reread": self.reread_differences} if self.reread_differences else {}
        )
        for heading in (*self.conditions, *(f"{name} - off, p, effect" for name in compared)):
            table.add_column(heading, justify="right")
        for metric in TEXT_METRICS:
            cells = [shown("{:.3f}", of[metric]) for of in self.conditions.values()]
            for of in compared.values():
                cells.append("; ".join((shown("{:.3f}", of[metric].difference), *shown_test(of[metric].test))))
            table.add_row(*(Text(cell) for cell in (metric, *cells)))
        return table


def evaluate_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    source: str,
    new_tokens: int = 24,
    limit_tokens: int | None = None,
    batch_size: int = 4,
    reread_tokens: int = 0,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> QuestionsReport:
    """Asks each question after its text, with and without memory.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        questions, source: what is asked, and where it came from.
        new_tokens: of an answer, at most. limit_tokens: of the text; what is longer is cut at its end.
        batch_size: questions side by side. reread_tokens: that are read again under `reread`; 0: not asked.
        seed, resamples: of the bootstrap over questions.
        progress: called with (answers given, in all). command: recorded in the report.

    Raises:
        ConfigurationError: a number below 1, or `reread_tokens` below 0. TextError: no question.
    """
    if min(new_tokens, batch_size, 1 if limit_tokens is None else limit_tokens, reread_tokens + 1) < 1:
        raise ConfigurationError("new_tokens, batch_size and limit_tokens must be at least 1, reread_tokens at least 0")
    if not questions:
        raise TextError("there is no question to ask")
    start = start_tokens(tokenizer)
    texts = [[*start, *token_ids(tokenizer, asked.context)[:limit_tokens]] for asked in questions]
    asking = [token_ids(tokenizer, asked.prompt) for asked in questions]
    cues = [token_ids(tokenizer, asked.question) for asked in questions]
    prompts = [[*text, *question] for text, question in zip(texts, asking, strict=True)]
    conditions = (*_READ_ONCE, *(["reread"] if reread_tokens else []))
    # Side by side go prompts of like length, so that few rows idle.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[str, dict[int, str]] = {condition: {} for condition in conditions}
    done = 0
    with reading(model):
        for low in range(0, len(order), batch_size):
            chosen = order[low : low + batch_size]
            for condition in conditions:
                if condition == "reread":
                    cache = read_texts(model, [texts[i] for i in chosen])
                    with model.memory_off():
                        cache = reminded(cache, [cues[i] for i in chosen], reread_tokens)
                        made = decoded(model, cache, [asking[i] for i in chosen], new_tokens)
                else:
                    made, _ = continued(model, [prompts[i] for i in chosen], new_tokens, memory=condition == "memory")
                for i, ids in zip(chosen, made, strict=True):
                    answers[condition][i] = first_line(tokenizer, ids)
                done += len(chosen)
                if progress is not None:
                    progress(done, len(conditions) * len(order))
    scores = {
        condition: [best_answer(given[i], asked.answers) for i, asked in enumerate(questions)]
        for condition, given in answers.items()
    }
    return QuestionsReport(
        model=describe(model),
        settings={
            "new_tokens": new_tokens,
            "limit_tokens": limit_tokens,
            "batch_size": batch_size,
            "reread_tokens": reread_tokens,
            "seed": seed,
            "resamples": resamples,
        },
        source=source,
        conditions={condition: means(of, seed, resamples) for condition, of in scores.items()},
        differences=differences(scores["memory"], scores["off"], seed, resamples),
        reread_differences=differences(scores["reread"], scores["off"], seed, resamples) if reread_tokens else {},
        asked=[
            {
                "name": asked.name,
                "tokens_read": len(prompts[i]),
                "question": asked.question,
                "answers": list(asked.answers),
                **{condition: given[i] for condition, given in answers.items()},
            }
            for i, asked in enumerate(questions)
        ],
        provenance=provenance(seed=seed, command=command),
    )
