"""Hidden states of a frozen base, computed once: training the hippocampus then takes minutes, not hours.

The base's hidden states do not depend on the memory, so a text is streamed through the window with the memory off,
and each document becomes safetensors files: one with `tokens` (T,) and `log_prob` (T,) of each token under the base,
one for each layer that is read, `hidden` (T, D) in the base's dtype, and one with `log_prob` (T,) as marginals move it,
where they are kept: they too depend on the base alone. The folder's name is a digest of everything
the numbers depend on; files that are there are not computed again, so an interrupted run continues where it was, and
after one reading of several layers a hippocampus of any of them finds its own.
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
from torch.nn.utils.rnn import pad_sequence

from hippoformer.errors import TextError
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.weights import base_fingerprint


@dataclass
class ReadDocument:
    """A document as the base read it.

    Attributes:
        tokens: (T,) int64. hidden: (T, D), what the hippocampus reads.
        base_log_prob, log_prob: (T,) float32, of each token under the base, and as the text's marginals move it; 0 for
            the first token.
    """

    tokens: Tensor
    hidden: Tensor
    base_log_prob: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def of_like_length(numbers: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Documents in groups of so many, those of like length together, so that few rows idle."""
    alike = sorted(numbers, key=lambda number: lengths[number])
    return [alike[low : low + rows] for low in range(0, len(alike), rows)]


def side_by_side(documents: Sequence[ReadDocument], parts: Sequence[slice], device: torch.device) -> ReadDocument:
    """A part of each of R documents, padded on the right: the same tensors with rows in front."""
    columns = zip(*(vars(document).values() for document in documents), strict=True)
    cut = ([tensor[part] for tensor, part in zip(column, parts, strict=True)] for column in columns)
    return ReadDocument(*(pad_sequence(rows, batch_first=True).to(device) for rows in cut))


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
            "window": [config.window, config.sink_tokens, config.segment_len],
            "dtype": str(model.dtype),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(folder) / digest
        self._names = [_digest(ids) for ids in documents]
        self._layers = config.memory_layers
        self._moved = f"moved-{config.marginal_weight:g}-{config.marginal_prior:g}" if config.marginal_weight else None
        self.lengths = [len(ids) for ids in documents]
        index, count = (processes.process_index, processes.num_processes) if processes is not None else (0, 1)
        if processes is not None and count > 1:
            self._fill(model, documents, batch_size, index, count)
            processes.wait_for_everyone()
        self._fill(model, documents, batch_size)  # of several, what another machine did on a disk of its own

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, number: int) -> ReadDocument:
        text, *layers = (load_file(file) for file in self._files(number))
        moved = layers.pop()["log_prob"] if self._moved else text["log_prob"]
        hidden = torch.cat([layer["hidden"] for layer in layers], dim=-1)
        return ReadDocument(text["tokens"].long(), hidden, text["log_prob"], moved)

    def _files(self, number: int) -> list[Path]:
        """Of a document: its tokens, then each layer's hidden states, then what marginals make of its predictions."""
        name = self._names[number]
        parts = ["last" if layer == -1 else layer for layer in self._layers] + ([self._moved] if self._moved else [])
        return [self.folder / f"{name}.safetensors", *(self.folder / f"{name}.{part}.safetensors" for part in parts)]

    @torch.no_grad()
    def _fill(
        self, model: HippoFormer, documents: Sequence[Tensor], batch_size: int, index: int = 0, count: int = 1
    ) -> None:
        """Reads what is missing of every `count`-th document."""
        mine = range(index, len(self), count)
        missing = [i for i in mine if not all(file.is_file() for file in self._files(i))]
        if not missing:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=index > 0) as progress, model.episodes_off():
            task = progress.add_task("reading with the base (tokens)", total=sum(self.lengths[i] for i in missing))
            for chosen in of_like_length(missing, self.lengths, batch_size):
                lengths = [self.lengths[i] for i in chosen]
                ids = pad_sequence([documents[i].long() for i in chosen], batch_first=True)
                hidden: list[list[Tensor]] = [[] for _ in chosen]
                log_prob: list[list[Tensor]] = [[] for _ in chosen]
                moved: list[list[Tensor]] = [[] for _ in chosen]
                for step in model.stream(ids.to(model.device), lengths, model.new_cache(len(chosen))):
                    for row, n in enumerate(step.new):
                        hidden[row].append(step.hidden[row, :n].cpu())
                        log_prob[row].append(step.base_log_prob[row, :n].cpu())
                        if self._moved:
                            moved[row].append(step.target_log_prob[row, :n].cpu())
                    progress.advance(task, sum(step.new))
                for row, i in enumerate(chosen):
                    told, *files = self._files(i)
                    if self._moved:
                        write_tensors(files.pop(), {"log_prob": torch.cat(moved[row])})
                    layers = torch.cat(hidden[row]).chunk(len(files), dim=-1)
                    for file, layer in zip(files, layers, strict=True):
                        write_tensors(file, {"hidden": layer})
                    write_tensors(told, {"tokens": documents[i].to(torch.int32), "log_prob": torch.cat(log_prob[row])})


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()[:24]
