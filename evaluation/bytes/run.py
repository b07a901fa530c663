"""What bytes of state buy: this memory at several sizes, longer windows, selected keys, and other models, on one text.

Everyone reads each document from its beginning with its own tokenizer and is measured in bits per byte of the text that
its scored tokens cover; perplexity per token compares only within one tokenizer. A model that looks ahead is refused.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evaluation.bytes.kv_selection import SelectedKeys
from evaluation.bytes.other_models import load_other
from evaluation.common.causality import check, check_model
from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap, corrected, paired_test, ratio
from evaluation.common.variants import with_options
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation import EncodedDocument, Scored, encode, figures, score


@dataclass
class Options:
    """Who takes part, beside the model and its base with the same window."""

    windows: list[int] = field(default_factory=list, metadata={"help": "of the base alone, tokens"})
    buffers: list[int] = field(default_factory=list, metadata={"help": "of the memory, episodes"})
    kv: list[str] = field(default_factory=list, metadata={"help": "h2o:N, snapkv:N or random:N selected keys a head"})
    models: list[str] = field(default_factory=list, metadata={"help": "other models, or peft adapters: name or folder"})
    model_window: int | None = field(default=None, metadata={"help": "tokens that another model reads at once"})
    limit_characters: int | None = field(
        default=None, metadata={"help": "read the first N characters of each document"}
    )
    documents: int | None = field(default=None, metadata={"help": "read the first N documents"})
    seed: int = field(default=0, metadata={"help": "of the bootstrap over documents, and of random keys"})


@dataclass
class _Contestant:
    """Who reads: a HippoFormer under a condition, or a predictor with `scores(ids)`, `logits` and `nbytes`."""

    name: str
    tokenizer: Any
    model: Any
    condition: str | None = None

    def check(self, document: EncodedDocument) -> None:
        """Raises CausalityError if the model looks ahead."""
        if self.condition == "memory":
            check_model(self.model, document.input_ids)
        elif self.condition is None:
            check(self.model, document.input_ids)

    def score(self, document: EncodedDocument) -> Scored:
        """A document, read from its beginning."""
        if self.condition is not None:
            return next(score(self.model, [document], (self.condition,)))
        began = time.perf_counter()
        log_probs = self.model.scores(document.input_ids).cpu()
        if not log_probs.isfinite().all():
            raise NonFiniteError(
                f"a token of {document.document.title!r} has probability zero or NaN under {self.name}"
            )
        window, memory = self.model.nbytes
        return Scored(document, self.name, log_probs, window, memory, time.perf_counter() - began)


def _contestants(model: Any, tokenizer: Any, options: Options) -> Iterator[_Contestant]:
    window, buffer = model.config.window, model.config.buffer_size
    yield _Contestant("hippoformer", tokenizer, model, "memory")
    yield _Contestant(f"base, window {window}", tokenizer, model, "off")
    for size in options.windows:
        if size != window:
            yield _Contestant(f"base, window {size}", tokenizer, with_options(model, window=size), "off")
    for size in options.buffers:
        if size != buffer:
            yield _Contestant(f"hippoformer, buffer {size}", tokenizer, with_options(model, buffer_size=size), "memory")
    for method, separator, budget in (part.partition(":") for part in options.kv):
        if not budget.isdigit():
            raise ConfigurationError(f"kv={method}{separator}{budget}: expected METHOD:BUDGET like h2o:512")
        selected = SelectedKeys(model.base, model.config, method, int(budget), options.seed)
        yield _Contestant(f"base, window {window} + {budget} by {method}", tokenizer, selected)
    for name in options.models:
        other, own_tokenizer = load_other(name, options.model_window, device=model.device)
        yield _Contestant(name, own_tokenizer, other)


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Bits per byte, word and token perplexity, bytes of state and speed of everyone, against the model itself.

    Raises:
        TextError: no document in which everyone has two tokens. ConfigurationError: a name twice, no such model.
        CausalityError: someone looks ahead. NonFiniteError: a token of probability zero or NaN.
    """
    contestants = list(_contestants(model, tokenizer, options))
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{names}: expected each of them once")
    cut = [Document(d.title, d.text[: options.limit_characters], d.source) for d in documents[: options.documents]]
    read = {c.name: [encode(c.tokenizer, document, i) for i, document in enumerate(cut)] for c in contestants}
    kept = [i for i in range(len(cut)) if all(of[i].tokens_scored and of[i].utf8_bytes for of in read.values())]
    if not kept:
        raise TextError(f"none of {len(cut)} documents has two tokens for everyone; name a longer text")
    for contestant in contestants:  # whoever fails, fails before hours of reading
        contestant.check(read[contestant.name][kept[0]])
    scored = {c.name: [c.score(read[c.name][i]) for i in kept] for c in contestants}
    nats = {name: np.array([one.nll for one in found]) for name, found in scored.items()}
    nbytes = {name: np.array([read[name][i].utf8_bytes for i in kept]) for name in names}
    rows = [row for name in names for row in _rows(name, scored[name], nats[name], nbytes[name], options.seed)]
    bits = {name: nats[name] / math.log(2) / nbytes[name] for name in names}
    reference, *others = names
    tests = corrected([paired_test(bits[name], bits[reference]) for name in others])
    for name, test in zip(others, tests, strict=True):
        samples = nats[name], nbytes[name], nats[reference], nbytes[reference]
        rows.append(
            Row(name, f"bits against {reference}, %", *bootstrap(_change, *samples, seed=options.seed), n=len(kept))
        )
        rows += test.rows(name, reference)
    return Result(
        rows,
        {"documents": [cut[i].title for i in kept]}
        | {"bits/byte": {name: of.tolist() for name, of in bits.items()}}
        | {"tokenizers": {c.name: str(c.tokenizer.name_or_path) for c in contestants}},
    )


def _rows(name: str, scored: Sequence[Scored], nats: Any, nbytes: Any, seed: int) -> list[Row]:
    found, n = figures(scored), len(scored)
    state = max(one.window_nbytes for one in scored) + max(one.memory_nbytes for one in scored)
    bits = bootstrap(ratio, nats / math.log(2), nbytes, seed=seed)
    rows = [Row(name, metric, value, n=n) for metric, value in found.items() if metric != "bits/byte"]
    return [Row(name, "bits/byte", *bits, n=n), *rows, Row(name, "state, bytes", state, n=n)]


def _change(nats: Any, nbytes: Any, their_nats: Any, their_bytes: Any, axis: int = -1) -> Any:
    """By how many percent the bits per byte differ; below 0 is better."""
    return 100 * (ratio(nats, nbytes, axis) / ratio(their_nats, their_bytes, axis) - 1)
