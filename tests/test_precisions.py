"""Half precision: the same reading as in float32 but for rounding, and the same invariants within itself."""

import pytest
import torch

from hippoformer import HippoFormer
from tiny import fresh, read_in_chunks, text, tiny_base, untrained

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# In units of the precision's own rounding; two layers of a random model and its large logits add up about 90 of them.
ROUNDINGS = 200
LENGTH = 53


def listening(precision: str) -> HippoFormer:
    """A base in this precision under a memory that is heard, with broad votes: no nearest key hangs on rounding."""
    model = HippoFormer(fresh().config, tiny_base(dtype=PRECISIONS[precision]))
    torch.manual_seed(1)
    model.hippocampus.load_state_dict(untrained().hippocampus.state_dict())
    with torch.no_grad():
        model.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.copy_(torch.linspace(1.0, 3.2, len(model.hippocampus.recall.log_scale)))
    return model.eval()


@pytest.mark.supports(precision="{precision}", mode="read in chunks")
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_reading_is_that_of_float32_but_for_rounding(precision: str) -> None:
    model, ids = listening(precision), text(rows=2, length=LENGTH)
    exact = listening("float32")(ids).logits
    whole = model(ids).logits
    near = {"rtol": 0.0, "atol": ROUNDINGS * torch.finfo(PRECISIONS[precision]).eps / 2}
    assert whole.dtype is torch.float32, "log-probabilities are not rounded"
    torch.testing.assert_close(whole, exact, **near)
    torch.testing.assert_close(read_in_chunks(model, ids, 7), whole, **near)
    with model.memory_off(), pytest.raises(AssertionError):  # or the memory was not heard
        torch.testing.assert_close(model(ids).logits, whole, **near)


@pytest.mark.supports(precision="{precision}", mode="fresh: the base")
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_fresh_is_the_base_to_the_last_bit(precision: str) -> None:
    base = tiny_base(dtype=PRECISIONS[precision])
    model, ids = HippoFormer(fresh(segment_len=12).config, base), text(rows=2, length=11)
    model.hippocampus.fusion.strength.data.zero_()
    assert torch.equal(model(ids).logits, torch.log_softmax(base(ids).logits.float(), dim=-1))


@pytest.mark.supports(precision="{precision}", mode=("greedy", "goes on from a cache"))
@pytest.mark.parametrize("precision", PRECISIONS)
@torch.no_grad()
def test_generation_goes_on_where_it_stopped(precision: str) -> None:
    """The same steps in two calls of generate: no rounding may differ."""
    model, prompt = listening(precision), text(rows=2, length=31)
    greedy = {"do_sample": False, "pad_token_id": 0}
    once = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **greedy)
    cache, ids = model.new_cache(2), prompt
    for _ in range(2):
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=6, **greedy
        )
    assert torch.equal(ids, once)
    assert len(set(once[:, 31:].flatten().tolist())) > 2, "a degenerate text tests nothing"
