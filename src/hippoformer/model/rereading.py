"""Rereading: what is remembered of a cue, as text that is read again before it (see `hippocampus.reinstatement`).

It happens in a copy of the state. There the passages are ordinary text at the end of what was read, so that every layer
of the base attends to them; the state they came from never hears of it.
"""

import torch
from torch import Tensor

from hippoformer.errors import InputError
from hippoformer.hippocampus.reinstatement import reinstated
from hippoformer.model.cache import HippoCache
from hippoformer.model.inputs import check_token_ids, squeeze_padding


def passages(
    cache: HippoCache, cue_ids: Tensor, attention_mask: Tensor | None, n_tokens: int, span: int
) -> tuple[Tensor, Tensor]:
    """The passages and their mask, both (R, L); the arguments are those of `HippoCache.passages`."""
    chosen = _chosen(cache, cue_ids, attention_mask, n_tokens, span)
    # In each row the chosen move to the end, in their order.
    order = chosen.to(torch.int8).argsort(dim=1, stable=True)[:, chosen.shape[1] - int(chosen.sum(1).max()) :]
    found = chosen.gather(1, order)
    return torch.where(found, cache.memory.episodes.token.gather(1, order), 0).long(), found.long()


def places(
    cache: HippoCache, cue_ids: Tensor, attention_mask: Tensor | None, n_tokens: int, span: int
) -> list[list[int]]:
    """Where each row read the tokens of its passages; the arguments are those of `HippoCache.passages`."""
    chosen = _chosen(cache, cue_ids, attention_mask, n_tokens, span)
    return [row[of].tolist() for row, of in zip(cache.memory.episodes.position, chosen, strict=True)]


@torch.no_grad()
def _chosen(cache: HippoCache, cue_ids: Tensor, attention_mask: Tensor | None, n_tokens: int, span: int) -> Tensor:
    """(R, E) bool, the episodes that make the passages."""
    if n_tokens < 1 or span < 1:
        raise InputError(f"n_tokens={n_tokens}, span={span}; expected at least 1")
    check_token_ids(cue_ids)
    cache.follow_model()
    recall, device = cache.model.hippocampus.recall, cache.model.device
    rows = squeeze_padding(cue_ids, attention_mask, cache, cache.config.vocab_size, device)
    real = torch.arange(rows.ids.shape[1], device=device) < torch.tensor(rows.lengths, device=device).unsqueeze(-1)
    cue = torch.where(real, recall.word_of_token[rows.ids], -1)
    episodes = cache.memory.episodes
    return reinstated(episodes, recall.word_of_token[episodes.token.long()], cue, n_tokens, span)


def reminded(cache: HippoCache, ids: Tensor, mask: Tensor) -> HippoCache:
    """A copy of the state that has read the passages `ids` (R, L) with their `mask` again."""
    copy = cache.copy()
    if ids.shape[1]:
        cache.model.score(ids, attention_mask=mask, past_key_values=copy)
    copy.new_turn()
    return copy
