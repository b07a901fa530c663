"""Hidden states of a frozen base, computed once and kept on disk: training the hippocampus then takes minutes.

The base's hidden states do not depend on the memory, so each document is streamed through the window with the episodes
off, and becomes one safetensors file. The folder's name is a digest of everything that the numbers depend on. Files
that exist are not computed again, so an interrupted run continues where it was.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from hippoformer.errors import TextError
from hippoformer.model.checkpoint import write_tensors
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.weights import base_fingerprint

if TYPE_CHECKING:
    from accelerate import PartialState


@dataclass
class ReadDocument:
    """A document of T tokens as the base read it, or spans of R documents with rows in front.

    Attributes:
        tokens: (T,) int64. hidden: (T, n D), what the hippocampus reads, in the base's dtype.
        base_log_prob, log_prob: (T,) float32, of each token under the base, and after unigram adaptation; 0 for the
            first token.
    """

    tokens: Tensor
    hidden: Tensor
    base_log_prob: Tensor
    log_prob: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def of_like_length(numbers: Sequence[int], lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Documents in groups of `rows`, those of like length together, so that few rows wait."""
    alike = sorted(numbers, key=lambda number: lengths[number])
    return [alike[low : low + rows] for low in range(0, len(alike), rows)]


class HiddenStateCache(Sequence[ReadDocument]):
    """Documents with their hidden states, on disk.

    Args:
        model: whose base reads. documents: token ids of each document.
        folder: of all caches; each gets a subfolder of its own.
        batch_size: documents read side by side.
        processes: which divide the reading; None where there is one.
    """

    def __init__(
        self,
        model: HippoFormer,
        documents: Sequence[Tensor],
        folder: Path,
        batch_size: int = 8,
        processes: "PartialState | None" = None,
    ) -> None:
        if not documents:
            raise TextError("no documents to read: expected at least one with two tokens or more")
        config = model.config
        facts = {
            "base": base_fingerprint(model.base),
            "window": [config.window, config.sink_tokens, config.segment_len],
            "layers": config.memory_layers,
            "unigrams": config.marginal_weight,
            "dtype": str(model.dtype),
        }
        self.folder = Path(folder) / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        names = [hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()[:24] for ids in documents]
        self._files = [self.folder / f"{name}.safetensors" for name in names]
        self.texts, self.lengths = documents, [len(ids) for ids in documents]
        if processes is not None and processes.num_processes > 1:
            mine = range(processes.process_index, len(documents), processes.num_processes)
            self._fill(model, documents, batch_size, mine)
            processes.wait_for_everyone()
        # All of them: what another machine has read may lie on a disk of its own.
        self._fill(model, documents, batch_size, range(len(documents)))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> ReadDocument:  # type: ignore[override]
        tensors = load_file(self._files[number])
        return ReadDocument(**tensors | {"tokens": tensors["tokens"].long()})

    @torch.no_grad()
    def _fill(self, model: HippoFormer, documents: Sequence[Tensor], batch_size: int, mine: range) -> None:
        """Reads what is missing of some documents."""
        missing = [number for number in mine if not self._files[number].is_file()]
        if not missing:
            return
        total = sum(self.lengths[number] for number in missing)
        with tqdm(total=total, desc="reading with the base", unit="token", disable=None) as progress:
            for chosen in of_like_length(missing, self.lengths, batch_size):
                parts: list[list[ReadDocument]] = [[] for _ in chosen]
                lengths, cache = [self.lengths[number] for number in chosen], model.new_cache(len(chosen))
                ids = pad_sequence([documents[number].long() for number in chosen], batch_first=True).to(model.device)
                with model.episodes_off():
                    for step in model.stream(ids, lengths, cache):
                        for row, (low, n) in enumerate(zip(step.start, step.new, strict=True)):
                            read = (step.hidden, step.base_log_prob, step.target_log_prob)
                            tokens = ids[row, low : low + n].int().cpu()
                            parts[row].append(ReadDocument(tokens, *(tensor[row, :n].cpu() for tensor in read)))
                        progress.update(sum(step.new))
                for number, part in zip(chosen, parts, strict=True):
                    names = vars(part[0])
                    write_tensors(self._files[number], {n: torch.cat([getattr(p, n) for p in part]) for n in names})
