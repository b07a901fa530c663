"""The parts of the whole evaluation: what each reads, how much of it, and how it runs.

The base reads most texts once: perplexity hands its token scores to the gain by position, and the other parts share
hidden states on disk.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.brain import evaluate_brain
from hippoformer.evaluation.dynamics import evaluate_dynamics
from hippoformer.evaluation.long_range import evaluate_long_range
from hippoformer.evaluation.perplexity import evaluate_perplexity
from hippoformer.evaluation.provenance import digest, documents_sha256
from hippoformer.evaluation.quality import evaluate_quality
from hippoformer.evaluation.recall import evaluate_recall
from hippoformer.evaluation.report import Report
from hippoformer.evaluation.salience import evaluate_salience
from hippoformer.evaluation.scoring import describe
from hippoformer.evaluation.token_scores import TokenScores
from hippoformer.evaluation.variants import ablations, evaluate_variants
from hippoformer.model.memory_file import fingerprint

# (done, total); a part's own progress.
Progress = Callable[[int, int], None]

_CACHED = 0.3  # what reading a token from cached states costs, in tokens read by everything together
_BRAIN_READS = 7
# As many as there can be.
_ABLATIONS = 17


@dataclass(frozen=True)
class SuiteSettings:
    """How much each part reads; the defaults suit two CPU cores and WikiText-2's test set.

    Attributes:
        documents, limit_tokens: of the perplexity: all, whole, where None.
        conditions: of the perplexity; `long_range` uses memory, off and window-only among them.
        batch_size: documents side by side.
        part_documents, part_tokens: for salience, ablations and brain: the first so many documents, cut there.
        stream_tokens: of the one stream of `dynamics`.
        prompts, context_tokens, new_tokens: of `quality`.
        recall_distances, recall_facts, recall_streams: of `recall`.
        seed, resamples: of every draw, and of the bootstrap.
    """

    documents: int | None = None
    limit_tokens: int | None = None
    conditions: tuple[str, ...] = ("memory", "off", "window-only")
    batch_size: int = 4
    part_documents: int = 12
    part_tokens: int = 4_096
    stream_tokens: int = 32_768
    prompts: int = 24
    context_tokens: int = 1_536
    new_tokens: int = 64
    recall_distances: tuple[int, ...] = (1_000, 4_000)
    recall_facts: int = 4
    recall_streams: int = 2
    seed: int = 0
    resamples: int = 10_000


@dataclass(frozen=True)
class Suite:
    """What a part is given.

    Attributes:
        model, tokenizer: what is measured.
        documents: the texts. long_documents: those for stream and recall, where other texts are longer.
        cache_dir: hidden states and token scores. settings: how much to read. command: recorded in every file.
    """

    model: Any
    tokenizer: Any
    documents: tuple[Document, ...]
    long_documents: tuple[Document, ...]
    cache_dir: Path
    settings: SuiteSettings
    command: str | None

    @property
    def few(self) -> list[Document]:
        """The documents of the parts that read only some."""
        return list(self.documents[: self.settings.part_documents])

    @property
    def scores_file(self) -> Path:
        """Where perplexity leaves what every token was given."""
        return self.cache_dir / f"token_scores_{digest(self.request(PARTS['perplexity']))[:16]}.safetensors"

    def request(self, part: "Part") -> dict[str, Any]:
        """What a part's file must answer: digests of model and texts, and the settings that it uses."""
        settings = json.loads(json.dumps(asdict(self.settings)))
        return {
            "part": part.name,
            "model": digest(fingerprint(self.model) | {"config": describe(self.model)["config"]}),
            "texts": documents_sha256(self.long_documents if part.long else self.documents),
            "settings": {name: settings[name] for name in (*part.uses, "seed", "resamples")},
        }


@dataclass(frozen=True)
class Part:
    """One part: its name, the settings it depends on, how many tokens it reads (an estimate), and how it runs."""

    name: str
    uses: tuple[str, ...]
    tokens: Callable[[Suite], float]
    run: Callable[[Suite, Progress], Report]
    long: bool = False

    @property
    def file(self) -> str:
        return f"{self.name}.json"


def smaller(settings: SuiteSettings, samples: int) -> SuiteSettings:
    """The settings for at most so many documents in every part, as the original's `--samples`.

    Raises:
        ConfigurationError: fewer than one.
    """
    if samples < 1:
        raise ConfigurationError(f"samples={samples}; expected at least 1")
    return replace(
        settings,
        documents=samples,
        part_documents=min(samples, settings.part_documents),
        prompts=min(samples, settings.prompts),
    )


def _tokens(documents: Sequence[Document], limit: int | None = None) -> float:
    """About how many tokens: four characters one."""
    return sum(min(len(d.text) / 4, limit or float("inf")) for d in documents)


def _few(suite: Suite) -> float:
    return _tokens(suite.few, suite.settings.part_tokens)


