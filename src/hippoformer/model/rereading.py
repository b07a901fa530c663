"""Rereading: retrieved passages as text that is read again before a question.

Recall answers in the words of the text; with the passages back in the window all layers of the base can work on them
(the reinstatement of a context by a part of it, Teyler & DiScenna 1986; retrieved text before a question, Lewis et al.
2020, arXiv:2005.11401). It happens in a copy of the state: what is stored never depends on what was retrieved.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hippoformer.hippocampus.passages import Passage
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.model.cache import HippoCache

GAP = "[...]"


def as_text(passages: Sequence[Passage], spelling: Spelling) -> str:
    """Passages as a person would read them: neighbours joined, a mark between what did not stand together.

    Groups of neighbours stand in the order of their best score, the best last: a small base goes by what it read last.

    Args:
        passages: of one row, each with its score, in any order.
    """
    texts = [
        spelling.text(token for passage in group for token in passage.token_ids).strip() for group in _groups(passages)
    ]
    return f"\n{GAP}\n".join(text for text in texts if text)


def reread(
    cache: HippoCache, query_ids: Tensor, attention_mask: Tensor | None = None, n_tokens: int = 256
) -> HippoCache:
    """A copy of a state that has read again what fits a query and has left the window; the query can be read next.

    For a base without a chat template; a `Conversation` puts what it retrieves into the user's turn.

    Args:
        cache: of R rows; it stays as it is. query_ids, attention_mask, n_tokens: as for `HippoCache.retrieve`.
    """
    copy = cache.copy()
    copy.new_turn()
    found = cache.retrieve(query_ids, attention_mask, n_tokens, beyond_window=True)
    assert cache.passages is not None  # otherwise nothing is found in it
    spelling = cache.passages.spelling
    rows = [_as_ids(passages, spelling) for passages in found]
    if any(rows):
        ids, mask = left_padded(rows, cache.model.device)
        cache.model.score(ids, attention_mask=mask, past_key_values=copy)
        copy.new_turn()
    return copy


def _as_ids(passages: Sequence[Passage], spelling: Spelling) -> list[int]:
    """The tokens of `as_text`, a line end in the place of a mark where the vocabulary has one."""
    line_end = [spelling.pieces.index(b"\n")] if b"\n" in spelling.pieces else []
    ids: list[int] = []
    for group in _groups(passages):
        ids += [*(line_end if ids else []), *(int(token) for passage in group for token in passage.token_ids)]
    return [*ids, *line_end] if ids else []


def _groups(passages: Sequence[Passage]) -> list[list[Passage]]:
    """Neighbours together, in the order of the text; the groups in the order of their best score, the best last."""
    in_order = sorted(passages, key=lambda passage: passage.start)
    groups = [in_order[:1]] if in_order else []
    for before, passage in pairwise(in_order):
        if before.stop != passage.start:
            groups.append([])
        groups[-1].append(passage)
    return sorted(groups, key=lambda group: max(passage.score for passage in group))


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(R, T) ids and mask, all rows ending together."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
