"""Invariant 3: one prefill = chunks of any size = token by token; `generate` with and without cache agree."""

import itertools

import pytest
import torch
from torch import Tensor

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import InputError
from tiny import ARCHITECTURES, VOCAB, awake, read_in_chunks, same_state, state_of, text

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
SOME = ["llama", "mistral-narrow", "gemma2", "gemma3", "smollm3", "gpt2"]
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "size"), [(n, s) for n in ARCHITECTURES for s in (1, 7)] + [("llama", s) for s in (6, 13, 24, 52)]
)
def test_chunks_of_any_size_give_the_same_numbers(name: str, size: int) -> None:
    model, ids = awake(name), text(rows=2, length=53)
    with torch.no_grad():
        whole = model(ids).logits
    torch.testing.assert_close(read_in_chunks(model, ids, size), whole, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_chunks_leave_the_same_state(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=53)
    whole, pieces = model.new_cache(2), model.new_cache(2)
    model(ids, past_key_values=whole)
    for part in ids.split(7, dim=1):
        model(part, past_key_values=pieces)
    assert whole.lengths == pieces.lengths and whole.columns == pieces.columns
    for name_, tensor in whole.tensors().items():
        torch.testing.assert_close(pieces.tensors()[name_], tensor, **TOLERANCE, msg=lambda m, n=name_: f"{n}: {m}")


@torch.no_grad()
def test_chunks_of_a_ragged_batch() -> None:
    """Padding inside chunks, on either side, moves nothing."""
    model, ids = awake(), text(rows=3, length=50)
    mask = torch.ones(3, 50, dtype=torch.long)
    mask[1, :17], mask[2, 31:] = 0, 0
    whole = model(ids, attention_mask=mask).logits
    cache, parts, start = model.new_cache(3), [], 0
    for size in (20, 1, 11, 18):
        part = slice(start, start + size)
        parts.append(model(ids[:, part], attention_mask=mask[:, part], past_key_values=cache).logits)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), whole, **TOLERANCE)


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_score_is_the_logits_of_forward(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=53)
    logits = model(ids).logits
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(model.score(ids), expected, **TOLERANCE)
    cache = model.new_cache(2)  # and continued: only the first token of a row has no prediction
    model.score(ids[:, :20], past_key_values=cache)
    torch.testing.assert_close(model.score(ids[:, 20:], past_key_values=cache), expected[:, 20:], **TOLERANCE)


@torch.no_grad()
def test_kept_logits_are_the_last_ones() -> None:
    model, ids = awake(), text(rows=2, length=53)
    mask = torch.ones(2, 53, dtype=torch.long)
    mask[1, :20] = 0
    whole = model(ids, attention_mask=mask).logits
    for keep in (1, 9, 53):
        kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
        torch.testing.assert_close(kept, whole[:, -keep:], **TOLERANCE)


def talkative(name: str = "llama") -> HippoFormer:
    """Awake, but with votes weak enough that greedy decoding does not fall into a loop at once."""
    model = awake(name)
    with torch.no_grad():
        model.hippocampus.fusion.gate_out.bias.fill_(-2.0)
    return model


def greedy_by_hand(model: HippoFormer, ids: Tensor, count: int) -> Tensor:
    """Greedy decoding, no pair of tokens twice, with a fresh reading of the whole text for every token."""
    for _ in range(count):
        logits = model(ids).logits[:, -1]
        for row, tokens in enumerate(ids.tolist()):
            banned = [after for before, after in itertools.pairwise(tokens) if before == tokens[-1]]
            logits[row, banned] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("name", SOME)
@torch.no_grad()
def test_generate_with_and_without_cache(name: str) -> None:
    model, prompt = talkative(name), text(rows=2, length=31)
    mask = torch.ones_like(prompt)
    expected = greedy_by_hand(model, prompt, 16)
    for use_cache in (True, False):
        options = {"max_new_tokens": 16, "no_repeat_ngram_size": 2, "use_cache": use_cache} | GREEDY
        out = model.generate(prompt, attention_mask=mask, **options)
        assert torch.equal(out, expected), f"use_cache={use_cache}"
    assert len(set(expected[:, 31:].flatten().tolist())) > 4, "a degenerate text tests nothing"


@torch.no_grad()
def test_a_left_padded_batch_generates_as_single_rows() -> None:
    model, prompt = talkative(), text(rows=3, length=40)
    mask = torch.ones_like(prompt)
    mask[1, :27], mask[2, :39] = 0, 0
    together = model.generate(prompt, attention_mask=mask, max_new_tokens=15, **GREEDY)
    for row in range(3):
        own = prompt[row : row + 1, mask[row] == 1]
        alone = model.generate(own, attention_mask=torch.ones_like(own), max_new_tokens=15, **GREEDY)
        assert torch.equal(together[row, 40:], alone[0, own.shape[1] :])


