"""What each episode turns out to be worth: the target that the gate learns to predict.

With recall trained, documents are read once more with a store that keeps every episode, all of equal priority. At the
end each episode has earned its credit: the share of later predictions, beyond the window, that is owed to it. With the
working capacity, an episode that the present gate drops could never prove its worth.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.circuit import Hippocampus
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.training.hidden_states import ReadDocument
from hippoformer.training.readers import cut
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
        (T,) float32 for each document of T tokens; NaN where there is no episode: for the first token, and for those
        that never left the window.
    """
    (stored,) = deque(_after_each_segment(hippocampus, documents), maxlen=1)
    return [_credit(stored, row, len(document)) for row, document in enumerate(documents)]


def measure_credit_by_halves(hippocampus: Hippocampus, document: ReadDocument) -> Tensor:
    """(2, T) credit that the even and the odd segments of a document give; their sum is `measure_credit`."""
    halves, before = torch.zeros(2, len(document)), torch.zeros(len(document))
    for segment, stored in enumerate(_after_each_segment(hippocampus, [document])):
        credit = _credit(stored, 0, len(document))
        halves[segment % 2] += credit.nan_to_num() - before
        before = credit.nan_to_num()
    return torch.where(credit.isnan(), torch.nan, halves)


@torch.no_grad()
def _after_each_segment(hippocampus: Hippocampus, documents: Sequence[ReadDocument]) -> Iterator[Episodes]:
    """What is stored of the documents so far; valid until the next segment is read."""
    lengths = [len(document) for document in documents]
    everything = {"buffer_size": max(lengths), "selection": "fifo", "decay_rate": 1.0, "max_replay_rounds": 0}
    with reconfigured(hippocampus, **everything, importance_weight_range=(1.0, 1.0)) as config:
        device = hippocampus.recall.key_proj.weight.device
        state = hippocampus.empty_state(len(documents), documents[0].hidden.dtype, device)
        for piece in whole_documents(range(len(documents)), lengths, config.segment_len):
            reading, _ = cut(documents, piece, device)
            _, state = hippocampus.read(state, reading, credit=True)
            yield state.episodes.slots(0, config.buffer_size)


def _credit(stored: Episodes, row: int, length: int) -> Tensor:
    """(T,) credit of a row's episodes by their position; NaN where none is stored."""
    credit, kept = torch.full((length,), torch.nan), stored.valid[row]
    credit[stored.position[row, kept].long().cpu()] = stored.credit[row, kept].cpu()
    return credit
