"""What the memory did while one document was read, token by token: for the figure of salience, or to read.

The document is streamed from an empty memory. For every token: the salience of the transition into it, log p with the
memory and of the base alone, the share of the prediction left to recall, what the most strongly recalled episode voted
for before the token came, and its attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.common.results import Result, Row
from hippoformer.data.documents import Document
from hippoformer.errors import TextError
from hippoformer.evaluation import encode, reading
from hippoformer.text import start_tokens, token_spans


@dataclass
class Options:
    """Which document."""

    title: str | None = field(default=None, metadata={"help": "title of the document; default: the first"})
    limit_tokens: int = field(default=3_000, metadata={"help": "read the first N tokens"})


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Perplexity with and without memory and the tagged share; the columns of all tokens are in the details.

    Raises:
        TextError: no such document, or fewer than two tokens to read.
    """
    document = next((one for one in documents if options.title in (None, one.title)), None)
    ids = None if document is None else encode(tokenizer, document, limit_tokens=options.limit_tokens).input_ids
    if document is None or ids is None or len(ids) < 2:
        titles = ", ".join(one.title for one in documents[:5])
        raise TextError(f"expected a document with two tokens called {options.title!r}; the first ones are: {titles}")
    numbers: dict[str, list[float]] = {name: [] for name in ("salience", "log_p", "log_p_off", "share", "weight")}
    recalled: list[str] = []
    voted, attention = "", 0.0  # by the query before the step
    with reading(model):
        for step in model.stream(ids.unsqueeze(0).to(model.device), [len(ids)], model.new_cache(1)):
            n, found = step.new[0], step.found
            share = found.prior_mixture * (1.0 - found.prior_nothing)
            best = found.recollection.weights[0, :n].max(-1)
            votes = [tokenizer.decode(token) for token in found.token[0][best.indices].tolist()]
            recalled += [voted, *votes[:-1]]
            weights = [attention, *best.values.tolist()]
            voted, attention = votes[-1], weights.pop()
            columns = (found.salience, step.target_log_prob, step.base_log_prob, share)
            parts = [*(column[0, :n].float().tolist() for column in columns), weights]
            for of, part in zip(numbers.values(), parts, strict=True):
                of += [round(value, 4) for value in part]
    salience, log_p, log_p_off = (np.array(numbers[name])[1:] for name in ("salience", "log_p", "log_p_off"))
    rows = [
        Row("memory", "perplexity", float(np.exp(-log_p.mean())), n=len(log_p)),
        Row("memory", "against off, %", float(100 * np.expm1((log_p_off - log_p).mean())), n=len(log_p)),
        Row("memory", "tagged share, %", float(100 * (salience > 0.5).mean()), n=len(log_p)),
        Row("off", "perplexity", float(np.exp(-log_p_off.mean())), n=len(log_p)),
    ]
    told = {"text": token_texts(tokenizer, document, len(ids)), "recalled": recalled}
    return Result(rows, {"title": document.title, "tokens": told | numbers})


def token_texts(tokenizer: Any, document: Document, count: int) -> list[str]:
    """The characters of each of the first tokens; those of one character split over several belong to the first."""
    spans = token_spans(tokenizer, document.text)[1]
    ends = [*(0 for _ in start_tokens(tokenizer)), *(end for _, end in spans)][:count]
    return [document.text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
