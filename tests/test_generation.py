"""`generate` is that of transformers, in every mode: with and without cache, in chunks, in batches, from a saved state.

The equalities are those of invariants 2 and 3, seen from outside: what is generated may depend on the text alone, not
on how it was handed over.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import InputError
from tiny import ARCHITECTURES, VOCAB, awake, text, tiny_base
from tiny_texts import tiny_load

GREEDY = {"do_sample": False, "pad_token_id": 0}
# No pair of tokens twice: tiny models fall into loops, in which everything agrees.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "no_repeat_ngram_size": 2},
    "sampling": {"do_sample": True, "top_p": 0.9},
    "beam search": {"do_sample": False, "no_repeat_ngram_size": 2, "num_beams": 3},
    "beam sampling": {"do_sample": True, "no_repeat_ngram_size": 2, "num_beams": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"do_sample": False, "no_repeat_ngram_size": 2, "num_beams": 4, "num_return_sequences": 2},
}
MAIN = ["greedy", "sampling", "beam search"]
CASES = [(name, mode) for name in ARCHITECTURES for mode in MODES if mode in MAIN or name in ("llama", "gpt2")]


def talkative(name: str = "llama") -> HippoFormer:
    """Awake, but with votes weak enough that greedy decoding does not fall into a loop at once."""
    model = awake(name)
    with torch.no_grad():
        model.hippocampus.fusion.gate_out.bias.fill_(-2.0)
    return model


@pytest.mark.supports(architecture="{name}", mode=("{mode}", "without cache", "prefill in chunks"))
@pytest.mark.parametrize(("name", "mode"), CASES)
@torch.no_grad()
def test_cached_uncached_and_chunked_runs_agree(name: str, mode: str) -> None:
    """A batch whose second row is padded on the left, 20 tokens read and 6 written: beyond the window of 12."""
    model, prompt = talkative(name), text(rows=2, length=20)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    n_rows = 2 * max(MODES[mode].get("num_beams", 1), MODES[mode].get("num_return_sequences", 1))

    def run(**options: Any) -> Tensor:
        torch.manual_seed(0)
        return model.generate(prompt, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **MODES[mode], **options)

    expected = run()
    assert len(set(expected[:, 20:].flatten().tolist())) > 4, "a degenerate text tests nothing"
    assert torch.equal(run(use_cache=False), expected)
    assert torch.equal(run(past_key_values=model.new_cache(n_rows), prefill_chunk_size=5), expected)


@pytest.mark.supports(architecture="{name}", mode="batch with left padding")
@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, m in CASES if not MODES[m]["do_sample"]])
@torch.no_grad()
def test_a_row_of_a_batch_generates_what_it_does_alone(name: str, mode: str) -> None:
    model, prompt = talkative(name), text(rows=2, length=20)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    options = {"max_new_tokens": 6, "pad_token_id": 0, **MODES[mode]}
    together = model.generate(prompt, attention_mask=mask, **options)[:, 20:]
    for row, own in enumerate(together.split(len(together) // 2)):
        tokens = prompt[row : row + 1, mask[row] == 1]
        alone = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert torch.equal(own, alone[:, tokens.shape[1] :])


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


@pytest.mark.supports(architecture="llama", mode="streamer")
@torch.no_grad()
def test_a_streamer_gets_every_token() -> None:
    class Collector(BaseStreamer):
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


@pytest.mark.supports(architecture="llama", mode="goes on from a cache")
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


@pytest.mark.supports(architecture="llama", mode="goes on from a saved cache")
@torch.no_grad()
def test_only_what_is_new_need_be_handed_over(tmp_path: Path) -> None:
    """A conversation from a saved state: the same tokens, with and without all that came before them."""
    model, prompt, more = talkative(), text(rows=2, length=31), text(rows=2, length=7, seed=3)
    cache = model.new_cache(2)
    said = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=6, **GREEDY
    )
    cache.save(tmp_path / "talk.safetensors")
    everything = torch.cat((said, more), dim=1)
    whole = model.generate(everything, attention_mask=torch.ones_like(everything), max_new_tokens=6, **GREEDY)
    new = torch.cat((said[:, -1:], more), dim=1)  # the last token was chosen, not yet read
    for kept in (cache, HippoCache.load(tmp_path / "talk.safetensors", model)):
        kept.new_turn()
        out = model.generate(new, attention_mask=torch.ones_like(new), past_key_values=kept, max_new_tokens=6, **GREEDY)
        assert torch.equal(out[:, 8:], whole[:, everything.shape[1] :])
        assert kept.lengths == [everything.shape[1] + 5] * 2


class Until(StoppingCriteria):
    """Stops each row after a token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] == self.token


