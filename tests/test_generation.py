"""`generate` is that of transformers, in every mode: with and without cache, in chunks, in batches, from a saved state;
and afterwards the state is that of the text returned, row by row.

What is generated may depend on the text alone, not on how it was handed over. Each expected state is made by reading
the returned text, one row alone.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import InputError
from tiny import ARCHITECTURES, VARIANTS, VOCAB, VOTES, after, awake, same_state, state_of, text, tiny_base
from tiny_texts import tiny_load

READERS = ["llama", "gpt2", "gemma3"]
# No pair of tokens twice: tiny models fall into loops, in which everything agrees.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "no_repeat_ngram_size": 0},
    "beam search": {"num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3, "no_repeat_ngram_size": 0},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
}
MAIN = ["greedy", "sampling", "beam search"]
CASES = [(name, mode) for name in ARCHITECTURES for mode in MODES if mode in MAIN or name in ("llama", "gpt2")]


def talkative(name: str = "llama", **options: Any) -> HippoFormer:
    """Awake, but with votes weak enough that greedy decoding does not fall into a loop at once."""
    model = awake(name, **options)
    with torch.no_grad():
        model.hippocampus.fusion.gate_out.bias.fill_(-2.0)
    return model


def generate(model: HippoFormer, ids: Tensor, cache: HippoCache | None = None, **options: Any) -> Any:
    """From the same seed, by default the likeliest tokens without a pair twice."""
    torch.manual_seed(0)
    fixed = {"do_sample": False, "no_repeat_ngram_size": 2, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if cache is not None:
        options["past_key_values"] = cache
    return model.generate(ids, **(fixed | options))


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


# ---------------------------------------------------------------- what is generated


@pytest.mark.supports(architecture="{name}", mode=("{mode}", "without cache", "prefill in chunks"))
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_cached_uncached_and_chunked_runs_agree(name: str, mode: str) -> None:
    """A batch whose second row is padded on the left, 20 tokens read and 6 written: beyond the window of 12."""
    model, prompt = talkative(name), text(rows=2, length=20)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    n_rows = 2 * max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))
    options = MODES[mode] | {"max_new_tokens": 6, "attention_mask": mask}
    expected = generate(model, prompt, **options)
    assert len(set(expected[:, 20:].flatten().tolist())) > 4, "a degenerate text tests nothing"
    assert torch.equal(generate(model, prompt, use_cache=False, **options), expected)
    assert torch.equal(generate(model, prompt, model.new_cache(n_rows), prefill_chunk_size=5, **options), expected)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_under_any_option_generation_is_what_reading_everything_again_gives(options: dict[str, Any]) -> None:
    model, prompt = talkative(**options), text(rows=2, length=29)
    out = generate(model, prompt, max_new_tokens=12, no_repeat_ngram_size=0)
    with torch.no_grad():
        assert torch.equal(out[:, 29:], model(out).logits[:, 28:-1].argmax(-1))


@pytest.mark.supports(architecture="{name}", mode="batch with left padding")
@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, m in CASES if "do_sample" not in MODES[m]])
def test_a_row_of_a_batch_generates_what_it_does_alone(name: str, mode: str) -> None:
    model, prompt = talkative(name), text(rows=2, length=20)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    together = generate(model, prompt, max_new_tokens=6, attention_mask=mask, **MODES[mode])[:, 20:]
    for row, own in enumerate(together.split(len(together) // 2)):
        tokens = prompt[row : row + 1, mask[row] == 1]
        assert torch.equal(own, generate(model, tokens, max_new_tokens=6, **MODES[mode])[:, tokens.shape[1] :])


@torch.no_grad()
def test_beams_find_the_best_continuation() -> None:
    """With as many beams as tokens the search over two tokens is exhaustive, and can be checked by hand."""
    model, prompt = awake(), text(rows=1, length=30)
    options = {"num_beams": VOCAB, "length_penalty": 0.0, "no_repeat_ngram_size": 0}
    out = generate(model, prompt, max_new_tokens=2, **options)
    first = model(prompt).logits[0, -1]  # (V,)
    every = torch.cat((prompt.expand(VOCAB, -1), torch.arange(VOCAB).unsqueeze(-1)), dim=1)
    joint = first.unsqueeze(-1) + model(every).logits[:, -1]  # (V, V)
    assert tuple(out[0, 30:].tolist()) == divmod(int(joint.argmax()), VOCAB)


@pytest.mark.supports(architecture="llama", mode="goes on from a cache")
@pytest.mark.parametrize("read_before", [1, 18, 30])
def test_generation_goes_on_from_a_cache(read_before: int) -> None:
    model, prompt = talkative(), text(rows=2, length=31)
    expected = generate(model, prompt, max_new_tokens=20)
    cache = after(model, prompt[:, :read_before])
    out = generate(model, prompt, cache, max_new_tokens=12)
    assert torch.equal(out, expected[:, :43])
    # The cache now holds all but the last token: a second call takes up where the first ended.
    assert torch.equal(generate(model, out, cache, max_new_tokens=8), expected)


@pytest.mark.supports(architecture="llama", mode="goes on from a saved cache")
def test_only_what_is_new_need_be_handed_over(tmp_path: Path) -> None:
    """A conversation from a saved state: the same tokens, with and without all that came before them."""
    model, prompt, more = talkative(), text(rows=2, length=31), text(rows=2, length=7, seed=3)
    cache, options = model.new_cache(2), {"max_new_tokens": 6, "no_repeat_ngram_size": 0}
    said = generate(model, prompt, cache, **options)
    cache.save(tmp_path / "talk.safetensors")
    everything = torch.cat((said, more), dim=1)
    whole = generate(model, everything, **options)
    new = torch.cat((said[:, -1:], more), dim=1)  # the last token was chosen, not yet read
    masked = cache.copy()  # transformers' other way: new tokens, and a mask that covers what was read as well
    out = generate(model, new, masked, attention_mask=torch.ones_like(everything), **options)
    assert torch.equal(out[:, 8:], whole[:, everything.shape[1] :])
    for kept in (cache, HippoCache.load(tmp_path / "talk.safetensors", model)):
        kept.new_turn()
        out = generate(model, new, kept, **options)
        assert torch.equal(out[:, 8:], whole[:, everything.shape[1] :])
        assert kept.lengths == [everything.shape[1] + 5] * 2


@pytest.mark.supports(architecture="llama", mode=("stopping criteria", "stop strings"))
def test_criteria_and_strings_stop() -> None:
    model, prompt = talkative(), text(rows=1, length=25)
    free, cache = generate(model, prompt, max_new_tokens=12)[0, 25:].tolist(), model.new_cache(1)
    at = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    criteria = [lambda ids, scores, **_: ids[:, -1] == free[at]]
    out = generate(model, prompt, cache, max_new_tokens=12, stopping_criteria=criteria)
    assert out[0, 25:].tolist() == free[: at + 1]
    assert cache.lengths == [25 + at], "the token that stopped it is not read"
    model, tokenizer = tiny_load()
    ids = tokenizer("some words", return_tensors="pt").input_ids
    options = {"max_new_tokens": 12, "no_repeat_ngram_size": 0}
    written = tokenizer.decode(generate(model, ids, **options)[0, ids.shape[1] :])
    whole, stop = "some words" + written, written[1:4]
    out = generate(model, ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    end = whole.index(stop, len("some words") - len(stop) + 1) + len(stop)  # the first that ends after the prompt
    assert tokenizer.decode(out[0]) == whole[:end] and end < len(whole)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest floating tensor had that anything computed."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.slow
@pytest.mark.supports(architecture="llama", mode="prompt of 50,000 tokens")
def test_a_prompt_of_fifty_thousand_tokens_takes_no_more_space_than_a_short_one() -> None:
    model, _ = tiny_load(window=256, segment_len=256)
    states, largest = [], []
    for length in (1_000, 50_000):
        ids = torch.randint(1, 200, (1, length), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache(1)
        with Largest() as watch:
            out = generate(model, ids, cache, max_new_tokens=3, no_repeat_ngram_size=0)
        assert out.shape == (1, length + 3) and cache.lengths == [length + 2]
        states.append(cache.nbytes - cache.passages_nbytes)
        assert cache.passages_nbytes < 20 * model.config.passage_tokens  # 64 bytes a passage, of 4 tokens at the least
        largest.append(watch.numel)
    assert states[0] == states[1] and largest[0] == largest[1]
    assert largest[1] < 50_000 * 16, "the hidden states of the whole prompt existed at once"


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "options",
    [{"assistant_model": tiny_base()}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}],
    ids=list,
)
def test_assisted_generation_is_refused(options: dict[str, Any]) -> None:
    """Tokens that were read cannot be unread."""
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(awake(), text(rows=1, length=20), max_new_tokens=5, **options)


def test_a_hippoformer_is_no_assistant() -> None:
    assistant = awake()
    assistant.generation_config.num_assistant_tokens = 3
    with pytest.raises(InputError, match="cannot be cropped"):
        generate(tiny_base(), text(rows=1, length=20), max_new_tokens=8, assistant_model=assistant)


def test_a_cache_of_too_few_rows_is_refused() -> None:
    model, prompt = awake(), text(rows=1, length=20)
    with pytest.raises(InputError, match="batch_repeat_interleave"):
        generate(model, prompt, model.new_cache(1), num_beams=3, max_new_tokens=4)
    three = after(model, prompt[:, :10])
    three.batch_repeat_interleave(3)
    out = generate(model, prompt, three, num_beams=3, max_new_tokens=4)
    assert torch.equal(out, generate(model, prompt, num_beams=3, max_new_tokens=4))


# ---------------------------------------------------------------- the state afterwards


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
@pytest.mark.parametrize("options", [{}, VARIANTS["unigram"], VOTES], ids=["residual", "unigram", "votes"])
def test_a_prompt_that_was_wholly_read_is_not_read_again(length: int, options: dict[str, Any]) -> None:
    model, prompt = awake(**options), text(rows=2, length=length)
    mask = torch.ones_like(prompt)
    mask[1, :6] = 0
    fixed = {"max_new_tokens": 5, "attention_mask": mask}
    expected = generate(model, prompt, fresh := model.new_cache(2), **fixed)
    with pytest.raises(InputError, match="nothing"):
        model.next_log_probs(cache := model.new_cache(2))
    model.score(prompt, mask, past_key_values=cache)
    last = model(prompt, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(model.next_log_probs(cache), last, atol=1e-4, rtol=1e-4)
    for chunk in (None, 4):
        own = cache.copy()
        assert torch.equal(generate(model, prompt, own, prefill_chunk_size=chunk, **fixed), expected)
        assert own.lengths == [length + 4, length - 2] and own.columns == length + 4
        assert torch.equal(own.digest, fresh.digest)
    with model.memory_off():
        if model.config.residual_readout:
            return  # the last state was read with the memory on, and carries what it added
        off = model(prompt, attention_mask=mask).logits[:, -1]
        torch.testing.assert_close(model.next_log_probs(cache), off, atol=1e-4, rtol=1e-4)


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
    cache = after(model, ids[:, :30])
    before, counters = state_of(cache), (list(cache.lengths), cache.columns)
    prompt = change(ids)
    with pytest.raises(InputError, match=r"new_turn\(\)"):
        generate(model, prompt, cache, max_new_tokens=3, prefill_chunk_size=chunk)
    assert not same_state(before, state_of(cache)) and counters == (list(cache.lengths), cache.columns)
    cache.new_turn()  # now it is a new turn, all of which is read
    generate(model, prompt, cache, max_new_tokens=3)
    assert cache.lengths == [30 + prompt.shape[1] + 2]


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
            cache = after(model, ids[:, :40])
    other = model.new_cache(2)
    other.adopt_memory(cache)
    cache.adopt_memory(cache.copy())
    with torch.no_grad():
        logits = model(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    model(ids[:, 40:], past_key_values=cache, labels=ids[:, 40:]).loss.backward()  # and with gradients
