"""Continuation costs the same whatever is read: prose, or a long run of one token, in which every pair matches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny import awake, text

LENGTH = 40


class Watch(TorchDispatchMode):
    """Writes down every operation and the shapes that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.seen.append((str(function), [tuple(x.shape) for x in made if isinstance(x, Tensor)]))
        return result


def operations(ids: Tensor) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Of all calls of recall while a text is read."""
    recall, watch = (model := awake(buffer_size=64)).hippocampus.recall, Watch()
    recalled = recall.forward

    def watched(*args: Any) -> Any:
        with watch:
            return recalled(*args)

    recall.forward = watched
    model(ids)
    return watch.seen


@pytest.mark.parametrize("run", [[5], [5, 6], [5, 5, 5, 7]], ids=["one token", "two in turn", "rows"])
@torch.no_grad()
def test_a_run_of_few_tokens_costs_what_prose_costs(run: list[int]) -> None:
    """The very same operations, on tensors of the very same shapes; none asks the device for a value."""
    prose, repeated = operations(text(rows=1, length=LENGTH)), operations(torch.tensor([run * LENGTH])[:, :LENGTH])
    assert repeated == prose
    assert not {n for n, _ in prose if "nonzero" in n or "_local_scalar" in n or "masked_select" in n}


@pytest.mark.parametrize("run", [[5], [5, 6]], ids=["one token", "two in turn"])
@torch.no_grad()
def test_a_long_run_leaves_room_for_what_was_read_before(run: list[int]) -> None:
    """It enters the store only while there is room; what memory makes of later text is finite and not the run."""
    model = awake(window=24, segment_len=24, buffer_size=64, max_replay_rounds=0)
    cache, before = model.new_cache(1), text(rows=1, length=60)
    model(before, past_key_values=cache)
    early = []
    for _ in range(2):
        model(torch.tensor([run * 600])[:, :600], past_key_values=cache)
        position = cache.memory.episodes.position[0, : model.config.buffer_size]
        early.append((position >= 0) & (position < 60))
    assert early[0].sum() >= 40 and torch.equal(*early)
