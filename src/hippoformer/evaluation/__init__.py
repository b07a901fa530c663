"""Honest measurement: streaming perplexity under four conditions, its intervals, and where each number came from."""

from hippoformer.evaluation.perplexity import evaluate_perplexity
from hippoformer.evaluation.perplexity_report import ConditionResult, DocumentResult, PerplexityReport
from hippoformer.evaluation.provenance import documents_sha256, provenance, write_json
from hippoformer.evaluation.scoring import CONDITIONS
from hippoformer.evaluation.statistics import (
    Interval,
    PairedComparison,
    paired_ratio,
    perplexity_interval,
    token_perplexity,
)

__all__ = [
    "CONDITIONS",
    "ConditionResult",
    "DocumentResult",
    "Interval",
    "PairedComparison",
    "PerplexityReport",
    "documents_sha256",
    "evaluate_perplexity",
    "paired_ratio",
    "perplexity_interval",
    "provenance",
    "token_perplexity",
    "write_json",
]
