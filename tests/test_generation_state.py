"""The state after `generate` is that of the text returned, row by row; a prompt that does not fit the cache is refused.

Each expected state is made by reading the returned text, one row alone.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import InputError
from test_generation import talkative
from tiny import awake, same_state, state_of, text

OPTIONS: dict[str, Any] = {"do_sample": False, "no_repeat_ngram_size": 2, "pad_token_id": 0}
READERS = ["llama", "gpt2", "gemma3"]


def generate(model: HippoFormer, ids: Tensor, cache: HippoCache | None = None, **options: Any) -> Any:
    options = OPTIONS | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, past_key_values=cache, **options)


@torch.no_grad()
def after(model: HippoFormer, ids: Tensor) -> HippoCache:
    """The state of one row that has read (1, T) tokens."""
    cache = model.new_cache()
    model.score(ids, past_key_values=cache)
    return cache


def assert_same(cache: HippoCache, row: int, expected: HippoCache) -> None:
    """Row `row` of a cache knows what a row alone knows, but for rounding."""
    one = cache.select_rows(torch.tensor([row]))
    assert one.lengths == expected.lengths
    assert torch.equal(one.memory.episodes.position, expected.memory.episodes.position)
    assert torch.equal(one.memory.episodes.token, expected.memory.episodes.token)
    assert torch.equal(one.digest, expected.digest)
    mine, theirs = one.memory.tensors(), expected.memory.tensors()
    for name in ("key", "priority", "credit", "last_hidden", "vote_weights", "marginal_count"):
        torch.testing.assert_close(mine[name], theirs[name], atol=2e-4, rtol=2e-3, msg=name)
    torch.testing.assert_close(one.last_output, expected.last_output, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", READERS)
def test_a_row_that_has_ended_writes_padding_and_reads_nothing_more(name: str) -> None:
    model, prompt = talkative(name), text(rows=2, length=25)
    free = generate(model, prompt, max_new_tokens=12)[:, 25:]
    end = next(t for t in free[0, 2:8].tolist() if t not in free[1].tolist())  # ends row 0 alone
    out = generate(model, prompt, cache := model.new_cache(2), max_new_tokens=12, eos_token_id=end)
    stop = free[0].tolist().index(end)
    assert torch.equal(out[0, 25 : 26 + stop], free[0, : stop + 1]) and not out[0, 26 + stop :].any()
    assert torch.equal(out[1, 25:], free[1])
    # The token that ends a row is never read, nor is the last one of a row that was cut short.
    assert_same(cache, 0, after(model, out[:1, : 25 + stop]))
    assert_same(cache, 1, after(model, out[1:, :-1]))
    assert cache.lengths == [25 + stop, out.shape[1] - 1]


def test_rows_without_an_end_token_go_on_after_their_criterion() -> None:
    """Nothing is padding where no token ends a row: what follows is text, and is read."""
    model, prompt = talkative(), text(rows=2, length=25)

    class FirstRow:
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] > 27, False])

    cache = model.new_cache(2)
    out = generate(model, prompt, cache, max_new_tokens=8, stopping_criteria=[FirstRow()])
    assert cache.lengths == [out.shape[1] - 1] * 2
    assert_same(cache, 0, after(model, out[:1, :-1]))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (4, 2), (2, 2)])
def test_after_beam_search_the_rows_are_the_sequences_returned(name: str, beams: int, returned: int) -> None:
    model, prompt = talkative(name), text(rows=2, length=25)
    cache = model.new_cache(2 * beams)
    options = {"num_beams": beams, "num_return_sequences": returned, "max_new_tokens": 7}
    out = generate(model, prompt, cache, **options)
    assert cache.batch_size == 2 * returned and cache.columns == out.shape[1] - 1
    for row in range(2 * returned):
        assert_same(cache, row, after(model, out[row : row + 1, :-1]))
    further = text(rows=2 * returned, length=5, seed=3)
    whole = torch.cat((out, further), dim=1)
    expected = generate(model, whole, max_new_tokens=4)
    assert torch.equal(generate(model, whole, cache, max_new_tokens=4), expected)


def test_beams_that_end_early() -> None:
    model, prompt = talkative(), text(rows=1, length=25)
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 8}
    free = generate(model, prompt, **options)[:, 25:]
    for end in free[:, 1:7].flatten().unique().tolist():
        cache = model.new_cache(3)
        out = generate(model, prompt, cache, eos_token_id=end, **options)
        last = out.shape[1] - 26
        ends = [row.tolist().index(end) if end in row.tolist() else last for row in out[:, 25:]]
        if len(set(ends)) > 1:
            break
    assert len(set(ends)) > 1, "all ended together"
    for row, stop in enumerate(ends):
        assert_same(cache, row, after(model, out[row : row + 1, : 25 + stop]))


def test_a_dictionary_carries_the_state_of_the_sequences() -> None:
    model, prompt = talkative(), text(rows=1, length=25)
    out = generate(model, prompt, num_beams=3, max_new_tokens=5, return_dict_in_generate=True)
    assert_same(out.past_key_values, 0, after(model, out.sequences[:, :-1]))


@pytest.mark.parametrize("length", [20, 24])  # in the middle of a segment, and at its end
@pytest.mark.parametrize("options", [{}, {"residual_readout": False, "marginal_weight": 0.7}], ids=["residual", "no"])
def test_a_prompt_that_was_wholly_read_is_not_read_again(length: int, options: dict[str, Any]) -> None:
    model, prompt = awake(**options), text(rows=2, length=length)
    expected = generate(model, prompt, fresh := model.new_cache(2), max_new_tokens=5)
    cache = model.new_cache(2)
    model.score(prompt, past_key_values=cache)
    torch.testing.assert_close(model.next_log_probs(cache), model(prompt).logits[:, -1], atol=1e-4, rtol=1e-4)
    for chunk in (None, 4):
        own = cache.copy()
        assert torch.equal(generate(model, prompt, own, max_new_tokens=5, prefill_chunk_size=chunk), expected)
        assert own.lengths == [length + 4] * 2 and own.columns == length + 4
        assert torch.equal(own.digest, fresh.digest)
    with model.memory_off():
        if model.config.residual_readout:
            return  # the last state was read with the memory on, and carries what it added
        off = model(prompt).logits[:, -1]
        torch.testing.assert_close(model.next_log_probs(cache), off, atol=1e-4, rtol=1e-4)


def test_padded_prompts_that_were_wholly_read() -> None:
    model, prompt = awake(), text(rows=2, length=20)
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    expected = generate(model, prompt, attention_mask=mask, max_new_tokens=5)
    cache = model.new_cache(2)
    model.score(prompt, attention_mask=mask, past_key_values=cache)
    assert torch.equal(generate(model, prompt, cache, attention_mask=mask, max_new_tokens=5), expected)


PROMPTS = {
    "another text": lambda ids: text(rows=1, length=40, seed=9),
    "its first token changed": lambda ids: torch.cat((ids[:, :1] % 90 + 1, ids[:, 1:]), dim=1),
    "moved by one": lambda ids: ids[:, 1:],
    "shorter": lambda ids: ids[:, :11],
}


@pytest.mark.parametrize("change", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("chunk", [None, 8])
def test_a_prompt_that_differs_from_what_was_read_is_refused(change: Any, chunk: int | None) -> None:
    model, ids = awake(), text(rows=1, length=60)
    cache = model.new_cache()
    model.score(ids[:, :30], past_key_values=cache)
    before, counters = state_of(cache), (list(cache.lengths), cache.columns)
    prompt = change(ids)
    with pytest.raises(InputError, match=r"new_turn\(\)"):
        generate(model, prompt, cache, max_new_tokens=3, prefill_chunk_size=chunk)
    assert not same_state(before, state_of(cache)) and counters == (list(cache.lengths), cache.columns)
    cache.new_turn()  # now it is a new turn, all of which is read
    generate(model, prompt, cache, max_new_tokens=3)
    assert cache.lengths == [30 + prompt.shape[1] + 2]


def test_only_what_is_new_under_a_mask_of_all() -> None:
    """transformers' other way to go on: new tokens, and a mask that covers what was read as well."""
    model, ids = awake(), text(rows=1, length=40)
    expected = generate(model, ids, max_new_tokens=5)[:, 40:]
    cache = model.new_cache()
    model.score(ids[:, :30], past_key_values=cache)
    out = generate(model, ids[:, 30:], cache, attention_mask=torch.ones(1, 40, dtype=torch.long), max_new_tokens=5)
    assert torch.equal(out[:, 10:], expected)


