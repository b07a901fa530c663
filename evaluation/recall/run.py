"""Exact recall of facts hidden in long texts: `hippoformer.evaluation.recall`."""

from hippoformer.evaluation.recall import Options, run

__all__ = ["Options", "run"]
