"""The tiny models of `tiny.py` have a memory that matters; without this the other behaviour tests could pass in
vain.
"""

import pytest
import torch

from tiny import ARCHITECTURES, SMALL, VOTES, after, awake, text


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_memory_is_full_heard_and_chosen(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=60)
    out = model(ids, return_salience=True, return_memory_stats=True)
    with model.memory_off():
        off = model(ids).logits
    assert (out.logits - off).abs().amax(-1).median() > 0.1, "recall does not change what is predicted"
    assert out.memory_stats["stored"] == [SMALL["buffer_size"]] * 2
    assert out.memory_stats["reactivated"] > 0
    tagged = out.salience_scores[:, 1:] > 0.5
    assert 0 < tagged.sum() < tagged.numel(), "all tokens are tagged, or none"
    assert out.logits.exp().sum(-1).sub(1).abs().max() < 1e-5, "not a distribution"


@torch.no_grad()
def test_the_store_itself_is_heard() -> None:
    """Not only the working episodes: another store under the same window gives other predictions."""
    model, ids = awake(), text(rows=1, length=60)
    cache = after(model, ids)
    other = after(model, text(rows=1, length=60, seed=9))
    exchanged = cache.copy()
    exchanged.adopt_memory(other)
    ahead = text(rows=1, length=5, seed=1)
    before, now = (model(ahead, past_key_values=c).logits for c in (cache, exchanged))
    assert (before - now).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_both_read_outs_are_heard() -> None:
    ids, silent = text(rows=1, length=40), awake()
    silent.hippocampus.fusion.strength.zero_()
    both, votes, residual = awake()(ids).logits, awake(**VOTES)(ids).logits, silent(ids).logits
    for one, other in ((both, votes), (both, residual), (votes, residual)):
        assert (one - other).abs().max() > 0.01
