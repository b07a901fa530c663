"""The original's command, `python -m evaluation.comprehensive_eval`, served by `hippoformer.evaluation`."""
