"""One hippocampus under different options, compared document by document.

What the base computes does not depend on the memory: its hidden states are read once, kept on disk, and every variant
(another selection rule, buffer, decay, number of replay rounds) then streams over them in a fraction of the time.
The numbers are those of `evaluate_perplexity`, which runs everything together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.table import Table
from rich.text import Text

from hippoformer.configuration import HippoFormerConfig
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import Report, changes, with_range
from hippoformer.evaluation.scoring import describe, encode, hidden_states, reading
from hippoformer.evaluation.significance import TestResult, corrected, paired_test
from hippoformer.evaluation.statistics import RESAMPLES, Interval, PairedComparison, paired_ratio, token_perplexity
from hippoformer.training.credit import reconfigured
from hippoformer.training.readers import score_documents

# Options that the cached states, or the shapes of the weights, are made with.
_FIXED = (
    "base_model_name",
    "window",
    "sink_tokens",
    "segment_len",
    "memory_layer",
    "recall_n_heads",
    "recall_head_dim",
    "recall_value_dim",
    "salience_n_heads",
    "salience_min_duration",
    "salience_hidden_size",
    "residual_readout",
    "marginal_weight",
    "marginal_prior",
)

# What each mechanism is worth, without training anything again; the first is the model as it is.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "selection: first in, first out": {"selection": "fifo"},
    "selection: random": {"selection": "random"},
    "selection: surprise": {"selection": "surprise"},
    "no gate: all alike": {"importance_weight_range": [5.0, 5.0], "untagged_weight": 5.0},
    "no forgetting": {"priority_threshold": 0.0},
    "no following": {"following": False},
    "no memory: window only": {"buffer_size": 0},
    "no recall distribution": {"distribution_readout": False},
    "buffer 512": {"buffer_size": 512},
    "buffer 1024": {"buffer_size": 1024},
    "buffer 4096": {"buffer_size": 4096},
    "decay 0.8": {"decay_rate": 0.8},
    "decay 0.95": {"decay_rate": 0.95},
    "decay 0.99": {"decay_rate": 0.99},
    "importance 1 to 3": {"importance_weight_range": [1.0, 3.0]},
    "importance 1 to 10": {"importance_weight_range": [1.0, 10.0]},
}
_ROUNDS = 10  # of replay, where it is switched on


def ablations(config: HippoFormerConfig) -> dict[str, dict[str, Any]]:
    """Name -> options: what each mechanism is worth to a model of this configuration, the first the model as it is.

    What would change nothing is left out; where replay is off, it is switched on.
    """
    found = {
        name: options
        for name, options in _ABLATIONS.items()
        if not options or any(_plain(getattr(config, option)) != value for option, value in options.items())
    }
    return found | dict([switched_replay(config)])


def switched_replay(config: HippoFormerConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options of a model without replay; with it, where this one has none."""
    if config.max_replay_rounds:
        return "no replay", {"max_replay_rounds": 0}
    return "replay", {"max_replay_rounds": _ROUNDS}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class VariantResult:
    """All documents under one variant.

    Attributes:
        name, options: of the variant. nll: (D,) per document. perplexity: of all documents together.
        memory_nbytes: of a row. against_base: paired with the base alone. against: paired with the reference variant,
            None for the reference itself. test: of the documents' nats a token against the reference, p values
            corrected for the number of variants by Holm's method.
    """

    name: str
    options: dict[str, Any]
    nll: list[float]
    perplexity: float
    memory_nbytes: int
    against_base: PairedComparison
    against: PairedComparison | None
    test: TestResult | None


