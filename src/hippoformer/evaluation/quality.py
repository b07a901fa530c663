"""How well the model writes on: continuations of held-out text against what really came next, memory on and off.

Each prompt is read from an empty memory and continued greedily. Both conditions get the same prompts, so texts are
compared in pairs. A continuation rarely says what the author said, so the scores are low for every model; what counts
is the difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from rich.table import Table
from rich.text import Text

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, TextError
from hippoformer.evaluation.generation import Speed, continued
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, shown
from hippoformer.evaluation.scoring import describe, encode, reading
from hippoformer.evaluation.significance import TestResult, corrected, paired_test
from hippoformer.evaluation.statistics import RESAMPLES, Interval, bootstrap_interval, mean_interval
from hippoformer.evaluation.text_metrics import CORPUS_METRICS, TEXT_METRICS, corpus_bleu, text_scores

CONDITIONS = ("memory", "off")
# Each resample of BLEU is a whole corpus score.
_BLEU_RESAMPLES = 200
_PROMPT_SHOWN = 300  # characters


@dataclass(frozen=True)
class Difference:
    """A metric with the memory minus without it, text by text, and whether that could be chance."""

    difference: Interval
    test: TestResult


@dataclass(frozen=True)
class QualityReport(Report):
    """Every metric under both conditions.

    Attributes:
        conditions: condition -> metric -> figure. differences: metric -> memory minus off.
        speed: of each condition. samples: what was written, beside the truth.
    """

    FORMAT: ClassVar[str] = "hippoformer.quality/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    conditions: dict[str, dict[str, Interval]]
    differences: dict[str, Difference]
    speed: dict[str, Speed]
    samples: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a metric."""
        speed = ", ".join(f"{name} {of.tokens_per_second:.1f} tokens/s" for name, of in self.speed.items())
        caption = f"{len(self.samples)} prompts of {self.settings['context_tokens']} tokens; {speed}"
        table = Table(title=Text(f"Continuations by {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("metric")
        for heading in (*CONDITIONS, "difference", "p, corrected", "effect"):
            table.add_column(heading, justify="right")
        for metric in (*CORPUS_METRICS, *TEXT_METRICS):
            row = [shown("{:.3f}", self.conditions[condition][metric]) for condition in CONDITIONS]
            found = self.differences.get(metric)
            compared = ["-"] * 3 if found is None else [shown("{:.3f}", found.difference), *shown_test(found.test)]
            table.add_row(*(Text(cell) for cell in (metric, *row, *compared)))
        return table


def evaluate_quality(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    prompts: int = 24,
    context_tokens: int = 1_536,
    new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
) -> QualityReport:
    """Continues pieces of text with and without memory.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        documents: prompts are their openings first; then, where there are too few, later pieces of them.
        prompts: how many at most. context_tokens: read before writing. new_tokens: written, and compared.
        batch_size: prompts side by side. seed, resamples: of the bootstrap over prompts.
        progress: called with (continuations done, in all). command: recorded in the report.

    Raises:
        ConfigurationError: a number below 1. TextError: no document is long enough.
    """
    if min(prompts, context_tokens, new_tokens, batch_size) < 1:
        raise ConfigurationError("prompts, context_tokens, new_tokens and batch_size must be at least 1")
    pieces = _pieces(tokenizer, documents, prompts, context_tokens, new_tokens)
    written: dict[str, list[list[int]]] = {condition: [] for condition in CONDITIONS}
    speeds: dict[str, list[Speed]] = {condition: [] for condition in CONDITIONS}
    done = 0
    with reading(model):
        for low in range(0, len(pieces), batch_size):
            batch = [piece["prompt_ids"] for piece in pieces[low : low + batch_size]]
            for condition in CONDITIONS:
                made, speed = continued(model, batch, new_tokens, memory=condition == "memory")
                written[condition] += made
                speeds[condition].append(speed)
                done += len(batch)
                if progress is not None:
                    progress(done, 2 * len(pieces))
    truth = [tokenizer.decode(piece["truth_ids"]) for piece in pieces]
    texts = {condition: [tokenizer.decode(ids) for ids in of] for condition, of in written.items()}
    scores = {
        condition: [text_scores(text, true) for text, true in zip(of, truth, strict=True)]
        for condition, of in texts.items()
    }
    return QualityReport(
        model=describe(model),
        settings={
            "prompts": len(pieces),
            "context_tokens": context_tokens,
            "new_tokens": new_tokens,
            "batch_size": batch_size,
            "seed": seed,
            "resamples": resamples,
        },
        conditions={
            condition: _bleu(of, truth, seed, resamples) | means(scores[condition], seed, resamples)
            for condition, of in texts.items()
        },
        differences=differences(scores["memory"], scores["off"], seed, resamples),
        speed={condition: _mean_speed(of) for condition, of in speeds.items()},
        samples=[
            {
                "title": piece["title"],
                "position": piece["position"],
                "prompt": tokenizer.decode(piece["prompt_ids"])[-_PROMPT_SHOWN:],
                "truth": true,
                **{condition: of[number] for condition, of in texts.items()},
            }
            for number, (piece, true) in enumerate(zip(pieces, truth, strict=True))
        ],
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def means(scores: Sequence[dict[str, float]], seed: int, resamples: int) -> dict[str, Interval]:
    """The mean of each metric over texts."""
    return {metric: mean_interval([score[metric] for score in scores], seed, resamples) for metric in TEXT_METRICS}


def differences(
    scores: Sequence[dict[str, float]], reference: Sequence[dict[str, float]], seed: int, resamples: int
) -> dict[str, Difference]:
    """Each metric's mean difference over the same texts, tested in pairs; p values corrected by Holm's method."""
    pairs = {m: (np.array([s[m] for s in scores]), np.array([s[m] for s in reference])) for m in TEXT_METRICS}
    tests = corrected([paired_test(ours, theirs) for ours, theirs in pairs.values()])
    return {
        metric: Difference(mean_interval(ours - theirs, seed, resamples), test)
        for (metric, (ours, theirs)), test in zip(pairs.items(), tests, strict=True)
    }


def shown_test(test: TestResult) -> list[str]:
    """Corrected p and effect size, for a table."""
    p = test.p_corrected if test.p_corrected is not None else test.p
    return [
        "-" if p is None else f"{p:.2g}",
        "-" if test.effect is None else f"{test.effect:+.2f} {test.effect_name}",
    ]


def _pieces(
    tokenizer: Any, documents: Sequence[Document], prompts: int, context_tokens: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Prompts and what follows them: the openings of all documents, then their second pieces, and so on."""
    size = context_tokens + new_tokens
    found: list[dict[str, Any]] = []
    encoded = [encode(tokenizer, document, limit_tokens=size * prompts) for document in documents]
    for number in range(prompts):
        for document in encoded:
            ids = document.input_ids[number * size : (number + 1) * size].tolist()
            if len(ids) == size and len(found) < prompts:
                place = {"title": document.document.title, "position": number * size + context_tokens}
                found.append(place | {"prompt_ids": ids[:context_tokens], "truth_ids": ids[context_tokens:]})
    if not found:
        raise TextError(f"no document has {size} tokens to read and continue; name longer texts or ask for fewer")
    return found


def _bleu(texts: Sequence[str], truth: Sequence[str], seed: int, resamples: int) -> dict[str, Interval]:
    found = {}
    for metric in CORPUS_METRICS:

        def score(numbers: Any, axis: int = -1, metric: str = metric) -> Any:
            def of(chosen: Any) -> float:
                places = chosen.astype(int)
                return corpus_bleu([texts[i] for i in places], [truth[i] for i in places])[metric]

            return np.apply_along_axis(of, axis, numbers)

        found[metric] = bootstrap_interval((np.arange(len(texts)),), score, seed, min(resamples, _BLEU_RESAMPLES))
    return found


def _mean_speed(speeds: Sequence[Speed]) -> Speed:
    rows = [asdict(speed) for speed in speeds]
    return Speed(**{name: float(np.mean([row[name] for row in rows])) for name in rows[0]})
