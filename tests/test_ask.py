"""Passages as part of the state: written while reading, found by words, put before a question, forgotten, saved."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import hippoformer
from hippoformer import HippoCache, HippoFormer
from hippoformer.chat import Conversation
from hippoformer.errors import InputError, MemoryFileError
from hippoformer.model.rereading import GAP, as_text, reread
from tiny import awake, same_state, state_of
from tiny import text as random_ids
from tiny_texts import tiny_load

STORY = [
    "Marta has the key of the boat in a flower pot.\n",
    "It rained on Tuesday, and nobody went out.\n",
    "Old Jonas sold his horse to a baker from Lund.\n",
    "The clock in the hall has stopped again.\n",
    "In spring the river takes the bridge away.\n",
]
OTHER = ["Nothing is known of pots here.\n", "The moon is a lantern that somebody forgot.\n"]


@pytest.fixture(scope="module")
def loaded() -> tuple[HippoFormer, Any]:
    return tiny_load()


def ids_of(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


def read(loaded: tuple[HippoFormer, Any], *texts: str, chunk: int = 1000) -> HippoCache:
    """The state of one row for each text, padded on the left."""
    model, tokenizer = loaded
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    cache = model.new_cache(len(rows))
    for part, real in zip(ids.split(chunk, dim=1), mask.split(chunk, dim=1), strict=True):
        if real.any(dim=1).all():
            model.score(part, attention_mask=real, past_key_values=cache)
    return cache


def told(cache: HippoCache, found: list[Any]) -> list[str]:
    return [cache.passages.spelling.text(passage.token_ids) for passage in found]


def everything(cache: HippoCache, row: int = 0) -> str:
    return "".join(told(cache, cache.passages.of_row(row)))


def question(loaded: tuple[HippoFormer, Any], cache: HippoCache, words: str, **options: Any) -> list[str]:
    found = cache.retrieve(ids_of(loaded[1], words), **options)
    return told(cache, found[0])


def test_what_was_read_is_found_by_the_words_of_a_question(loaded: Any) -> None:
    cache = read(loaded, "".join(STORY))
    assert everything(cache) == "".join(STORY)
    assert question(loaded, cache, "Where are the keys for the boat?")[0] == STORY[0]
    assert question(loaded, cache, "Who bought Jonas's horses?")[0] == STORY[2]
    best = cache.retrieve(ids_of(loaded[1], "Who bought Jonas's horses?"), n_tokens=100)[0]
    assert sum(map(len, best)) <= 100 and [p.score for p in best] == sorted((p.score for p in best), reverse=True)
    start = len("".join(STORY[:2]))
    assert (best[0].start, best[0].stop) == (start, start + len(STORY[2]))  # a token a byte
    assert question(loaded, cache, "xylophone") == question(loaded, cache, "") == []
    beyond = question(loaded, cache, "Marta's river", beyond_window=True)
    assert STORY[0] in beyond and STORY[4] not in beyond


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_passages_do_not_depend_on_the_chunks(loaded: Any, chunk: int) -> None:
    whole, parts = read(loaded, "".join(STORY)), read(loaded, "".join(STORY), chunk=chunk)
    for one, other in zip(whole.passages.of_row(0), parts.passages.of_row(0), strict=True):
        assert (one.start, one.token_ids.tolist()) == (other.start, other.token_ids.tolist())
        assert one.salience == pytest.approx(other.salience, abs=1e-4)


def test_rows_and_threads_never_meet(loaded: Any) -> None:
    cache = read(loaded, "".join(STORY), "".join(OTHER))
    assert everything(cache, 0) == "".join(STORY) and everything(cache, 1) == "".join(OTHER)
    pots = ids_of(loaded[1], "flower pots")
    found = cache.retrieve(pots.expand(2, -1))
    assert told(cache, found[0])[0] == STORY[0] and told(cache, found[1])[0] == OTHER[0]
    mask = torch.stack((torch.zeros_like(pots[0]), torch.ones_like(pots[0])))
    assert [len(one) > 0 for one in cache.retrieve(pots.expand(2, -1), mask)] == [False, True]
    caches: list[Any] = [None, None]

    def job(number: int, text: str) -> None:
        caches[number] = read(loaded, text, chunk=9)

    jobs = [threading.Thread(target=job, args=(i, "".join(text) * 4)) for i, text in enumerate((STORY, OTHER))]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert everything(caches[0]) == "".join(STORY) * 4 and everything(caches[1]) == "".join(OTHER) * 4


def test_they_go_where_the_state_goes(loaded: Any, tmp_path: Path) -> None:
    model, tokenizer = loaded
    cache = read(loaded, "".join(STORY), "".join(OTHER))
    copy, swapped = cache.copy(), cache.select_rows(torch.tensor([1, 0, 1]))
    model.score(ids_of(tokenizer, "And more. ").expand(2, -1), past_key_values=copy)
    assert everything(cache) == "".join(STORY) and everything(copy) == "".join(STORY) + "And more. "
    assert [everything(swapped, row) for row in range(3)] == ["".join(OTHER), "".join(STORY), "".join(OTHER)]
    cache.save(tmp_path / "memory")
    again = HippoCache.load(tmp_path / "memory", model)
    assert [everything(again, row) for row in range(2)] == [everything(cache, row) for row in range(2)]
    assert again.nbytes == cache.nbytes and again.passages_nbytes > 0
    for one in (cache, again):
        model.score(ids_of(tokenizer, "More. ").expand(2, -1), past_key_values=one)
    assert everything(again, 1) == everything(cache, 1)
    cache.reset([0])
    assert everything(cache, 0) == "" and everything(cache, 1).startswith(OTHER[0])
    fresh = model.new_cache(2)
    fresh.adopt_memory(again)
    assert everything(fresh, 1) == everything(again, 1)


def test_what_is_not_stored_is_no_passage(loaded: Any) -> None:
    """With the memory off or frozen nothing is kept, and what stands on either side of the gap is not joined."""
    model, tokenizer = loaded
    cache = model.new_cache()
    for number, part in enumerate(("one two three ", "UNSEEN ", "four five six ", "FROZEN ", "seven eight. ")):
        cache.freeze_memory(number == 3)
        if number == 1:
            with model.memory_off():
                model.score(ids_of(tokenizer, part), past_key_values=cache)
        else:
            model.score(ids_of(tokenizer, part), past_key_values=cache)
    assert told(cache, cache.passages.of_row(0)) == ["one two three ", "four five six ", "seven eight. "]
    assert [passage.start for passage in cache.passages.of_row(0)] == [0, 21, 42]


def test_the_store_is_bounded(loaded: Any) -> None:
    model, tokenizer = tiny_load(passage_tokens=100)
    cache = read((model, tokenizer), "".join(STORY) * 6)
    assert sum(map(len, cache.passages.rows[0].finished)) <= 100
    with pytest.raises(Exception, match="passage_tokens"):
        tiny_load(passage_tokens=10)
    none = tiny_load(passage_tokens=0)[0].new_cache()
    assert none.passages is None and none.passages_nbytes == 0
    with pytest.raises(InputError, match="set_tokenizer"):
        none.retrieve(torch.ones(1, 3, dtype=torch.long))
    key = ids_of(tokenizer, "key")
    for wrong in ({"n_tokens": 0}, {"attention_mask": torch.ones(1, 2)}, {"query_ids": torch.ones(3, 4)}):
        with pytest.raises(InputError):
            cache.retrieve(**({"query_ids": key} | wrong))


def test_forgetting(loaded: Any) -> None:
    model, tokenizer = loaded
    cache = read(loaded, "".join(STORY) * 2)
    held = {episode.position for episode in cache.episodes()}
    assert told(cache, cache.forget("Jonas horse")) == [STORY[2]] * 2
    assert "Jonas" not in everything(cache) and question(loaded, cache, "Jonas's horse") == []
    start = len("".join(STORY)) + len("".join(STORY[:2]))
    gone = set(range(start, start + len(STORY[2])))
    assert held & gone and not {episode.position for episode in cache.episodes()} & gone
    found = cache.retrieve(ids_of(tokenizer, "key of the boat"), n_tokens=75)[0]
    assert [p.start for p in cache.forget(passages=found)] == [found[0].start]
    assert everything(cache).count("Marta") == 1
    cache.forget(start=0)
    assert everything(cache) == "" and not cache.episodes()
    logits = model(ids_of(tokenizer, "And on."), past_key_values=cache).logits
    assert torch.isfinite(logits).all() and everything(cache) == "And on."
    total = logits.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))
    for wrong in ({}, {"words": "a", "start": 3}, {"words": "the of"}, {"words": "river", "row": 1}):
        with pytest.raises(InputError):
            cache.forget(**wrong)


def test_files_without_passages_are_read_with_a_word(loaded: Any, tmp_path: Path) -> None:
    model, _ = loaded
    cache = read(loaded, "".join(STORY))
    cache.save(path := tmp_path / "memory")
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    old = {name: tensor for name, tensor in tensors.items() if not name.startswith("passages.")}
    save_file(old, tmp_path / "old", metadata)
    with pytest.warns(UserWarning, match="without passages"):
        again = HippoCache.load(tmp_path / "old", model)
    assert everything(again) == "" and not same_state(state_of(again), state_of(cache))
    damaged = tensors | {"passages.rows": tensors["passages.rows"][:0]}
    save_file(damaged, tmp_path / "damaged", metadata)
    with pytest.raises(MemoryFileError, match="damaged"):
        HippoCache.load(tmp_path / "damaged", model)
    spelled, model.spelling = model.spelling, None
    try:
        with pytest.warns(UserWarning, match="set_tokenizer"):
            assert HippoCache.load(path, model).passages is None
    finally:
        model.spelling = spelled


def test_rereading_is_in_a_copy(loaded: Any) -> None:
    tokenizer = loaded[1]
    cache = read(loaded, "".join(STORY))
    before = state_of(cache)
    copy = reread(cache, ids_of(tokenizer, "Who has the horse of Jonas?"), n_tokens=60)
    assert not same_state(before, state_of(cache)) and copy.lengths[0] == cache.lengths[0] + len(STORY[2]) + 1
    nothing = reread(cache, ids_of(tokenizer, "xylophone"))
    assert nothing.lengths == cache.lengths
    first, _, third, *_ = cache.passages.of_row(0)
    shown = as_text([first, third], cache.passages.spelling).split(f"\n{GAP}\n")
    assert sorted(shown) == sorted((STORY[0].strip(), STORY[2].strip()))


@torch.no_grad()
def test_generate_after_rereading(loaded: Any) -> None:
    """The base alone goes on from passages and question; the cache reads question and answer, without the passages."""
    model, tokenizer = loaded
    cache, asked = read(loaded, "".join(STORY)), ids_of(tokenizer, "Who bought the horse? ")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache.new_turn()
    own = cache.copy()
    out = model.generate(asked, past_key_values=own, reread_tokens=60, **options)
    with model.memory_off():
        copy = reread(cache, asked, n_tokens=60)
        expected = model.generate(asked, past_key_values=copy, **options)
    assert torch.equal(out, expected)
    model.score(out[:, :-1], past_key_values=cache)
    assert own.lengths == cache.lengths and everything(own) == everything(cache)
    with pytest.raises(InputError, match="HippoCache"):
        model.generate(asked, reread_tokens=60, **options)
    with pytest.raises(InputError, match="nothing is new"):
        model.generate(out[:, :-1], past_key_values=own, reread_tokens=60, **options)


def test_models_without_a_tokenizer_keep_no_passages() -> None:
    model, ids = awake(), random_ids(rows=1, length=40)
    cache = model.new_cache()
    model.score(ids, past_key_values=cache)
    assert cache.passages is None and cache.nbytes == cache.window_nbytes + cache.memory_nbytes


def test_a_conversation_retrieves_by_itself_once_something_has_left_the_window() -> None:
    model, tokenizer = loaded = tiny_load(window=128)
    talk = Conversation(model, tokenizer, cache=read(loaded, "".join(STORY) * 2), max_new_tokens=4, do_sample=False)
    talk.say("Jonas's horse?")
    assert "Jonas" in "".join(told(talk.cache, talk.passages))
    talk.say("Jonas's horse?")  # now the window holds the conversation
    assert talk.passages and all(p.stop <= len("".join(STORY)) * 2 - 64 for p in talk.passages)
    heard = everything(talk.cache)
    assert heard.count("Jonas") == 4, "what was retrieved was stored again"
    short = Conversation(model, tokenizer, max_new_tokens=4, do_sample=False)
    short.say("Hello")
    assert short.passages == []
    never = Conversation(model, tokenizer, cache=read(loaded, "".join(STORY) * 2), reread_tokens=0, max_new_tokens=2)
    never.say("Jonas's horse?")
    assert never.passages == []


def test_ask_and_why_in_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Any]
) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(name, **({"window": 128} | options)))
    book, memory = tmp_path / "book.txt", tmp_path / "book.safetensors"
    book.write_text("".join(STORY) * 2, encoding="utf-8")
    options = ("--model", "tiny", "--max-new-tokens", 3)
    asked = ["Who has Jonas's horse?", "Where is the key?"]
    first = command("ask", book, *asked, "--save", memory, *options)
    assert first.code == 0 and first.err.count("tokens") == 1, first
    for question, line in zip(asked, (STORY[2], STORY[0]), strict=True):
        assert question in first.out and line.strip() in first.out
    start = len("".join(STORY[:2]))
    assert f"tokens {start} to {start + len(STORY[2])}: Old Jonas" in first.out
    assert command("ask", *options, memory, *asked).out == first.out
    missing = command("ask", memory, "x", "--row", 1, *options)
    assert missing.code == 2 and "holds 1 rows" in missing.err
    typed = "Jonas's horse?\n/why\n/forget\n/why\n"
    talk = command("chat", "--memory", memory, "--temperature", 0, *options, typed=typed)
    assert "Old Jonas" in talk.out.split("Forgotten.")[0] and "nothing but" in talk.out.split("Forgotten.")[1]
