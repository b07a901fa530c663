"""Perplexity of one hippocampus under other options (selection, buffer, decay, replay), or of several on one base.

Each is compared with the first, document by document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, change, compare, corrected, paired_test
from evaluation.common.variants import VariantOptions, models
from hippoformer.data import Document
from hippoformer.evaluation import encode_all, score


@dataclass
class Options(VariantOptions):
    """What is compared, on how much text."""

    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens of each document"})
    documents: int | None = field(default=None, metadata={"help": "read the first N documents"})
    batch_size: int = field(default=4, metadata={"help": "documents read side by side"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap over documents"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Perplexity of each variant, its change against the base alone and against the first, and bytes of memory.

    Raises:
        TextError: no token to score. ConfigurationError: see `evaluation.common.variants.models`.
    """
    encoded = encode_all(tokenizer, documents[: options.documents], options.limit_tokens)
    tokens = [document.tokens_scored for document in encoded]
    nll: dict[str, list[float]] = {}
    base, memory = [], {}
    for name, variant in models(model, options):
        scores = list(score(variant, encoded, ("memory", "off"), options.batch_size))
        of = {(scored.condition, scored.document.index): scored for scored in scores}
        nll[name] = [of["memory", document.index].nll for document in encoded]
        base = [of["off", document.index].nll for document in encoded]
        memory[name] = max(scored.memory_nbytes for scored in scores)
    reference, *others = nll
    rows = list(compare(nll, tokens, reference, options.seed))
    for name, own in nll.items():
        rows.append(
            Row(name, "against the base, %", *bootstrap(change, own, base, tokens, seed=options.seed), n=len(tokens))
        )
        rows.append(Row(name, "memory, bytes", memory[name], n=len(tokens)))
    nats = {name: np.array(own) / tokens for name, own in nll.items()}
    tests = corrected([paired_test(nats[name], nats[reference]) for name in others])
    rows += [row for name, test in zip(others, tests, strict=True) for row in test.rows(name, reference)]
    titles = [document.document.title for document in encoded]
    return Result(rows, {"documents": titles, "tokens": tokens, "base": base, "nll": nll})