def test_a_memory_on_disk_still_knows_what_it_has_read(tmp_path: Any) -> None:
    model, ids = awake(), text(rows=1, length=40)
    cache = after(model, ids)
    cache.save(tmp_path / "memory")
    loaded = HippoCache.load(tmp_path / "memory", model)
    with pytest.raises(InputError, match="new_turn"):
        generate(model, text(rows=1, length=50, seed=5), loaded, max_new_tokens=3)
    expected = generate(model, ids, max_new_tokens=3)
    assert torch.equal(generate(model, ids, loaded, max_new_tokens=3), expected)


@pytest.mark.parametrize("reader", ["score", "forward", "generate"])
def test_what_was_read_in_inference_mode_goes_on_outside(reader: str) -> None:
    model, ids = awake(), text(rows=2, length=60)
    with torch.no_grad():
        expected = model(ids).logits[:, 40:]
    cache = model.new_cache(2)
    with torch.inference_mode():
        if reader == "score":
            model.score(ids[:, :40], past_key_values=cache)
        elif reader == "forward":
            model(ids[:, :40], past_key_values=cache)
        else:
            given = torch.ones(2, 39, dtype=torch.long)
            generate(model, ids[:, :39], cache, attention_mask=given, max_new_tokens=2, bad_words_ids=None)
            cache = model.new_cache(2)
            model(ids[:, :40], past_key_values=cache)
    other = model.new_cache(2)
    other.adopt_memory(cache)
    cache.adopt_memory(cache.copy())
    with torch.no_grad():
        logits = model(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    model(ids[:, 40:], past_key_values=cache, labels=ids[:, 40:]).loss.backward()  # and with gradients


def test_a_state_without_reading_predicts_nothing() -> None:
    model = awake()
    with pytest.raises(InputError, match="nothing"):
        model.next_log_probs(model.new_cache())
