"""What each episode turns out to be worth: the target that salience learns to foresee.

With recall trained, documents are read once more with a store large enough to keep everything, all memories equal. At
the end each episode has earned its credit: the share of later predictions, beyond the window, that it is owed.

Measuring with everything kept is what makes the target honest: with the working capacity, an episode that the present
gate lets go could never prove it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.circuit import Hippocampus, MemoryState
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.training.hidden_states import ReadDocument, side_by_side
from hippoformer.training.streams import whole_documents


@contextmanager
def reconfigured(hippocampus: Hippocampus, **options: object) -> Iterator[HippoFormerConfig]:
    """Runs the hippocampus under other options; those that shape parameters must stay as they are."""
    before = hippocampus.config
    hippocampus.configure(HippoFormerConfig(**(before.to_dict() | options)))
    try:
        yield hippocampus.config
    finally:
        hippocampus.configure(before)


def measure_credit(hippocampus: Hippocampus, documents: Sequence[ReadDocument]) -> list[Tensor]:
    """Credit of each token's episode.

    Args:
        documents: as the base read them, side by side in rows; best of like length.

    Returns:
        (T,) float32 for each document of T tokens; NaN for the first token, which has no episode, and for those that
        never left the window.
    """
    (stored,) = deque(_after_each_segment(hippocampus, documents), maxlen=1)
    return [_credit(stored, row, len(document)) for row, document in enumerate(documents)]


def measure_credit_by_halves(hippocampus: Hippocampus, document: ReadDocument) -> Tensor:
    """The same of one document, what every second segment owes to an episode apart from what those between owe.

    Returns:
        (2, T) float32, the halves of `measure_credit`; NaN as there.
    """
    halves = torch.zeros(2, len(document))
    before = torch.zeros(len(document))
    for segment, stored in enumerate(_after_each_segment(hippocampus, [document])):
        credit = _credit(stored, 0, len(document))
        halves[segment % 2] += credit.nan_to_num() - before
        before = credit.nan_to_num()
    return torch.where(credit.isnan(), torch.nan, halves)


@torch.no_grad()
def _after_each_segment(hippocampus: Hippocampus, documents: Sequence[ReadDocument]) -> Iterator[Episodes]:
    """What is stored of the documents so far; good until the next segment is read."""
    lengths = [len(document) for document in documents]
    everything = {
        "buffer_size": max(lengths),
        "selection": "fifo",
        "decay_rate": 1.0,
        "priority_threshold": 0.0,
        "max_replay_rounds": 0,
        "untagged_weight": 1.0,
        "importance_weight_range": (1.0, 1.0),
    }
    with reconfigured(hippocampus, **everything) as config:
        device, read = hippocampus.recall.key_proj.weight.device, documents[0].hidden
        state = MemoryState.empty(len(documents), read.shape[-1], config, read.dtype, device)
        for piece in whole_documents(range(len(documents)), lengths, config.segment_len):
            end = [low + n for low, n in zip(piece.start, piece.length, strict=True)]
            spans = [slice(low, high) for low, high in zip(piece.start, end, strict=True)]
            part = side_by_side(documents, spans, device)
            _, state = hippocampus.step(state, piece.start, part.hidden, part.tokens, -part.log_prob, piece.length)
            if rows := [row for row, n in enumerate(piece.length) if n == config.segment_len]:
                state, _ = hippocampus.end_segment(state, end, rows)
            yield state.episodes.slots(0, config.buffer_size)


def _credit(stored: Episodes, row: int, length: int) -> Tensor:
    """(T,) credit by position of a row's episodes; NaN where none is stored."""
    credit, kept = torch.full((length,), torch.nan), stored.valid[row]
    credit[stored.position[row, kept].long().cpu()] = stored.credit[row, kept].cpu()
    return credit


def useful(credit: Tensor) -> Tensor:
    """How useful each episode of a document turned out to be: its credit, up to one whole prediction.

    Args:
        credit: (T,) of `measure_credit`; NaN stays NaN.

    Returns:
        (T,) in [0, 1]. Foreseeing this is foreseeing the chance to be asked for, which ranks what is told once and
        asked for once, a name or a number, before the tenth best "of the".
    """
    return credit.clamp(0.0, 1.0)
