"""Replay: the offline pass at a segment end in which memories are reactivated, merged, refreshed or let go.

The store is cued with some of its own memories, `max_replay_rounds` x `replay_batch` of them, drawn without replacement
in proportion to need x gain (Mattar & Daw 2018): need is the effective priority, gain the credit a memory earned, the
share of later predictions owed to it. Each cue awakens the memory it resembles most, and both awaken the story they
stand in, `replay_span` memories on either side: a hippocampus replays sequences (Lee & Wilson 2002), and a story of
which single tokens grow old has holes where nothing leads on. What is reactivated is young again, and as far as it has
proven useful (credit, up to 1) its priority moves towards the highest importance by `replay_rate`, once for every time.
Raising what was merely touched would soon make all survivors equal, whatever their salience.
Where cue and companion vote for the same token, their keys agree and the older stands alone, they become one:
strengths and credits add, the newer key stays. What was not reactivated has aged by one segment, and what falls under
`priority_threshold` is forgotten.

Under fast forgetting replay is all that keeps old memories. But what is kept young leaves no room for what comes
later: in a long stream slow forgetting without replay remembers more (docs/lab-notebook.md, 2026-11-24), and the
shipped memory has `max_replay_rounds` 0. The draws depend on position and segment alone, so a row replays the same in
any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.episodes import Episodes, joined
from hippoformer.tensors.selection import hashed_uniform, take

# A memory that never earned credit still has this much gain: rehearsal must be able to discover usefulness.
_UNPROVEN_GAIN = 0.1


@dataclass
class ReplayReport:
    """What one consolidation did to each row; (R,) tensors of counts."""

    reactivated: Tensor
    merged: Tensor
    forgotten: Tensor


def consolidate(episodes: Episodes, segment: Tensor, config: HippoFormerConfig) -> tuple[Episodes, ReplayReport]:
    """One consolidation of the store: age by a segment, replay, forget.

    Args:
        episodes: the memory after the competition of this segment end; its working part is left alone.
        segment: (R,) int64 number of the segment that ended, part of the key of the draws.

    Returns:
        The new memory and a report.
    """
    n_stored = config.buffer_size
    store = {name: tensor[:, :n_stored] for name, tensor in episodes.tensors().items()}
    position, priority, strength = store["position"].clone(), store["priority"], store["strength"]
    age, credit = store["age"] + 1.0, store["credit"] * config.decay
    before = (position >= 0).sum(-1)
    reactivated, merged = torch.zeros_like(segment), torch.zeros_like(segment)

    if config.max_replay_rounds and n_stored > 1:
        weight = priority.detach() * config.decay**age * (credit + _UNPROVEN_GAIN)
        cue, cued = _draw_cues(weight, position, segment, config)
        similar, partner = _most_alike(store["key"].detach(), position, cue, config.recall_n_heads)
        woken = cued & (similar > 0)
        times = torch.zeros_like(priority)
        times = times.scatter_add(-1, cue, cued.float()).scatter_add(-1, partner, woken.float())
        times = _along_stories(times, position, config.replay_span)
        room = (config.importance_weight_range[1] - priority).clamp_min(0.0)
        rate = config.replay_rate * credit.clamp_max(1.0)
        priority = priority + (1.0 - (1.0 - rate) ** times) * room
        age = age.masked_fill(times > 0, 0.0)

        older, newer = torch.minimum(cue, partner), torch.maximum(cue, partner)  # slots are ordered by age of the text
        same_token = take(store["token"], cue) == take(store["token"], partner)
        alike = woken & same_token & (similar >= config.merge_threshold) & take(_alone(position), older)
        fuse = _without_conflicts(older, newer, alike, n_stored)
        strength = strength.scatter_add(-1, newer, take(strength, older) * fuse)
        credit = credit.scatter_add(-1, newer, take(credit, older) * fuse)
        priority = priority.scatter_reduce(-1, newer, take(priority, older) * fuse, "amax")
        position = position.masked_fill(_marked(position, older, fuse), -1)
        reactivated, merged = cued.sum(-1), fuse.sum(-1)

    alive = position >= 0
    forgotten = alive & (priority * config.decay**age < config.priority_threshold)
    position = position.masked_fill(forgotten, -1)
    report = ReplayReport(reactivated, merged, before - merged - (position >= 0).sum(-1))

    changed = {"position": position, "priority": priority, "age": age, "strength": strength, "credit": credit}
    return Episodes(
        **{
            name: torch.cat((changed[name], tensor[:, n_stored:]), dim=1) if name in changed else tensor
            for name, tensor in episodes.tensors().items()
        }
    ), report


def _draw_cues(weight: Tensor, position: Tensor, segment: Tensor, config: HippoFormerConfig) -> tuple[Tensor, Tensor]:
    """The cues in the order they are drawn: a Gumbel top-k, which is drawing without replacement.

    Returns:
        (R, Q) slots, and whether each is a real cue; a small store has fewer.
    """
    uniform = hashed_uniform(config.seed, segment.unsqueeze(-1), position.long())
    score = (weight.log() - (-uniform.log()).log()).masked_fill(position < 0, -torch.inf)
    best = score.topk(min(config.max_replay_rounds * config.replay_batch, score.shape[-1]), dim=-1)
    return best.indices, ~best.values.isneginf()


def _most_alike(key: Tensor, position: Tensor, cue: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """For each cue the memory most like it: its cosine, the mean over heads (-inf for none), and its slot; (R, Q)."""
    found: list[tuple[Tensor, Tensor]] = []
    for row in range(key.shape[0]):
        similarity = linear(key[row, cue[row]], key[row])  # (Q, M)
        similarity.masked_fill_(position[row] < 0, -torch.inf).scatter_(-1, cue[row].unsqueeze(-1), -torch.inf)
        found.append(tuple(similarity.max(-1)))  # type: ignore[arg-type]
    similar, partner = (torch.stack(column) for column in zip(*found, strict=True))
    return similar.float() / n_heads, partner


def _along_stories(times: Tensor, position: Tensor, span: int) -> Tensor:
    """(R, M) the largest of the counts (R, M) within `span` slots on either side that are joined without a gap."""
    story = pad(~joined(position), (1, 0)).cumsum(-1)  # the slots of one story have one number
    spread = times
    for distance in range(1, min(span, times.shape[-1] - 1) + 1):
        same = (story[:, distance:] == story[:, :-distance]).to(times.dtype)
        from_before = pad(times[:, :-distance] * same, (distance, 0))
        from_behind = pad(times[:, distance:] * same, (0, distance))
        spread = torch.maximum(spread, torch.maximum(from_before, from_behind))
    return spread


def _alone(position: Tensor) -> Tensor:
    """(R, M) bool, memories of which neither what came before nor what came after is remembered.

    The space before a number is like the space before any other: folded into one, all but one number would lose the
    memory that leads to it. So a story is never cut; what stands alone leads nowhere and may be folded.
    """
    tied = pad(joined(position), (1, 1))  # (R, M + 1)
    return ~tied[:, :-1] & ~tied[:, 1:]


def _marked(like: Tensor, index: Tensor, on: Tensor) -> Tensor:
    """(R, M) bool, True at index (R, Q) where `on` holds for any of the entries that name the slot."""
    counts = torch.zeros(like.shape, dtype=torch.int32, device=like.device)
    return counts.scatter_add(-1, index, on.to(torch.int32)) > 0


def _without_conflicts(older: Tensor, newer: Tensor, wanted: Tensor, n_slots: int) -> Tensor:
    """Of the wanted merges (R, Q), those that can happen at once: a memory goes into one other, which itself stays."""
    number = torch.arange(older.shape[1], device=older.device).expand_as(older)
    nobody = older.shape[1]
    claim = torch.full((older.shape[0], n_slots), nobody, dtype=torch.int64, device=older.device)
    claim = claim.scatter_reduce(-1, older, torch.where(wanted, number, nobody), "amin")
    claimed = wanted & (take(claim, older) == number)
    leaves = _marked(claim, older, claimed)
    return claimed & ~take(leaves, newer)
