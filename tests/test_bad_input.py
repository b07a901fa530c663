"""Invariant 9: bad input gets a clear error or a correct result, and nothing is lost by it."""

import pytest
import torch

from hippoformer import HippoFormer
from hippoformer.errors import HippoFormerError, InputError, NonFiniteError
from tiny import VOCAB, after, awake, same_state, small_config, state_of, text, tiny_base

IDS = text(rows=2, length=20)
ONES = torch.ones(2, 20, dtype=torch.long)

# What is wrong with a call, and a word its message must have.
BAD_CALLS = {
    "no tokens": ({"input_ids": IDS[:, :0]}, "at least one"),
    "no rows": ({"input_ids": IDS[:0]}, "at least one"),
    "one dimension": ({"input_ids": IDS[0]}, "rows, tokens"),
    "three dimensions": ({"input_ids": IDS.unsqueeze(0)}, "rows, tokens"),
    "an id beyond the vocabulary": ({"input_ids": IDS.clone().index_fill_(1, torch.tensor([3]), VOCAB)}, "vocabulary"),
    "a negative id": ({"input_ids": IDS.clone().index_fill_(1, torch.tensor([3]), -1)}, "vocabulary"),
    "NaN for ids": ({"input_ids": torch.full((2, 20), torch.nan)}, "input_ids"),
    "infinity for ids": ({"input_ids": torch.full((2, 20), torch.inf)}, "input_ids"),
    "fractions for ids": ({"input_ids": IDS + 0.5}, "input_ids"),
    "another number of rows than the cache": ({"input_ids": IDS[:1]}, "rows"),
    "a mask that is too short": ({"input_ids": IDS, "attention_mask": ONES[:, 1:]}, "attention_mask"),
    "a mask that is too long": ({"input_ids": IDS, "attention_mask": torch.ones(2, 99)}, "attention_mask"),
    "a mask of other rows": ({"input_ids": IDS, "attention_mask": torch.ones(3, 20)}, "attention_mask"),
    "a mask of four dimensions": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 20, 20)}, "attention_mask"),
    "labels that are too short": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels"),
    "labels beyond the vocabulary": ({"input_ids": IDS, "labels": IDS + VOCAB}, "labels"),
    "negative labels": ({"input_ids": IDS, "labels": IDS * 0 - 5}, "labels"),
    "an argument it does not take": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 20, 32)}, "inputs_embeds"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
@torch.no_grad()
def test_a_bad_call_is_refused_and_changes_nothing(what: str) -> None:
    arguments, word = BAD_CALLS[what]
    model, cache = awake(), awake().new_cache(2)
    model(text(rows=2, length=31, seed=1), past_key_values=cache)
    before, counters = state_of(cache), (list(cache.lengths), cache.columns)
    with pytest.raises(InputError, match=word) as refused:
        model(**arguments, past_key_values=cache)
    assert isinstance(refused.value, HippoFormerError) and isinstance(refused.value, ValueError)
    assert not same_state(before, state_of(cache))
    assert (cache.lengths, cache.columns) == counters, "the cache counts what it has not read"


@torch.no_grad()
def test_bad_input_to_score() -> None:
    for arguments in ((IDS[:, :0],), (IDS + VOCAB,), (IDS, ONES[:, :5]), (IDS, ONES * 0)):
        with pytest.raises(InputError):
            awake().score(*arguments)
    assert awake().score(IDS[:, :1]).shape == (2, 0)


@torch.no_grad()
def test_rows_of_padding() -> None:
    """A row that has never read a token predicts nothing; one that has read may pause."""
    model, mask = awake(), ONES.clone()
    mask[1] = 0
    with pytest.raises(InputError, match=r"\[1\].*padding"):
        model(IDS, attention_mask=mask)
    with pytest.raises(InputError, match=r"\[0, 1\].*padding"):
        model(IDS, attention_mask=ONES * 0)
    cache = after(model, IDS)
    out = model(IDS, attention_mask=mask, past_key_values=cache)
    assert not out.logits[1].any() and cache.lengths == [40, 20]
    none = model(IDS, attention_mask=ONES * 0, past_key_values=cache)
    assert not none.logits.any() and cache.lengths == [40, 20]


@torch.no_grad()
def test_the_loss_is_the_mean_over_real_labels() -> None:
    model, ids = awake(), text(rows=2, length=40)
    mask = torch.ones_like(ids)
    mask[0, 30:], mask[1, :17] = 0, 0
    labels = ids.clone()
    labels[1, 20:25] = -100
    out = model(ids, attention_mask=mask, labels=torch.where(mask == 1, labels, 5))  # under the mask it means nothing
    picked = out.logits[:, :-1].gather(-1, labels[:, 1:, None].clamp_min(0)).squeeze(-1)
    counted = (mask[:, 1:] == 1) & (mask[:, :-1] == 1) & (labels[:, 1:] != -100)
    assert counted.sum() == 29 + 22 - 5
    assert float(out.loss) == pytest.approx(-float(picked[counted].mean()), rel=1e-5)
    assert model(IDS, labels=torch.full_like(IDS, -100)).loss == 0
    assert model(IDS[:, :1], labels=IDS[:, :1]).loss == 0


@torch.no_grad()
def test_foreign_caches_are_refused() -> None:
    from transformers import DynamicCache

    model = awake()
    with pytest.raises(InputError, match="HippoCache"):
        model(IDS, past_key_values=DynamicCache())
    other = awake(buffer_size=8).new_cache(2)
    with pytest.raises(InputError):
        model.new_cache(2).adopt_memory(other)
    with pytest.raises(InputError):
        model.new_cache(2).adopt_memory(model.new_cache(3))
    with pytest.raises(InputError, match="at least one row"):
        model.new_cache(0)
    with pytest.raises(InputError, match="row 2"):
        model.new_cache(2).episodes(2)
    with pytest.raises(InputError, match=r"cache\.reset"):
        model.reset_memory()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_broken_weights_is_refused(value: float) -> None:
    base = tiny_base()
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(NonFiniteError, match="weights"):
        HippoFormer(small_config(), base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_weights_that_break_later_never_reach_the_memory(value: float) -> None:
    model, cache = awake(), awake().new_cache(2)
    model(IDS, past_key_values=cache)
    before = {name: tensor.clone() for name, tensor in cache.memory.tensors().items()}
    model.base.model.embed_tokens.weight[VOCAB - 1] = value
    bad = torch.full((2, 4), VOCAB - 1)
    with pytest.raises(NonFiniteError):
        model(bad, past_key_values=cache)
    assert all(torch.equal(before[name], tensor) for name, tensor in cache.memory.tensors().items())
    assert cache.lengths == [20, 20] and cache.get_seq_length() == 20
    # The stream goes on with what can be read, under the mask that transformers makes, as if the bad call had not been.
    expected = awake()(torch.cat((IDS, IDS), 1)).logits[:, 20:]
    found = model(IDS, attention_mask=torch.ones(2, 40), past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)


@torch.no_grad()
def test_broken_hippocampus_weights_are_told() -> None:
    """NaN in the hippocampus must not come out as logits."""
    model = awake()
    model.hippocampus.recall.key_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        model(IDS)
