"""What every token was given under several conditions: the raw material of figures by position and by distance.

Perplexity hands them over while it reads (`collect`), so that nothing need be read twice; `score_tokens` reads for
itself. They are kept as safetensors between the parts of a suite.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.evaluation.scoring import CONDITIONS, EncodedDocument, batches, encode, reading, score_batches


@dataclass
class TokenScores:
    """Documents and the log-probability of their tokens.

    Attributes:
        titles: of the documents, by their place in the list.
        input_ids: place -> (T,) int64. log_probs: condition -> place -> (T - 1,) float32 of tokens 1 … T - 1.
    """

    titles: dict[int, str] = field(default_factory=dict)
    input_ids: dict[int, Tensor] = field(default_factory=dict)
    log_probs: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def collect(self, condition: str, document: EncodedDocument, log_probs: Tensor) -> None:
        """Takes one document under one condition; what `evaluate_perplexity` calls as `on_scores`."""
        self.titles[document.index] = document.document.title
        self.input_ids[document.index] = document.input_ids
        self.log_probs.setdefault(condition, {})[document.index] = log_probs

    @property
    def conditions(self) -> tuple[str, ...]:
        """In the order of `CONDITIONS`."""
        return tuple(condition for condition in CONDITIONS if condition in self.log_probs)

    @property
    def places(self) -> list[int]:
        """Of the documents that were scored under all conditions, in order."""
        return sorted(set(self.titles).intersection(*self.log_probs.values()))

    def save(self, path: Path) -> None:
        """Writes one safetensors file."""
        tensors = {f"ids/{place}": ids.to(torch.int32) for place, ids in self.input_ids.items()}
        tensors |= {f"{c}/{place}": of for c, documents in self.log_probs.items() for place, of in documents.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        save_file(tensors, unfinished, metadata={"titles": json.dumps(self.titles)})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> "TokenScores":
        """Reads what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        scores = cls()
        try:
            with safe_open(path, framework="pt") as file:
                scores.titles = {int(place): t for place, t in json.loads(file.metadata()["titles"]).items()}
                for name in file.keys():  # noqa: SIM118, it is no dictionary
                    kind, place = name.rsplit("/", 1)
                    if kind == "ids":
                        scores.input_ids[int(place)] = file.get_tensor(name).long()
                    else:
                        scores.log_probs.setdefault(kind, {})[int(place)] = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} holds no token scores ({error}); remove it, it can be made again") from error
        return scores


def score_tokens(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    conditions: Sequence[str] = ("memory", "off", "window-only"),
    batch_size: int = 4,
    limit_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TokenScores:
    """Streams documents under each condition.

    Args:
        model, tokenizer: a HippoFormer and its tokenizer.
        documents: each read from an empty memory; those of one token are left out.
        conditions: some of memory, off, window-only.
        batch_size, limit_tokens, progress: as for `evaluate_perplexity`.

    Raises:
        ConfigurationError: another condition. TextError: no document of two tokens.
    """
    wrong = sorted(set(conditions) - {"memory", "off", "window-only"})
    if wrong or not conditions:
        raise ConfigurationError(f"conditions={list(conditions)}; expected some of memory, off, window-only")
    encoded = [encode(tokenizer, document, i, limit_tokens) for i, document in enumerate(documents)]
    kept = [document for document in encoded if document.tokens_scored > 0]
    if not kept:
        raise TextError(f"none of {len(encoded)} documents has two tokens; name a longer text")
    scores = TokenScores()
    with reading(model):
        for condition, batch, found in score_batches(model, conditions, batches(kept, batch_size), progress=progress):
            for document, log_probs in zip(batch, found.log_probs, strict=True):
                scores.collect(condition, document, log_probs)
    return scores
