"""What a call is given: checked, and its padding squeezed out.

Padding on either side, or in between, becomes rows of the same real tokens without any: what a row reads cannot depend
on how its batch was padded. `Rows.order` remembers where each token came from, so that results go back there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hippoformer.errors import InputError
from hippoformer.model.cache import HippoCache
from hippoformer.ops import column_of


@dataclass(frozen=True)
class Rows:
    """The tokens of a call, row by row.

    Attributes:
        ids: (R, T) int64, each row's real tokens first, then zeros.
        lengths: real tokens of each row.
        order: (R, T) the column that each of them came from.
    """

    ids: Tensor
    lengths: list[int]
    order: Tensor

    @property
    def real(self) -> Tensor:
        """(R, T) bool, in the order of `ids`."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < column_of(self.lengths, self.ids.device)

    def following(self, labels: Tensor, vocab_size: int) -> Tensor:
        """(R, T) the label that each token should predict, -100 where none is counted.

        Raises:
            InputError: labels of another shape, or outside the vocabulary.
        """
        if labels.shape != self.ids.shape:
            raise InputError(
                f"labels have shape {tuple(labels.shape)}, expected that of input_ids {tuple(self.ids.shape)}"
            )
        own = labels.to(self.order.device).gather(1, self.order).masked_fill(~self.real, -100)
        _check_vocabulary(own[own != -100], vocab_size, "labels")
        return torch.cat((own[:, 1:], own.new_full((own.shape[0], 1), -100)), dim=1)


def squeeze_padding(
    input_ids: Tensor, attention_mask: Tensor | None, cache: Any, vocab_size: int, device: torch.device
) -> Rows:
    """The rows that a call hands on to a cache.

    Args:
        input_ids: (R, T). attention_mask: (R, T), or (R, what the cache has read + T).

    Raises:
        InputError: no integers, or not (rows, tokens) with at least one of each; a cache of another kind or size, a
            mask of a wrong shape, ids outside the vocabulary, or a row that has read nothing but padding.
    """
    if input_ids.is_floating_point() or input_ids.is_complex():
        raise InputError(f"input_ids must be integers, got {input_ids.dtype}: token ids have no fractions")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise InputError(f"input_ids must be (rows, tokens) with at least one of each, got {tuple(input_ids.shape)}")
    n_rows, n_columns = input_ids.shape
    if not isinstance(cache, HippoCache):
        raise InputError(f"past_key_values must be a HippoCache (model.new_cache()), got {type(cache).__name__}")
    if cache.batch_size != n_rows:
        raise InputError(
            f"the cache holds {cache.batch_size} rows, input_ids {n_rows}: beams and several sequences of a row "
            "need as many rows of the cache; make them of a copy, by batch_repeat_interleave"
        )
    ids = input_ids.to(device).long()
    if attention_mask is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    else:
        if attention_mask.shape not in ((n_rows, n_columns), (n_rows, cache.columns + n_columns)):
            raise InputError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(n_rows, n_columns)}, or "
                f"{(n_rows, cache.columns + n_columns)} with what the cache has read"
            )
        real = attention_mask[:, -n_columns:].to(device) != 0
    _check_vocabulary(ids[real], vocab_size, "input_ids")
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    lengths = real.sum(1).tolist()
    nothing = [r for r, (n, done) in enumerate(zip(lengths, cache.lengths, strict=True)) if n + done == 0]
    if nothing:
        raise InputError(f"rows {nothing} are all padding: a row needs at least one real token to predict from")
    return Rows(ids.masked_fill(~real, 0).gather(1, order), lengths, order)


def _check_vocabulary(ids: Tensor, vocab_size: int, what: str) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise InputError(
            f"{what} hold ids from {int(ids.min())} to {int(ids.max())}, but the vocabulary has ids 0 to "
            f"{vocab_size - 1}: was the text tokenised for another model?"
        )
