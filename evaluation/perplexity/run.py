"""Perplexity under each condition: see `hippoformer.evaluation.perplexity`."""

from hippoformer.evaluation.perplexity import Options, run

__all__ = ["Options", "run"]
