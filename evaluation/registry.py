"""Every evaluation, a line each: its name, and the module with its `Options` and its `run`."""

EVALUATIONS = {
    "perplexity": "evaluation.perplexity.run",
}