@torch.no_grad()
def test_beams_find_the_best_continuation() -> None:
    """With as many beams as tokens the search over two tokens is exhaustive, and can be checked by hand."""
    model, prompt = awake(), text(rows=1, length=30)
    beams = VOCAB
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, num_beams=beams, length_penalty=0.0, **GREEDY
    )
    first = model(prompt).logits[0, -1]  # (V,)
    every = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB).unsqueeze(-1)), dim=1)
    joint = first.unsqueeze(-1) + model(every).logits[:, -1]  # (V, V)
    best = divmod(int(joint.argmax()), VOCAB)
    assert tuple(out[0, 30:].tolist()) == best


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_beams_agree_with_and_without_cache(name: str) -> None:
    model, prompt = awake(name), text(rows=2, length=25)
    mask = torch.ones_like(prompt)
    mask[1, :9] = 0
    one, two = (
        model.generate(prompt, attention_mask=mask, max_new_tokens=14, num_beams=3, use_cache=cached, **GREEDY)
        for cached in (True, False)
    )
    assert torch.equal(one, two)


@torch.no_grad()
def test_sampling_goes_by_the_seed_alone() -> None:
    model, prompt = awake(), text(rows=2, length=25)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 20,
        "do_sample": True,
        "top_p": 0.9,
        "pad_token_id": 0,
    }
    drawn = []
    for seed, cached in ((1, True), (1, True), (1, False), (2, True)):
        torch.manual_seed(seed)
        drawn.append(model.generate(prompt, use_cache=cached, **options))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


@torch.no_grad()
def test_rows_end_at_the_end_token() -> None:
    model, prompt = talkative(), text(rows=2, length=25)
    mask = torch.ones_like(prompt)
    free = model.generate(prompt, attention_mask=mask, max_new_tokens=12, **GREEDY)[:, 25:]
    end = next(t for t in free[0].tolist() if t not in free[1].tolist())  # ends row 0 alone
    stop = free[0].tolist().index(end)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=12, eos_token_id=end, **GREEDY)[:, 25:]
    assert out[0, : stop + 1].tolist() == free[0, : stop + 1].tolist()
    assert not out[0, stop + 1 :].any(), "after its end a row is padding"
    assert torch.equal(out[1], free[1])


@torch.no_grad()
def test_a_streamer_gets_every_token() -> None:
    class Collector:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, prompt, streamer = awake(), text(rows=1, length=25), Collector()
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9, streamer=streamer, **GREEDY)
    assert streamer.tokens == out[0].tolist() and streamer.ended


@pytest.mark.parametrize("read_before", [1, 18, 30])
@torch.no_grad()
def test_generation_goes_on_from_a_cache(read_before: int) -> None:
    model, prompt = talkative(), text(rows=2, length=31)
    mask = torch.ones_like(prompt)
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=12, **GREEDY)
    cache = model.new_cache(2)
    model(prompt[:, :read_before], past_key_values=cache)
    out = model.generate(prompt, attention_mask=mask, past_key_values=cache, max_new_tokens=12, **GREEDY)
    assert torch.equal(out, expected)
    # The cache now holds all but the last token: a second call takes up where the first ended.
    longer = model.generate(out, attention_mask=torch.ones_like(out), past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert torch.equal(longer, model.generate(prompt, attention_mask=mask, max_new_tokens=20, **GREEDY))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_saved_cache_goes_on_as_if_never_saved(name: str, tmp_path) -> None:
    model, ids, ahead = awake(name), text(rows=2, length=47), text(rows=2, length=20, seed=5)
    cache = model.new_cache(2)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "memory.safetensors")
    loaded = HippoCache.load(tmp_path / "memory.safetensors", model)
    assert not same_state(state_of(cache), state_of(loaded))
    one, two = (model(ahead, past_key_values=c).logits for c in (cache, loaded))
    assert torch.equal(one, two)
    assert not same_state(state_of(cache), state_of(loaded))


@torch.no_grad()
def test_a_cache_is_what_generate_thinks_it_is() -> None:
    model, ids = awake(), text(rows=2, length=47)
    cache = model.new_cache(2)
    assert cache.get_seq_length() == 0
    for done, part in zip(itertools.accumulate((20, 27)), ids.split((20, 27), dim=1), strict=True):
        out = model(part, past_key_values=cache)
        assert cache.get_seq_length() == done and out.past_key_values is cache
    with pytest.raises(InputError, match="cropped"):
        cache.crop(10)
