"""Reinstatement: a cue brings passages back, to be read again.

Recall votes for tokens that were seen in a similar state; it answers in the words of the text. What is asked in other
words has to be understood, and that takes all layers of the base: so the passages that a cue points to are put before
it as text and read once more (the reinstatement of a context by a part of it, Teyler & DiScenna 1986; text put before a
question, Lewis et al. 2020, arXiv:2005.11401, here from a memory that chose what to keep and has a fixed size).

A passage is what is remembered within `span` tokens of its middle. It counts by the words of the cue that stand in it,
each by how rare it is in this memory (inverse document frequency, Spärck Jones 1972), the less the farther from the
middle; of passages that count the same the newest goes first.

What was found is a cue in its turn: who asks for the football finds who took it, and has to find where she went. So a
part of the room is for passages around what is associated, the words that stand in several of those found first, each
by the number of these times the third power of its rarity (relevance feedback, Rocchio 1971). What is left of the room
then goes to the cue again.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hippoformer.hippocampus.episodes import Episodes
from hippoformer.tensors.selection import put, take

# Of two passages that count the same the newer is preferred by less than any word is worth.
_NEWER = 1e-4
# Of the room for what the cue itself points to, before what is associated with it.
_FIRST = 0.4
_TINY = 1e-12
_FEWEST, _RARE = 2, 3  # passages that an associated word stands in; the power of its rarity


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
    counts = episodes.valid & ~_repeated(words, position, span)
    asked, rarity = _among(words, cue), _rarity(words)
    of_cue = torch.where(counts & asked, rarity, 0.0)
    chosen = _chosen(torch.zeros_like(counts), of_cue, episodes, int(_FIRST * n_tokens), span)
    together = _passages_with(words, chosen, position, span)
    associated = torch.where(counts & ~asked, together * rarity**_RARE, 0.0)
    associated = associated / associated.amax(-1, keepdim=True).clamp_min(_TINY)
    chosen = _chosen(chosen, associated, episodes, n_tokens, span)
    return _chosen(chosen, of_cue, episodes, n_tokens, span)


def _chosen(chosen: Tensor, worth: Tensor, episodes: Episodes, n_tokens: int, span: int) -> Tensor:
    """(R, E) bool, with more passages by what their words are worth, until `n_tokens` are chosen in all."""
    position = episodes.position
    worth = torch.where(chosen, 0.0, worth)
    newer = torch.arange(worth.shape[1], device=worth.device) * (_NEWER / worth.shape[1])
    going_on = worth.sum(-1) > 0
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


def _passages_with(words: Tensor, chosen: Tensor, position: Tensor, span: int) -> Tensor:
    """(R, E) in how many of the chosen passages each word stands; 0 if in fewer than `_FEWEST`.

    A passage ends where the next slot is not chosen, or farther on in the text than `span`.
    """
    goes_on = chosen[:, 1:] & chosen[:, :-1] & (position.diff() <= span)
    begins = chosen & ~pad(goes_on, (1, 0))
    row, slot = chosen.nonzero(as_tuple=True)
    in_passages = torch.stack((row, words[row, slot], begins.cumsum(-1)[row, slot])).unique(dim=1)
    found, number = in_passages[:2].unique(dim=1, return_counts=True)  # (2, M) rows and words, in order
    if not found.numel():
        return torch.zeros(words.shape, device=words.device)
    most = int(words.max()) + 3  # words are -2 and more
    key = found[0] * most + found[1] + 2
    wanted = torch.arange(words.shape[0], device=words.device).unsqueeze(-1) * most + words + 2
    place = torch.searchsorted(key, wanted).clamp_max(key.numel() - 1)
    count = torch.where(key[place] == wanted, number[place], 0).float()
    return torch.where(count >= _FEWEST, count, 0.0)


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
