"""Replay: the offline pass at a segment end in which memories are reactivated, merged, refreshed or let go.

Each round cues the store with some of its own memories, drawn without replacement in proportion to need x gain (Mattar &
Daw 2018): need is the effective priority, gain the credit a memory earned, the share of later predictions owed to it.
What a round reactivates - the cues, and the memory each cue resembles most - moves towards the highest importance and is
young again. Near-duplicates, two memories of the same token whose keys agree, become one: strengths and credits add,
the newer key stays. What was not reactivated has aged by one segment, and what falls under `priority_threshold` is
forgotten.

Without replay an exponential decay forgets everything after a few thousand tokens. The draws depend on position,
segment and round alone, so a row replays the same in any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hippoformer.hippocampus.episodes import Episodes
from hippoformer.model.configuration import HippoFormerConfig
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
    key = episodes.key[:, :n_stored].detach()
    token = episodes.token[:, :n_stored]
    store = {name: tensor[:, :n_stored] for name, tensor in episodes.tensors().items()}
    position, priority, strength = store["position"].clone(), store["priority"], store["strength"]
    age, credit = store["age"] + 1.0, store["credit"] * config.decay_rate
    replayed = torch.zeros_like(position, dtype=torch.bool)
    merged = torch.zeros_like(segment)
    before = (position >= 0).sum(-1)

    rounds = config.max_replay_rounds if n_stored > 1 else 0
    for number in range(rounds):
        alive = position >= 0
        cue, cued = _draw_cues(priority, age, credit, alive & ~replayed, position, segment, number, config)
        similar, partner, twin_similar, twin = _most_similar(key, token, alive, cue, config.recall_n_heads)
        reactivated = _marked(replayed, torch.cat((cue, partner), -1), torch.cat((cued, cued & (similar > 0)), -1))
        replayed = replayed | _marked(replayed, cue, cued)
        priority = torch.where(
            reactivated,
            priority + config.replay_rate * (config.importance_weight_range[1] - priority).clamp_min(0.0),
            priority,
        )
        age = age.masked_fill(reactivated, 0.0)

        older, newer = torch.minimum(cue, twin), torch.maximum(cue, twin)  # slots are ordered by age of the text
        fuse = _without_conflicts(older, newer, cued & (twin_similar >= config.merge_threshold), n_stored)
        strength = strength.scatter_add(-1, newer, take(strength, older) * fuse)
        credit = credit.scatter_add(-1, newer, take(credit, older) * fuse)
        priority = priority.scatter_reduce(-1, newer, take(priority, older) * fuse, "amax")
        position = position.masked_fill(_marked(replayed, older, fuse), -1)
        merged = merged + fuse.sum(-1)

    alive = position >= 0
    forgotten = alive & (priority * config.decay_rate**age < config.priority_threshold)
    position = position.masked_fill(forgotten, -1)
    report = ReplayReport(replayed.sum(-1), merged, before - merged - (position >= 0).sum(-1))

    changed = {"position": position, "priority": priority, "age": age, "strength": strength, "credit": credit}
    return Episodes(
        **{
            name: torch.cat((changed[name], tensor[:, n_stored:]), dim=1) if name in changed else tensor
            for name, tensor in episodes.tensors().items()
        }
    ), report


def _draw_cues(
    priority: Tensor,
    age: Tensor,
    credit: Tensor,
    eligible: Tensor,
    position: Tensor,
    segment: Tensor,
    number: int,
    config: HippoFormerConfig,
) -> tuple[Tensor, Tensor]:
    """Cues of one round, (R, Q) slots and (R, Q) whether the slot is a real cue: a Gumbel top-k draw."""
    weight = priority.detach() * config.decay_rate**age * (credit + _UNPROVEN_GAIN)
    uniform = hashed_uniform(config.seed, segment.unsqueeze(-1), number, position.long())
    score = weight.log() - (-uniform.log()).log()
    score = score.masked_fill(~eligible, -torch.inf)
    best = score.topk(min(config.replay_batch, score.shape[-1]), dim=-1)
    return best.indices, ~best.values.isneginf()


def _most_similar(
    key: Tensor, token: Tensor, alive: Tensor, cue: Tensor, n_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each cue the memory most like it, and the one most like it among those of the same token.

    Returns:
        (cosine, slot, cosine among the same token, slot among the same token), each (R, Q); the cosine is the mean over
        heads, -inf where there is none.
    """
    similarity = (take(key, cue) @ key.transpose(-1, -2)).float() / n_heads  # (R, Q, M)
    similarity = similarity.masked_fill(~alive.unsqueeze(1), -torch.inf)
    similarity = similarity.scatter(-1, cue.unsqueeze(-1), -torch.inf)
    closest = similarity.max(-1)
    twins = similarity.masked_fill(token.unsqueeze(1) != take(token, cue).unsqueeze(-1), -torch.inf).max(-1)
    return closest.values, closest.indices, twins.values, twins.indices


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
