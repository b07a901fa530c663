"""What each episode turns out to be worth: the target that salience learns to foresee.

With recall trained, documents are read once more with a store large enough to keep everything, all memories equal. At
the end each episode has earned its credit: the share of later predictions, beyond the window, that it is owed.

Measuring with everything kept is what makes the target honest: with the working capacity, an episode that the present
gate lets go could never prove it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hippoformer.hippocampus.circuit import Hippocampus, MemoryState
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.training.hidden_states import ReadDocument


@contextmanager
def reconfigured(hippocampus: Hippocampus, **options: object) -> Iterator[HippoFormerConfig]:
    """Runs the hippocampus under other options; those that shape parameters must stay as they are."""
    before = hippocampus.config
    hippocampus.configure(HippoFormerConfig(**(before.to_dict() | options)))
    try:
        yield hippocampus.config
    finally:
        hippocampus.configure(before)


@torch.no_grad()
def measure_credit(hippocampus: Hippocampus, document: ReadDocument) -> Tensor:
    """Credit of each token's episode.

    Args:
        document: T tokens as the base read them.

    Returns:
        (T,) float32; NaN for the first token, which has no episode, and for those that never left the window.
    """
    length = len(document)
    everything = {
        "buffer_size": length,
        "selection": "fifo",
        "decay_rate": 1.0,
        "untagged_weight": 1.0,
        "importance_weight_range": (1.0, 1.0),
    }
    with reconfigured(hippocampus, **everything) as config:
        device = hippocampus.recall.key_proj.weight.device
        state = MemoryState.empty(1, document.hidden.shape[-1], config, document.hidden.dtype, device)
        for start in range(0, length, config.segment_len):
            part = slice(start, min(start + config.segment_len, length))
            n = part.stop - part.start
            _, state = hippocampus.step(
                state,
                [start],
                document.hidden[part].unsqueeze(0).to(device),
                document.tokens[part].unsqueeze(0).to(device),
                -document.log_prob[part].unsqueeze(0).to(device),
                [n],
            )
            if n == config.segment_len:
                state, _ = hippocampus.end_segment(state, [part.stop], [0])
        stored = state.episodes.slots(0, config.buffer_size)
        credit = torch.full((length,), torch.nan)
        kept = stored.valid[0]
        credit[stored.position[0, kept].long().cpu()] = stored.credit[0, kept].cpu()
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
