"""Every evaluation, a line each: its name, and the module with its `Options` and its `run`."""

EVALUATIONS = {
    "perplexity": "evaluation.perplexity.run",
    "recall": "evaluation.recall.run",
    "variants": "evaluation.variants.run",
    "recall_variants": "evaluation.recall_variants.run",
    "bytes": "evaluation.bytes.run",
    "dynamics": "evaluation.dynamics.run",
    "brain": "evaluation.brain.run",
    "salience": "evaluation.salience.run",
    "drift": "evaluation.drift.run",
    "quality": "evaluation.quality.run",
    "questions": "evaluation.questions.run",
    "babilong": "evaluation.babilong.run",
    "trace": "evaluation.trace.run",
}
