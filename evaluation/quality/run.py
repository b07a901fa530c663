"""How well the model writes on: continuations of held-out text against what really came next, memory on and off.

Each prompt is read from an empty memory and continued greedily; both conditions get the same prompts. A continuation
rarely says what the author said, so the scores are low for every model, and the difference counts.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, corrected, paired_test
from evaluation.quality.metrics import TEXT_METRICS, corpus_bleu, text_scores
from evaluation.questions.asking import continued, read_texts
from hippoformer.data.documents import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation import encode, reading

CONDITIONS = ("memory", "off")


@dataclass
class Options:
    """How much is read and written."""

    prompts: int = field(default=24, metadata={"help": "prompts: the openings of all documents, then later pieces"})
    context_tokens: int = field(default=1_536, metadata={"help": "tokens read before writing"})
    new_tokens: int = field(default=64, metadata={"help": "tokens written, and compared"})
    batch_size: int = field(default=8, metadata={"help": "prompts side by side"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap over prompts"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """BLEU, ROUGE, F1, exact match, repetition and speed under both conditions, and the paired difference.

    Raises:
        ConfigurationError: a number below 1. TextError: no document is long enough.
    """
    if min(options.prompts, options.context_tokens - 1, options.new_tokens, options.batch_size) < 1:
        raise ConfigurationError(f"{options}; expected at least 2 context_tokens, and positive numbers")
    size = options.context_tokens + options.new_tokens
    pieces: list[tuple[str, int, list[int]]] = []
    encoded = [encode(tokenizer, document, limit_tokens=size * options.prompts) for document in documents]
    for number in range(options.prompts):
        for document in encoded:
            ids = document.input_ids[number * size : (number + 1) * size].tolist()
            if len(ids) == size and len(pieces) < options.prompts:
                pieces.append((document.document.title, number * size + options.context_tokens, ids))
    if not pieces:
        raise TextError(f"no document has {size} tokens to read and continue; name longer texts or ask for fewer")
    prompts = [ids[: options.context_tokens] for _, _, ids in pieces]
    truth = [tokenizer.decode(ids[options.context_tokens :]) for _, _, ids in pieces]
    rows, texts, scores = [], {}, {}
    for condition in CONDITIONS:
        with reading(model), nullcontext() if condition == "memory" else model.memory_off():
            written, seconds = _written(model, prompts, options)
        texts[condition] = found = [tokenizer.decode(ids) for ids in written]
        scores[condition] = np.array(
            [list(text_scores(text, [true]).values()) for text, true in zip(found, truth, strict=True)]
        )  # (prompts, metrics)
        rows += [Row(condition, metric, score, n=len(pieces)) for metric, score in corpus_bleu(found, truth).items()]
        rows += means(condition, scores[condition], options.seed)
        rows += [
            Row(condition, "reading, tokens/s", len(pieces) * (options.context_tokens - 1) / seconds[0]),
            Row(condition, "writing, tokens/s", len(pieces) * options.new_tokens / seconds[1]),
        ]
    rows += compare("memory - off", scores["memory"], scores["off"], options.seed)
    samples = [
        {"title": title, "position": position, "truth": true, "prompt": tokenizer.decode(prompt)[-300:]}
        | {condition: of[number] for condition, of in texts.items()}
        for number, ((title, position, _), prompt, true) in enumerate(zip(pieces, prompts, truth, strict=True))
    ]
    return Result(rows, {"samples": samples})


def compare(condition: str, scores: np.ndarray, reference: np.ndarray, seed: int) -> list[Row]:
    """The mean difference of each metric over the same texts, (D, metrics) each, and paired tests (Holm)."""
    tests = corrected([paired_test(ours, theirs) for ours, theirs in zip(scores.T, reference.T, strict=True)])
    rows = means(condition, scores - reference, seed)
    for metric, test in zip(TEXT_METRICS, tests, strict=True):
        rows.append(Row(condition, f"{metric}, p", test.p if test.corrected is None else test.corrected, n=test.n))
        rows.append(Row(condition, f"{metric}, effect size", test.effect, n=test.n))
    return rows


def means(condition: str, scores: np.ndarray, seed: int) -> list[Row]:
    """The mean of each metric over texts, (D, metrics)."""
    return [
        Row(condition, metric, *bootstrap(np.mean, values, seed=seed), n=len(values))
        for metric, values in zip(TEXT_METRICS, scores.T, strict=True)
    ]


def _written(
    model: Any, prompts: Sequence[Sequence[int]], options: Options
) -> tuple[list[list[int]], tuple[float, float]]:
    """The continuations, and the seconds of reading and of writing all of them."""
    made, reading_seconds, writing_seconds = [], 0.0, 0.0
    for low in range(0, len(prompts), options.batch_size):
        batch = prompts[low : low + options.batch_size]
        began = time.perf_counter()
        cache = read_texts(model, [prompt[:-1] for prompt in batch])
        read = time.perf_counter()
        made += continued(model, cache, [prompt[-1:] for prompt in batch], options.new_tokens)
        reading_seconds, writing_seconds = reading_seconds + read - began, writing_seconds + time.perf_counter() - read
    return made, (reading_seconds, writing_seconds)