@pytest.mark.supports(architecture="llama", mode="stopping criteria")
@torch.no_grad()
def test_stopping_criteria_stop() -> None:
    model, prompt = talkative(), text(rows=1, length=25)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12} | GREEDY
    free, cache = model.generate(prompt, **options)[0, 25:].tolist(), model.new_cache(1)
    at = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    criteria = StoppingCriteriaList([Until(free[at])])
    out = model.generate(prompt, stopping_criteria=criteria, past_key_values=cache, **options)
    assert out[0, 25:].tolist() == free[: at + 1]
    assert cache.lengths == [25 + at], "the token that stopped it is not read"


@pytest.mark.supports(architecture="llama", mode="stop strings")
@torch.no_grad()
def test_strings_stop() -> None:
    model, tokenizer = tiny_load()
    ids = tokenizer("some words", return_tensors="pt").input_ids
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12} | GREEDY
    free = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :])
    stop = free[3:5]
    out = model.generate(ids, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == free[: free.index(stop) + 2]


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest floating tensor had that anything computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.slow
@pytest.mark.supports(architecture="llama", mode="prompt of 50,000 tokens")
@torch.no_grad()
def test_a_prompt_of_fifty_thousand_tokens_takes_no_more_space_than_a_short_one() -> None:
    model, _ = tiny_load(window=256, segment_len=256)
    states, largest = [], []
    for length in (1_000, 50_000):
        ids = torch.randint(1, 200, (1, length), generator=torch.Generator().manual_seed(0))
        cache = model.new_cache(1)
        with Largest() as watch:
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False
            )
        assert out.shape == (1, length + 3) and cache.lengths == [length + 2]
        states.append(cache.nbytes - cache.passages_nbytes)
        assert cache.passages_nbytes < 20 * model.config.passage_tokens  # 64 bytes a passage, of 4 tokens at the least
        largest.append(watch.numel)
    assert states[0] == states[1] and largest[0] == largest[1]
    assert largest[1] < 50_000 * 16, "the hidden states of the whole prompt existed at once"


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "options",
    [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}],
    ids=["assistant", "prompt look-up", "early exit"],
)
def test_assisted_generation_is_refused(options: dict[str, Any]) -> None:
    """Tokens that were read cannot be unread."""
    prompt = text(rows=1, length=20)
    if "assistant_model" in options:
        options = {"assistant_model": tiny_base()}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        awake().generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, **options)


def test_a_hippoformer_is_no_assistant() -> None:
    prompt = text(rows=1, length=20)
    assistant = awake()
    assistant.generation_config.num_assistant_tokens = 3
    with pytest.raises(InputError, match="cannot be cropped"):
        tiny_base().generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, assistant_model=assistant, **GREEDY
        )


def test_a_cache_of_too_few_rows_is_refused() -> None:
    model, prompt = awake(), text(rows=1, length=20)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4} | GREEDY
    cache = model.new_cache(1)
    with pytest.raises(InputError, match="batch_repeat_interleave"):
        model.generate(prompt, past_key_values=cache, num_beams=3, **options)
    model(prompt[:, :10], past_key_values=cache)
    three = cache.copy()
    three.batch_repeat_interleave(3)
    out = model.generate(prompt, past_key_values=three, num_beams=3, **options)
    assert torch.equal(out, model.generate(prompt, num_beams=3, **options))
