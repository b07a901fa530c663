"""Hidden states of a frozen base, computed once: training the hippocampus then takes minutes, not hours.

The base's hidden states do not depend on the memory, so a text is streamed through the window with the memory off,
and each document becomes one safetensors file: `hidden` (T, D) in the base's dtype, `tokens` (T,), `log_prob` (T,) of
each token under the base. The folder's name is a digest of everything the numbers depend on; files that are there are
not computed again, so an interrupted run continues where it was.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file
from torch import Tensor

from hippoformer.errors import TextError
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.memory_file import base_fingerprint
from hippoformer.model.modeling import HippoFormer


@dataclass
class ReadDocument:
    """A document as the base read it.

    Attributes:
        tokens: (T,) int64. hidden: (T, D), what the hippocampus reads. log_prob: (T,) float32, 0 for the first token.
    """

    tokens: Tensor
    hidden: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


class HiddenStateCache:
    """Documents with their hidden states, on disk; an indexable sequence of `ReadDocument`.

    Args:
        model: whose base reads. documents: token ids of each document.
        folder: where caches live; each gets a subfolder of its own.
        batch_size: documents read side by side.
        processes: among which the reading is divided; None where there is one.
    """

    def __init__(
        self,
        model: HippoFormer,
        documents: Sequence[Tensor],
        folder: Path,
        batch_size: int = 8,
        processes: PartialState | None = None,
    ) -> None:
        if not documents:
            raise TextError("no documents to read: expected at least one with two tokens or more")
        config = model.config
        facts = {
            "base": base_fingerprint(model.base),
            "window": [config.window, config.sink_tokens, config.segment_len, *config.memory_layers],
            "dtype": str(model.dtype),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / digest
        self._files = [self.folder / f"{_digest(ids)}.safetensors" for ids in documents]
        self.lengths = [len(ids) for ids in documents]
        index, count = (processes.process_index, processes.num_processes) if processes is not None else (0, 1)
        if processes is not None and count > 1:
            self._fill(model, documents, batch_size, index, count)
            processes.wait_for_everyone()
        self._fill(model, documents, batch_size)  # of several, what another machine did on a disk of its own

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> ReadDocument:
        tensors = load_file(self._files[number])
        return ReadDocument(tensors["tokens"].long(), tensors["hidden"], tensors["log_prob"])

    @torch.no_grad()
    def _fill(
        self, model: HippoFormer, documents: Sequence[Tensor], batch_size: int, index: int = 0, count: int = 1
    ) -> None:
        """Reads what is missing of every `count`-th document."""
        missing = [i for i, file in enumerate(self._files) if i % count == index and not file.is_file()]
        if not missing:
            return
        # Side by side go documents of like length, so that few rows idle.
        missing.sort(key=lambda i: self.lengths[i])
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=index > 0) as progress, model.memory_off():
            task = progress.add_task("reading with the base (tokens)", total=sum(self.lengths[i] for i in missing))
            for low in range(0, len(missing), batch_size):
                chosen = missing[low : low + batch_size]
                lengths = [self.lengths[i] for i in chosen]
                ids = torch.nn.utils.rnn.pad_sequence([documents[i].long() for i in chosen], batch_first=True)
                hidden: list[list[Tensor]] = [[] for _ in chosen]
                log_prob: list[list[Tensor]] = [[] for _ in chosen]
                for step in model.stream(ids.to(model.device), lengths, model.new_cache(len(chosen))):
                    for row, n in enumerate(step.new):
                        hidden[row].append(step.hidden[row, :n].cpu())
                        log_prob[row].append(step.target_log_prob[row, :n].cpu())
                    progress.advance(task, sum(step.new))
                for row, i in enumerate(chosen):
                    tensors = {"hidden": torch.cat(hidden[row]), "log_prob": torch.cat(log_prob[row])}
                    write_tensors(self._files[i], tensors | {"tokens": documents[i].to(torch.int32)})


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()[:24]
