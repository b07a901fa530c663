"""Exact recall of one hippocampus under other options, or of several on one base, compared question by question."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, corrected, paired_test
from evaluation.common.variants import VariantOptions, models
from evaluation.recall import run as recall
from hippoformer.data import Document


@dataclass
class Options(recall.Options, VariantOptions):
    """What is compared, on which facts."""


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Per variant and distance: exact answers with memory, and the difference to the first on the same questions.

    Raises:
        TextError: no text. ConfigurationError: see `evaluation.common.variants.models`.
    """
    found = {name: recall.answers(variant, tokenizer, documents, options) for name, variant in models(model, options)}
    with_memory = {name: [answer for answer in of if answer.condition == "memory"] for name, of in found.items()}
    reference, *others = found
    at = np.array([answer.asked_distance for answer in with_memory[reference]])
    right = {name: np.array([100.0 * answer.right for answer in of]) for name, of in with_memory.items()}
    rows = []
    for name, own in right.items():
        for distance in options.distances:
            there, n, ago = at == distance, int((at == distance).sum()), f"{distance:,} tokens ago"
            found_right = bootstrap(np.mean, own[there], seed=options.seed)
            rows.append(Row(name, f"right, {ago}, %", *found_right, n=n))
            if name != reference:
                difference = bootstrap(np.mean, (own - right[reference])[there], seed=options.seed)
                rows.append(Row(name, f"against {reference}, {ago}, points", *difference, n=n))
    tests = corrected([paired_test(right[name], right[reference]) for name in others])
    rows += [row for name, test in zip(others, tests, strict=True) for row in test.rows(name, reference)]
    return Result(rows, {"answers": {name: [asdict(answer) for answer in of] for name, of in found.items()}})