@dataclass(frozen=True)
class VariantsReport(Report):
    """Every variant, and where the numbers came from."""

    FORMAT: ClassVar[str] = "hippoformer.variants/1"

    model: dict[str, Any]
    reference: str
    base_perplexity: float
    documents: list[str]
    tokens: list[int]
    base_nll: list[float]
    variants: tuple[VariantResult, ...]
    provenance: dict[str, Any]

    def to_table(self) -> Table:
        """One line a variant, for a terminal."""
        caption = f"{len(self.documents)} documents, {sum(self.tokens):,} tokens; base alone {self.base_perplexity:.2f}"
        table = Table(title=Text(f"Variants of {self.model['base_model_name']}"), caption=Text(caption))
        table.add_column("variant")
        for heading in ("token ppl", "against the base", f"against {self.reference}", "better in", "p", "memory kB"):
            table.add_column(heading, justify="right")
        for v in self.variants:
            compared = "-" if v.against is None else _change(v.against.ratio)
            better = "-" if v.against is None else f"{v.against.documents_better}/{v.against.documents}"
            cells = (
                v.name,
                f"{v.perplexity:.3f}",
                _change(v.against_base.ratio),
                compared,
                better,
                "-" if v.test is None or v.test.p_corrected is None else f"{v.test.p_corrected:.2g}",
                f"{v.memory_nbytes / 1e3:,.0f}",
            )
            table.add_row(*(Text(cell) for cell in cells))
        return table


def evaluate_variants(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    variants: Mapping[str, Mapping[str, Any]],
    cache_dir: Path,
    limit_tokens: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[str], None] | None = None,
    command: str | None = None,
) -> VariantsReport:
    """Streams the documents under each variant and compares it with the first one.

    Args:
        model: a HippoFormer whose base is frozen. tokenizer: its tokenizer.
        documents: each read from an empty memory.
        variants: name -> options of the config that differ; the first is the reference.
        cache_dir: where hidden states are kept, and found again.
        limit_tokens: read only the first so many tokens of each document.
        batch_size: documents side by side.
        seed, resamples: of the bootstrap over documents.
        progress: called with the name of each variant before it runs.
        command: recorded in the report.

    Raises:
        ConfigurationError: no variant, an unknown option, or one that needs other hidden states or other weights.
    """
    check_variants(variants, model.config)
    encoded = [encode(tokenizer, document, i, limit_tokens) for i, document in enumerate(documents)]
    kept = [document for document in encoded if document.tokens_scored > 0]
    with reading(model):
        cache = hidden_states(model, kept, cache_dir)
        scores = {}
        for name, options in variants.items():
            if progress is not None:
                progress(name)
            with reconfigured(model.hippocampus, **options):
                scores[name] = score_documents(model, cache, rows=batch_size)
    first = next(iter(variants))
    tokens, base = [s.tokens for s in scores[first]], [s.base_nll for s in scores[first]]
    nll = {name: [s.nll for s in of] for name, of in scores.items()}
    nats = {name: np.array(of) / np.array(tokens) for name, of in nll.items()}
    others = [name for name in variants if name != first]
    tests = dict(zip(others, corrected([paired_test(nats[name], nats[first]) for name in others]), strict=True))
    return VariantsReport(
        model=describe(model),
        reference=first,
        base_perplexity=token_perplexity(base, tokens),
        documents=[document.document.title for document in kept],
        tokens=tokens,
        base_nll=base,
        variants=tuple(
            VariantResult(
                name=name,
                options=dict(options),
                nll=nll[name],
                perplexity=token_perplexity(nll[name], tokens),
                memory_nbytes=max(s.memory_nbytes for s in scores[name]),
                against_base=paired_ratio(nll[name], base, tokens, seed, resamples),
                against=None if name == first else paired_ratio(nll[name], nll[first], tokens, seed, resamples),
                test=tests.get(name),
            )
            for name, options in variants.items()
        ),
        provenance=provenance(seed=seed, documents=list(documents), command=command),
    )


def check_variants(variants: Mapping[str, Mapping[str, Any]], config: HippoFormerConfig) -> None:
    """Whether one trained hippocampus can be all of them.

    Raises:
        ConfigurationError: no variant, an unknown option, or one that needs other hidden states or other weights.
    """
    known = config.to_dict()
    for name, options in variants.items():
        wrong = sorted(option for option in options if option in _FIXED or option not in known)
        if wrong:
            raise ConfigurationError(
                f"variant {name}: {', '.join(wrong)} cannot differ between variants of one trained hippocampus; "
                "expected options of memory, replay and selection."
            )
    if not variants:
        raise ConfigurationError("no variant to evaluate: name at least one")


def _change(ratio: Interval) -> str:
    return with_range("{:+.2%}", *changes(ratio))
