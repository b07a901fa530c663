"""Rows of different lengths in one tensor: cutting out a stretch of each row's own tokens, and putting it back.

Tokens of a row are counted from its own first one; columns are where they stood in the padded input.
"""

import torch
from torch import Tensor


def column_of(numbers: list[int], device: torch.device) -> Tensor:
    """One number per row as (R, 1)."""
    return torch.tensor(numbers, device=device).unsqueeze(-1)


def piece(sequence: Tensor, start: list[int], new: list[int], fill: int = 0) -> Tensor:
    """Tokens start..start+new of each row, (R, max new), `fill` where a row has fewer."""
    width = max(new)
    if len(set(start)) == 1 and min(new) == width:
        return sequence[:, start[0] : start[0] + width]
    column = torch.arange(width, device=sequence.device)
    index = (column_of(start, sequence.device) + column).clamp_max(sequence.shape[1] - 1)
    return sequence.gather(1, index).masked_fill(column >= column_of(new, sequence.device), fill)


def place(target: Tensor, values: Tensor, start: list[int], new: list[int], order: Tensor) -> None:
    """The inverse: values (R, N, ...) of tokens start..start+new go to their column of `target` (R, T, ...).

    Args:
        order: (R, T) column of each of a row's tokens, negative for columns that `target` does not have.
    """
    width = max(new)
    column = torch.arange(width, device=target.device)
    index = column_of(start, target.device) + column  # (R, N)
    index = order.gather(1, index.clamp_max(order.shape[1] - 1))
    wanted = (column < column_of(new, target.device)) & (index >= 0)
    rows = torch.arange(target.shape[0], device=target.device).unsqueeze(-1).expand_as(index)
    target[rows[wanted], index[wanted]] = values[:, :width][wanted].to(target.dtype)


def last_of(hidden: Tensor, new: list[int], before: Tensor) -> Tensor:
    """(R, D): the hidden state of each row's last new token, or `before` where it has none."""
    index = column_of([max(n - 1, 0) for n in new], hidden.device).unsqueeze(-1).expand(-1, 1, hidden.shape[-1])
    last = hidden.gather(1, index).squeeze(1).to(before.dtype)
    return torch.where(column_of(new, hidden.device) > 0, last, before)
