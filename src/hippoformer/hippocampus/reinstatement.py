"""Reinstatement: a cue brings passages back, to be read again.

Recall votes for tokens that were seen in a similar state; it answers in the words of the text. What is asked in other
words has to be understood, and that takes all layers of the base: so the passages that a cue points to are put before
it as text and read once more (the reinstatement of a context by a part of it, Teyler & DiScenna 1986; text put before a
question, Lewis et al. 2020, arXiv:2005.11401, here from a memory that chose what to keep and has a fixed size).

A passage is what is remembered within `span` tokens of its middle. It counts by the words of the cue that stand in it,
each by how rare it is in this memory (inverse document frequency, Spärck Jones 1972), the less the farther from the
middle; of passages that count the same the newest goes first.
"""

import torch
from torch import Tensor

from hippoformer.hippocampus.episodes import Episodes
from hippoformer.tensors.selection import put, take

# Of two passages that count the same the newer is preferred by less than any word is worth.
_NEWER = 1e-4


@torch.no_grad()
def reinstated(episodes: Episodes, words: Tensor, cue: Tensor, n_tokens: int, span: int) -> Tensor:
    """Chooses passages, the best first, until one does not fit or none is left.

    Args:
        episodes: E slots of R rows, in the order of the text.
        words: (R, E) which word each slot's token is. cue: (R, Q) words of the cue, -1 at padding.
        n_tokens: to choose in a row, at most. span: tokens on either side of a passage's middle.

    Returns:
        (R, E) bool, what is read again.
    """
    position, words = episodes.position, torch.where(episodes.valid, words, -2)
    worth = torch.where(_among(words, cue) & ~_repeated(words, position, span), _rarity(words), 0.0)
    newer = torch.arange(worth.shape[1], device=worth.device) * (_NEWER / worth.shape[1])
    chosen, going_on = torch.zeros_like(episodes.valid), worth.sum(-1) > 0
    while going_on.any():
        score = _around(worth, position, span)
        best, middle = (score + newer).masked_fill(score <= 0, -torch.inf).max(-1, keepdim=True)
        near = ((position - take(position, middle)).abs() <= span) & episodes.valid
        passage, room = near & ~chosen, n_tokens - chosen.sum(-1, keepdim=True)
        fits = going_on.unsqueeze(-1) & best.isfinite() & (passage.sum(-1, keepdim=True) <= room)
        chosen = chosen | (passage & fits)
        worth = torch.where(near, 0.0, worth)
        going_on = fits.squeeze(-1)
    return chosen


def _rarity(words: Tensor) -> Tensor:
    """(R, E) log of how many slots there are to each that holds the same word."""
    in_order, order = words.sort(dim=-1)
    count = torch.searchsorted(in_order, in_order, right=True) - torch.searchsorted(in_order, in_order)
    valid = (words >= 0).sum(-1, keepdim=True)
    return put(torch.zeros(words.shape, device=words.device), order, ((valid + 1) / (count + 1)).log().clamp_min(0.0))


def _around(worth: Tensor, position: Tensor, span: int) -> Tensor:
    """(R, E) the worth of what stands around each slot in the text, near things more than far ones."""
    total, slots = worth.clone(), worth.shape[1]
    for distance in range(1, min(span, slots - 1) + 1):
        earlier, later = position[:, :-distance], position[:, distance:]
        share = (1.0 - (later - earlier) / (span + 1.0)).clamp_min(0.0) * ((earlier >= 0) & (later >= 0))
        total[:, distance:] += share * worth[:, :-distance]
        total[:, :-distance] += share * worth[:, distance:]
    return total


def _among(words: Tensor, cue: Tensor) -> Tensor:
    """(R, E) bool, whether each word (R, E) is one of the cue's (R, Q)."""
    in_order = cue.sort(dim=-1).values
    place = torch.searchsorted(in_order, words.contiguous()).clamp_max(cue.shape[1] - 1)
    return (in_order.gather(1, place) == words) & (words >= 0)


def _repeated(words: Tensor, position: Tensor, span: int) -> Tensor:
    """(R, E) bool, whether the same word stands within the `span` tokens before."""
    in_order, order = words.sort(dim=-1, stable=True)
    at = position.gather(1, order)
    again = (in_order[:, 1:] == in_order[:, :-1]) & (at[:, 1:] - at[:, :-1] <= span)
    again = torch.cat((torch.zeros_like(again[:, :1]), again), dim=1)
    return put(torch.zeros_like(words, dtype=torch.bool), order, again)