def _perplexity(suite: Suite, progress: Progress) -> Report:
    s, scores = suite.settings, TokenScores()
    report = evaluate_perplexity(
        suite.model,
        suite.tokenizer,
        suite.documents,
        s.conditions,
        s.batch_size,
        s.limit_tokens,
        max_documents=s.documents,
        seed=s.seed,
        resamples=s.resamples,
        progress=progress,
        command=suite.command,
        on_scores=scores.collect,
    )
    scores.save(suite.scores_file)
    return report


def _long_range(suite: Suite, progress: Progress) -> Report:
    s = suite.settings
    known = suite.scores_file.is_file() and {"memory", "off"} <= set(s.conditions)
    return evaluate_long_range(
        suite.model,
        suite.tokenizer,
        suite.documents[: s.documents],
        batch_size=s.batch_size,
        limit_tokens=s.limit_tokens,
        scores=TokenScores.load(suite.scores_file) if known else None,
        seed=s.seed,
        resamples=s.resamples,
        progress=progress,
        command=suite.command,
    )


def _salience(suite: Suite, progress: Progress) -> Report:
    s, states = suite.settings, suite.cache_dir
    return evaluate_salience(
        suite.model, suite.tokenizer, suite.few, states, s.part_tokens, s.seed, s.resamples, progress, suite.command
    )


def _dynamics(suite: Suite, progress: Progress) -> Report:
    s = suite.settings
    return evaluate_dynamics(
        suite.model, suite.tokenizer, suite.long_documents, s.stream_tokens, s.seed, progress, suite.command
    )


def _ablations(suite: Suite, progress: Progress) -> Report:
    s, begun, variants = suite.settings, list[str](), ablations(suite.model.config)

    def next_one(name: str) -> None:
        progress(len(begun), len(variants))
        begun.append(name)

    return evaluate_variants(
        suite.model,
        suite.tokenizer,
        suite.few,
        variants,
        suite.cache_dir,
        s.part_tokens,
        s.batch_size,
        s.seed,
        s.resamples,
        next_one,
        suite.command,
    )


def _brain(suite: Suite, progress: Progress) -> Report:
    s = suite.settings
    return evaluate_brain(
        suite.model,
        suite.tokenizer,
        suite.few,
        suite.cache_dir,
        s.part_tokens,
        seed=s.seed,
        resamples=s.resamples,
        progress=progress,
        command=suite.command,
    )


def _quality(suite: Suite, progress: Progress) -> Report:
    s = suite.settings
    return evaluate_quality(
        suite.model,
        suite.tokenizer,
        suite.documents,
        s.prompts,
        s.context_tokens,
        s.new_tokens,
        seed=s.seed,
        resamples=s.resamples,
        progress=progress,
        command=suite.command,
    )


def _recall(suite: Suite, progress: Progress) -> Report:
    s = suite.settings
    return evaluate_recall(
        suite.model,
        suite.tokenizer,
        list(suite.long_documents),
        distances=s.recall_distances,
        facts=s.recall_facts,
        haystacks=s.recall_streams,
        seed=s.seed,
        progress=progress,
        command=suite.command,
    )


def _perplexity_tokens(suite: Suite) -> float:
    s = suite.settings
    reads = len(s.conditions) + ("other-document" in s.conditions)  # which reads as many tokens of others first
    return reads * _tokens(suite.documents[: s.documents], s.limit_tokens)


def _quality_tokens(suite: Suite) -> float:
    s = suite.settings
    return 2.0 * s.prompts * (s.context_tokens + 10 * s.new_tokens)  # one token at a time costs many read together


def _recall_tokens(suite: Suite) -> float:
    s = suite.settings
    return 1.5 * s.recall_streams * (1_200 * s.recall_facts + max(s.recall_distances))  # facts lie 384 tokens apart


# Tokens read, per part: what the base reads anew counts whole, what is read from cached states less.
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("perplexity", ("documents", "limit_tokens", "conditions", "batch_size"), _perplexity_tokens, _perplexity),
        Part("long_range", ("documents", "limit_tokens", "conditions", "batch_size"), lambda suite: 0.0, _long_range),
        Part("salience", ("part_documents", "part_tokens"), lambda s: _few(s) * (1 + 4 * _CACHED), _salience),
        Part("dynamics", ("stream_tokens",), lambda s: float(s.settings.stream_tokens), _dynamics, long=True),
        Part(
            "ablations",
            ("part_documents", "part_tokens"),
            lambda suite: _few(suite) * _CACHED * _ABLATIONS,
            _ablations,
        ),
        Part("brain", ("part_documents", "part_tokens"), lambda s: _few(s) * _CACHED * _BRAIN_READS, _brain),
        Part(
            "quality",
            ("prompts", "context_tokens", "new_tokens"),
            _quality_tokens,
            _quality,
        ),
        Part(
            "recall",
            ("recall_distances", "recall_facts", "recall_streams"),
            _recall_tokens,
            _recall,
            long=True,
        ),
    )
}
