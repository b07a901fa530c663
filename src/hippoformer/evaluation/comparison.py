"""Different models by one protocol: bits per byte and word perplexity of the same texts, beside the bytes of state.

Perplexity a token compares nothing between tokenizers. Every contestant reads each document from its beginning with its
own tokenizer, scores every token but the first once, and is measured on the text that its scored tokens cover. Whoever
looks ahead is refused. Documents are cut by characters, so that all read the same text.

Everybody reads a document before the next begins: whoever fails, fails on the first, and the time that is left can be
told from the time that has passed. What was read is kept in a file until the end, see `Finished`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, NonFiniteError, TextError
from hippoformer.evaluation.finished import Finished
from hippoformer.evaluation.provenance import code_sha256, digest, provenance
from hippoformer.evaluation.report import Report, changes, with_range
from hippoformer.evaluation.scoring import EncodedDocument, encode
from hippoformer.evaluation.significance import TestResult, corrected, paired_test
from hippoformer.evaluation.statistics import (
    RESAMPLES,
    Interval,
    bootstrap_interval,
    token_perplexity,
    weighted_mean_interval,
)


@dataclass(frozen=True)
class Scored:
    """One document as a contestant read it.

    Attributes:
        nll: sum of -log p over its tokens but the first, in nats.
        window_nbytes, memory_nbytes: bytes of state that reading needed: keys and values (or what stands for them), and
            a memory beside them.
        seconds: wall time.
    """

    nll: float
    window_nbytes: int
    memory_nbytes: int
    seconds: float


class Contestant(Protocol):
    """Who takes part. `kind` is one of hippoformer, window, kv selection, model, adapter."""

    name: str
    kind: str
    options: dict[str, Any]
    tokenizer: Any

    def score(self, ids: Tensor) -> Scored:
        """Reads one document, (T,) with T >= 2, from its beginning."""

    def check(self, ids: Tensor) -> None:
        """Raises CausalityError if predictions depend on what comes after them; see `causality.check`."""

    def depends_on(self) -> dict[str, Any]:
        """All that its scores depend on beside the tokens: weights, options, device."""


@dataclass(frozen=True)
class Comparison:
    """A contestant against the reference.

    Attributes:
        bits_ratio: bits per byte divided by those of the reference; below 1 is better.
        documents, documents_better: how many there are, and in how many fewer bits were needed.
        test: of the documents' bits per byte, corrected for the number of contestants by Holm's method.
    """

    bits_ratio: Interval
    documents: int
    documents_better: int
    test: TestResult


@dataclass(frozen=True)
class ContestantResult:
    """All documents as one contestant read them; sums over documents, and the figures that follow from them."""

    name: str
    kind: str
    options: dict[str, Any]
    tokenizer: str
    tokens_scored: int
    words: int
    utf8_bytes: int
    nll: float
    token_perplexity: float
    word_perplexity: float | None
    bits_per_byte: Interval
    window_nbytes: int
    memory_nbytes: int
    state_nbytes: int
    tokens_per_second: float
    against: Comparison | None
    documents: list[dict[str, Any]]


@dataclass(frozen=True)
class ComparisonReport(Report):
    """Every contestant, the reference among them."""

    FORMAT: ClassVar[str] = "hippoformer.comparison/1"

    model: dict[str, Any]
    settings: dict[str, Any]
    reference: str
    contestants: tuple[ContestantResult, ...]
    provenance: dict[str, Any]

    def __getitem__(self, name: str) -> ContestantResult:
        """A contestant by its name.

        Raises:
            KeyError: nobody of that name.
        """
        for contestant in self.contestants:
            if contestant.name == name:
                return contestant
        raise KeyError(name)

    def to_table(self) -> Table:
        """One line a contestant."""
        first = self.contestants[0]
        caption = (
            f"{len(first.documents)} documents, {first.utf8_bytes:,} bytes, {first.words:,} words; against "
            f"{self.reference}, bits per byte; token perplexity compares within one tokenizer alone"
        )
        table = Table(title=Text("One protocol, many models"), caption=Text(caption))
        table.add_column("contestant")
        table.add_column("kind")
        headings = ("bits/byte", "against", "p", "word ppl", "token ppl", "window kB", "memory kB", "tokens/s")
        for heading in headings:
            table.add_column(heading, justify="right")
        for c in self.contestants:
            against, bits = c.against, c.bits_per_byte
            cells = (
                c.name,
                c.kind,
                with_range("{:.4f}", bits.estimate, bits.low, bits.high),
                "-" if against is None else with_range("{:+.2%}", *changes(against.bits_ratio)),
                "-" if against is None or against.test.p_corrected is None else f"{against.test.p_corrected:.2g}",
                "-" if c.word_perplexity is None else f"{c.word_perplexity:.2f}",
                f"{c.token_perplexity:.2f}",
                f"{c.window_nbytes / 1e3:,.0f}",
                f"{c.memory_nbytes / 1e3:,.0f}",
                f"{c.tokens_per_second:,.0f}",
            )
            table.add_row(*(Text(cell) for cell in cells))
        return table


def compare(
    contestants: Sequence[Contestant],
    documents: Sequence[Document],
    model: dict[str, Any],
    limit_characters: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    progress: Callable[[int, int], None] | None = None,
    command: str | None = None,
    keep: Path | None = None,
) -> ComparisonReport:
    """Lets everybody read the same documents.

    Args:
        contestants: the first is the reference.
        documents: those of which somebody scores no token are left out for all.
        model: what is being evaluated, for the report.
        limit_characters: read only the first so many characters of each document.
        seed, resamples: of the bootstrap over documents.
        progress: called with (tokens read, in all), contestants counted each. command: recorded in the report.
        keep: file for what each contestant has read. Another call takes from it what it would read in just the same
            way; it is the caller's to remove.

    Raises:
        ConfigurationError: nobody, two of one name, or a limit below 1.
        CausalityError: a contestant looks ahead. TextError: no document of two tokens.
        NonFiniteError: a scored token has probability zero or NaN. HippoFormerError: `keep` cannot be written.
    """
    names = [contestant.name for contestant in contestants]
    if not names or len(set(names)) < len(names) or (limit_characters is not None and limit_characters < 1):
        raise ConfigurationError(
            f"contestants {names}, limit_characters={limit_characters}; expected names that differ and a limit above 0"
        )
    cut = [Document(d.title, d.text[:limit_characters], d.source) for d in documents]
    encoded = {c.name: [encode(c.tokenizer, document, i) for i, document in enumerate(cut)] for c in contestants}
    kept = [i for i in range(len(cut)) if all(of[i].tokens_scored and of[i].utf8_bytes for of in encoded.values())]
    if not kept:
        raise TextError(f"none of {len(cut)} documents has two tokens for everybody; name a longer text")
    read = {name: [of[i] for i in kept] for name, of in encoded.items()}
    scored = _scored(contestants, read, None if keep is None else Finished(keep), progress)
    nll = {name: np.array([s.nll for s in of]) for name, of in scored.items()}
    nbytes = {name: np.array([d.utf8_bytes for d in of], dtype=np.float64) for name, of in read.items()}
    bits = {name: nll[name] / math.log(2) / nbytes[name] for name in names}
    tests = dict(zip(names[1:], corrected([paired_test(bits[n], bits[names[0]]) for n in names[1:]]), strict=True))

    def ratio(ours: Any, our_bytes: Any, theirs: Any, their_bytes: Any, axis: int = -1) -> NDArray[Any]:
        return np.asarray(ours.sum(axis) / our_bytes.sum(axis) / (theirs.sum(axis) / their_bytes.sum(axis)))

    def against(name: str) -> Comparison | None:
        if name == names[0]:
            return None
        samples = (nll[name], nbytes[name], nll[names[0]], nbytes[names[0]])
        return Comparison(
            bits_ratio=bootstrap_interval(samples, ratio, seed, resamples),
            documents=len(kept),
            documents_better=int((bits[name] < bits[names[0]]).sum()),
            test=tests[name],
        )

    return ComparisonReport(
        model=model,
        settings={"limit_characters": limit_characters, "seed": seed, "resamples": resamples},
        reference=names[0],
        contestants=tuple(
            _result(c, read[c.name], scored[c.name], nll[c.name], against(c.name), seed, resamples) for c in contestants
        ),
        provenance=provenance(seed=seed, documents=cut, command=command),
    )


def _scored(
    contestants: Sequence[Contestant],
    read: Mapping[str, Sequence[EncodedDocument]],
    finished: Finished | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, list[Scored]]:
    """Every document by every contestant; what is finished is not read again."""
    keys: dict[tuple[str, int], str] = {}
    scored: dict[tuple[str, int], Scored] = {}
    if finished is not None:
        keys = _keys(contestants, read)
        scored = {place: Scored(**kept) for place, key in keys.items() if (kept := finished.get(key)) is not None}
    for contestant in contestants:
        if (contestant.name, 0) not in scored:  # before it was scored, it was checked
            contestant.check(read[contestant.name][0].input_ids)
    total = sum(document.tokens_read for of in read.values() for document in of)
    done = sum(read[name][i].tokens_read for name, i in scored)
    if progress is not None:
        progress(done, total)
    for i in range(len(read[contestants[0].name])):
        for contestant in contestants:
            name, document = contestant.name, read[contestant.name][i]
            if (name, i) in scored:
                continue
            found = contestant.score(document.input_ids)
            if not math.isfinite(found.nll):
                raise NonFiniteError(f"a token of {document.document.title!r} has probability zero or NaN under {name}")
            if finished is not None:
                finished.add(keys[name, i], asdict(found))
            scored[name, i] = found
            done += document.tokens_read
            if progress is not None:
                progress(done, total)
    return {name: [scored[name, i] for i in range(len(of))] for name, of in read.items()}


def _keys(
    contestants: Sequence[Contestant], read: Mapping[str, Sequence[EncodedDocument]]
) -> dict[tuple[str, int], str]:
    """(contestant, document) -> digest of all that the score depends on."""
    code, keys = code_sha256(), dict[tuple[str, int], str]()
    for c in contestants:
        depends = digest([code, c.name, c.kind, c.options, c.depends_on()])
        for i, document in enumerate(read[c.name]):
            keys[c.name, i] = digest([depends, document.input_ids.tolist()])
    return keys


def _result(
    contestant: Contestant,
    read: Sequence[EncodedDocument],
    scored: Sequence[Scored],
    nll: NDArray[Any],
    against: Comparison | None,
    seed: int,
    resamples: int,
) -> ContestantResult:
    tokens, words = [d.tokens_scored for d in read], sum(d.words for d in read)
    nbytes = [d.utf8_bytes for d in read]
    a_word = float(nll.sum()) / words if words else math.inf
    window, memory = max(s.window_nbytes for s in scored), max(s.memory_nbytes for s in scored)
    return ContestantResult(
        name=contestant.name,
        kind=contestant.kind,
        options=dict(contestant.options),
        tokenizer=str(contestant.tokenizer.name_or_path),
        tokens_scored=sum(tokens),
        words=words,
        utf8_bytes=sum(nbytes),
        nll=float(nll.sum()),
        token_perplexity=token_perplexity(nll, tokens),
        word_perplexity=math.exp(a_word) if a_word < 700 else None,
        bits_per_byte=weighted_mean_interval(nll / math.log(2), nbytes, seed, resamples),
        window_nbytes=window,
        memory_nbytes=memory,
        state_nbytes=window + memory,
        tokens_per_second=sum(d.tokens_read for d in read) / max(sum(s.seconds for s in scored), 1e-9),
        against=against,
        documents=[
            {"title": d.document.title, "nll": float(n), "tokens": d.tokens_scored, "words": d.words}
            | {"utf8_bytes": d.utf8_bytes}
            for d, n in zip(read, nll, strict=True)
        ],
    )
