"""`following=False` follows nothing: recall is attention, and the length of a match counts for nothing."""

import pytest
import torch

from test_references import random_recall
from tiny import awake, read_in_chunks, text

UNREAD = 99  # no episode of `random_recall` predicts it


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_it_is_as_if_no_episode_had_predicted_what_was_read(grad: bool) -> None:
    module, asked = random_recall(0)
    hidden, tokens, *rest = asked
    off, _ = random_recall(0, following=False)
    with torch.set_grad_enabled(grad):
        expected = module(hidden, torch.full_like(tokens, UNREAD), *rest)
        found, followed = off(*asked), module(*asked)
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.nothing, expected.nothing)
    assert not found.followed.any() and not found.matched.any()
    assert followed.followed.any() and followed.matched.any()
    assert not torch.allclose(followed.weights, expected.weights, atol=1e-3)


def test_the_match_options_then_say_nothing() -> None:
    ids = text()
    off = read_in_chunks(awake(following=False), ids, 60)
    others = {"match_power": 0.0, "match_characters": 0.0, "match_recency": 0.0}
    assert torch.equal(read_in_chunks(awake(following=False, **others), ids, 60), off)
    assert not torch.equal(read_in_chunks(awake(), ids, 60), off)
