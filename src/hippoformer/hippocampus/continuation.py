"""Continuation: if an episode predicted the token just read, the episode after it is boosted; the longest match wins.

Episode e - 1 predicted the token that query t has read: then episode e, the next one in its text, says what came next
there. m_t(e) counts how many tokens in a row, up to that of query t, were predicted so. Recall by similarity gives
weights r'_t (see recall); a part phi of them moves to the episodes that continue a match (as in prediction by partial
matching, Cleary & Witten 1984, and the unbounded n-grams of Liu et al. 2024, arXiv:2401.17377):

    q_t(e)   ~ (r'_t(e) + floor) m_t(e)^8            over e with m_t(e) > 0, normalised
    phi_t(e) = sigmoid(g(query) + w log m_t(e))
    r_t      = (1 - |f_t|) r'_t + f_t,               f_t(e) = phi_t(e) q_t(e)

* Tokens are compared as words: "Anna" at the beginning of a line is the " Anna" within one (`hippocampus.spelling`).
* Characters that both texts share right before a match count too, three of them as one token, so that a name cut into
  other tokens still counts.
* Of equally long matches the newest counts most: the last of several contradicting statements wins.
* Only the `PLACES` longest matches of a query are considered, the newest of equals. Cost and memory are therefore the
  same for prose and for 100,000 equal tokens, in which every pair matches.

All shapes are fixed and nothing asks the device for a value. R rows, N queries, E episode slots, P places.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hippoformer.hippocampus.episodes import joined
from hippoformer.hippocampus.spelling import CHARACTERS

# Matches of one query that are considered.
PLACES = 64
# Longer matches are all the same: their powers would leave the range of float32.
LONGEST = 1024
# A match of more tokens is a statement, not a common phrase: of several, the newest counts most.
STATEMENT = 3.0
# A match need not resemble the query.
_FLOOR = 1e-4
# Exponent gamma of the length; characters before a match that count as a token; the k-th newest of equally long matches
# of m tokens counts by k^(-_RECENCY log(m / STATEMENT)). Each was measured once (docs/notebook) and never varied since.
_POWER, _CHARACTERS_A_TOKEN, _RECENCY = 8.0, 3.0, 4.0
_TINY = 1e-12
_PARTS = 64
# The characters before a match are those of so many tokens.
_TOKENS_BEFORE = 4


def predicted_words(words: Tensor, position: Tensor) -> Tensor:
    """(R, E) int32, the word that the episode before each slot predicted; -1 where the text has a gap between them.

    Args:
        words: (R, E) int32, which word each episode's token is. position: (R, E) of the episodes.
    """
    return pad(torch.where(joined(position), words[:, :-1], -1), (1, 0), value=-1)


@torch.no_grad()
def match_lengths(predicted: Tensor, read: Tensor, visible: Tensor, before: Tensor) -> Tensor:
    """(R, N, E) int16, m in tokens: how many in a row, up to each query's own, were predicted; at most `LONGEST`.

    Args:
        predicted: (R, E) as `predicted_words` gives it. read: (R, N) int32, words of N consecutive queries.
        visible: (R, N, E) bool, what each query may recall.
        before: (R, E) the same lengths for the query before these.
    """
    n_queries, n_slots = visible.shape[1:]
    length = ((predicted.unsqueeze(1) == read.unsqueeze(-1)) & visible).to(torch.int16)
    # Lengths up to 1, 2, 4, ... : a run that is full goes on with the one that ended there.
    reach = 1
    while reach < n_queries:
        goes_on = length[:, reach:, reach:] == reach
        length[:, reach:, reach:] += length[:, :-reach, :-reach] * goes_on
        reach *= 2
    # A run that began with the first of these queries goes on with that of the query before.
    before = before.clamp_max(LONGEST).to(length.dtype)
    earlier = pad(before, (n_queries, 0)).unfold(-1, n_slots, 1)[:, :n_queries].flip(1)
    whole = torch.arange(1, n_queries + 1, device=length.device, dtype=length.dtype).unsqueeze(-1)
    return (length + torch.where(length == whole, earlier, 0)).clamp_max(LONGEST)


def text_before(ending: Tensor, position: Tensor) -> Tensor:
    """(R, E) int64, the last `CHARACTERS` characters before each slot's token, a byte each, the last one lowest.

    Args:
        ending: (R, E) the end of each slot's token; 0 where it is not known, and no text reaches over that.
        position: (R, E) of the episodes; no text reaches over a gap either.
    """
    n_slots = ending.shape[1]

    def earlier(values: Tensor, first: int) -> Tensor:
        """(R, E, 4): of the slots `first`, `first` + 1, ... before each."""
        reach = _TOKENS_BEFORE - 1 + first
        return pad(values, (reach, 0)).unfold(-1, _TOKENS_BEFORE, 1)[:, :n_slots].flip(-1)

    token, count = earlier(ending, 1), earlier(_count_characters(ending), 1)
    unbroken = (earlier(pad(joined(position), (1, 0)), 0) & (token != 0)).to(torch.int64).cumprod(-1)
    offset = (count * unbroken).cumsum(-1) - count * unbroken
    fits = (unbroken == 1) & (offset < CHARACTERS)
    placed = token << 8 * offset.clamp_max(CHARACTERS - 1) & ((1 << 8 * CHARACTERS) - 1)
    return torch.where(fits, placed, 0).sum(-1)


def _count_characters(text: Tensor) -> Tensor:
    """How many there are, of a byte each, none of them zero."""
    place = 8 * torch.arange(CHARACTERS, device=text.device)
    return ((text.unsqueeze(-1) >> place) != 0).sum(-1)


def _shared_characters(one: Tensor, other: Tensor) -> Tensor:
    """How many characters two texts share at their ends."""
    differ = one ^ other
    # The lowest bit that differs says after how many characters.
    bit = (differ & -differ).clamp_min(1).double().log2().round()
    return torch.where(differ == 0, _count_characters(one), torch.div(bit, 8, rounding_mode="floor").to(torch.int64))


@dataclass
class Matches:
    """The P longest matches of each of N queries.

    Attributes:
        slot: (R, N, P) int64, the episode that continues the match, no slot twice.
        length: (R, N, P) float32, m in tokens, shared characters included; 0 where there is no match.
        newer: (R, N, P) int64, how many others of the same query match as long and are newer; 0 for matches of at most
            `STATEMENT` tokens.
    """

    slot: Tensor
    length: Tensor
    newer: Tensor


@torch.no_grad()
def longest_matches(length: Tensor, position: Tensor, own_slot: Tensor, text: Tensor) -> Matches:
    """The longest of all matches, of equals the newest; P is `PLACES`, or E where that is less.

    Args:
        length: (R, N, E) as `match_lengths` gives it. position: (R, E) of the episodes.
        own_slot: (R,) int64, the slot of the token that the first query has read; the others' follow.
        text: (R, E) as `text_before` gives it.
    """
    n_queries, n_slots = length.shape[1:]
    slots = torch.arange(n_slots, device=length.device, dtype=torch.int32)
    key, slot = (length.int() * n_slots + slots).topk(min(PLACES, n_slots), dim=-1)
    tokens = key // n_slots
    own = own_slot.unsqueeze(-1) + torch.arange(n_queries, device=length.device)  # (R, N)
    there = _text_at_start(text, position, slot - 1, tokens)
    here = _text_at_start(text, position, own.unsqueeze(-1).expand_as(slot), tokens)
    shared = _shared_characters(there, here) * (1.0 / _CHARACTERS_A_TOKEN)
    found = (tokens + torch.where(tokens > 0, shared, 0.0)).clamp_max(LONGEST)
    # Lengths are equal that differ by less than a part of a token, for characters.
    parts = torch.where(found > STATEMENT, (found * _PARTS).round(), -1.0 - slot)
    newer = (parts.unsqueeze(-1) == parts.unsqueeze(-2)) & (slot.unsqueeze(-1) < slot.unsqueeze(-2))
    return Matches(slot, found, newer.sum(-1))


def _text_at_start(text: Tensor, position: Tensor, end: Tensor, tokens: Tensor) -> Tensor:
    """(R, N, P) int64, the text before a match of so many tokens (R, N, P) that ends in the slot `end` (R, N, P); 0
    where its first token is no longer remembered."""
    last = text.shape[1] - 1
    end = end.clamp(0, last)
    start = (end - tokens + 1).clamp(0, last)

    def at(values: Tensor, slot: Tensor) -> Tensor:
        return values.gather(1, slot.flatten(1)).view(slot.shape)

    return torch.where(at(position, start) == at(position, end) - tokens + 1, at(text, start), 0)


def follow(weights: Tensor, matches: Matches, phi: Tensor) -> tuple[Tensor, Tensor]:
    """Moves a part of what was recalled to the episodes that continue a match.

    Args:
        weights: (R, N, E + 1) r', null in front. matches: of the same queries.
        phi: (R, N, P) how surely each match goes on.

    Returns:
        (R, N, E + 1) weights, each query's summing to 1 as before; and (R, N), the part that was moved.
    """
    column = matches.slot + 1
    log_length = matches.length.clamp_min(1.0).log()
    fading = _RECENCY * (log_length - math.log(STATEMENT)).clamp_min(0.0)
    strength = (_POWER * log_length - fading * matches.newer.float().log1p()).exp()
    match = torch.where(matches.length > 0, (weights.gather(-1, column) + _FLOOR) * strength, 0.0)
    moved = phi * match / match.sum(-1, keepdim=True).clamp_min(_TINY)  # (R, N, P)
    share = moved.sum(-1, keepdim=True)
    return (weights * (1.0 - share)).scatter_add(-1, column, moved), share.squeeze(-1)
