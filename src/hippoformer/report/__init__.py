"""One page that shows everything in a folder of result files: `hippoformer report results/`."""

from hippoformer.report.page import render, write_report

__all__ = ["render", "write_report"]
