"""Reinstatement: which passages a cue brings back, and that reading them again touches nothing but a copy."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hippoformer.errors import InputError
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.reinstatement import reinstated
from test_rows import padded
from tiny import VOCAB, awake, fresh, read_in_chunks, same_state, small_config, state_of, text


def remembered(positions: list[list[int]], tokens: list[list[int]]) -> Episodes:
    """Rows that hold these tokens at these places of their texts; -1 where a slot is empty."""
    slots = len(positions[0])
    config = small_config(buffer_size=slots)
    episodes = Episodes.empty(len(positions), config, torch.float32, "cpu")
    episodes.position[:, :slots] = torch.tensor(positions, dtype=torch.int32)
    episodes.token[:, :slots] = torch.tensor(tokens, dtype=torch.int32)
    return episodes


def slowly(positions: list[int], tokens: list[int], cue: list[int], n_tokens: int, span: int) -> set[int]:
    """Slots of one row, by loops over plain numbers."""
    known = [slot for slot, position in enumerate(positions) if position >= 0]
    count = Counter(tokens[slot] for slot in known)
    rarity = {slot: math.log((len(known) + 1) / (count[tokens[slot]] + 1)) for slot in known}
    first = [
        slot
        for slot in known
        if not any(tokens[s] == tokens[slot] and 0 < positions[slot] - positions[s] <= span for s in known)
    ]
    of_cue = {slot: rarity[slot] for slot in first if tokens[slot] in cue}
    chosen = more_of(set(), of_cue, positions, int(0.4 * n_tokens), span)
    passages: list[set[int]] = []
    for slot in sorted(chosen):
        if slot - 1 in chosen and positions[slot] - positions[slot - 1] <= span:
            passages[-1].add(tokens[slot])
        else:
            passages.append({tokens[slot]})
    having = Counter(word for passage in passages for word in passage)
    found = {
        slot: having[tokens[slot]] * rarity[slot] ** 3
        for slot in first
        if tokens[slot] not in cue and having[tokens[slot]] > 1
    }
    most = max(found.values(), default=0.0)
    associated = {slot: value / most for slot, value in found.items() if most > 0}
    chosen = more_of(chosen, associated, positions, n_tokens, span)
    return more_of(chosen, of_cue, positions, n_tokens, span)


def more_of(chosen: set[int], worth: dict[int, float], positions: list[int], n_tokens: int, span: int) -> set[int]:
    """With the passages that are worth most, until one does not fit."""
    known = [slot for slot, position in enumerate(positions) if position >= 0]
    worth = {slot: value for slot, value in worth.items() if slot not in chosen}
    while True:
        score = {}
        for middle in known:
            apart = {slot: abs(positions[slot] - positions[middle]) for slot in worth}
            total = sum(value * max(0.0, 1.0 - apart[slot] / (span + 1)) for slot, value in worth.items())
            if total > 1e-9:
                score[middle] = total + 1e-4 * middle / len(positions)
        if not score:
            return chosen
        best = max(score, key=lambda slot: score[slot])
        near = {slot for slot in known if abs(positions[slot] - positions[best]) <= span}
        if len(chosen | near) > n_tokens:
            return chosen
        chosen = chosen | near
        worth = {slot: value for slot, value in worth.items() if slot not in near}


@st.composite
def memories(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], int, int]:
    """Positions, tokens, cue, n_tokens, span; some slots are empty, as they are in front of a young store."""
    positions = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=30)))
    positions = [-1] * draw(st.integers(0, 3)) + positions
    tokens = draw(st.lists(st.integers(0, 9), min_size=len(positions), max_size=len(positions)))
    cue = draw(st.lists(st.integers(-1, 9), min_size=1, max_size=5))
    return positions, tokens, cue, draw(st.integers(1, 30)), draw(st.integers(1, 5))


@settings(max_examples=300, deadline=None)
@given(memories())
def test_it_is_what_loops_over_plain_numbers_say(case: tuple) -> None:
    positions, tokens, cue, n_tokens, span = case
    episodes = remembered([positions], [tokens])
    chosen = reinstated(episodes, episodes.token, torch.tensor([cue]), n_tokens, span)
    assert set(chosen[0].nonzero().flatten().tolist()) == slowly(positions, tokens, cue, n_tokens, span)
    assert int(chosen.sum()) <= n_tokens


def test_rows_choose_for_themselves() -> None:
    positions = [[0, 1, 2, 3, 10, 11, 12, 20], [-1, -1, 5, 6, 7, 8, 30, 31]]
    tokens = [[1, 2, 3, 4, 5, 6, 7, 3], [9, 9, 3, 3, 8, 1, 2, 3]]
    cue = torch.tensor([[3, 5], [2, -1]])
    both = remembered(positions, tokens)
    chosen = reinstated(both, both.token, cue, 6, 2)
    for row in range(2):
        alone = remembered([positions[row]], [tokens[row]])
        assert torch.equal(reinstated(alone, alone.token, cue[[row]], 6, 2)[0], chosen[row])


def test_the_rarest_word_decides_and_then_the_newest() -> None:
    """Slots of three tokens a passage; 1 stands everywhere, 7 once, 5 twice."""
    positions = [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]
    tokens = [2, 1, 3, 1, 7, 1, 4, 5, 1, 4, 5, 1]
    episodes = remembered([positions], [tokens])

    def found(cue: list[int], n_tokens: int) -> list[int]:
        chosen = reinstated(episodes, episodes.token, torch.tensor([cue]), n_tokens, 1)
        return chosen[0].nonzero().flatten().tolist()

    assert found([1, 7], 3) == [3, 4, 5]
    assert found([5], 3) == [9, 10, 11], "of two that count the same the newer"
    assert found([5], 6) == [6, 7, 8, 9, 10, 11]
    assert found([1, 7], 2) == [], "a passage that does not fit is not cut"
    assert found([8], 12) == [], "and nothing comes for a word that is not there"


def test_what_was_found_leads_on() -> None:
    """The football (7) was taken by 8 and left by 8, who is elsewhere now; 5 is there each time too, as everywhere."""
    positions = [*range(0, 3), *range(10, 13), *range(20, 23), *range(30, 33), *range(40, 43), *range(50, 53)]
    tokens = [8, 7, 5, 8, 7, 5, 8, 9, 5, 2, 3, 5, 4, 5, 5, 6, 1, 5]
    episodes = remembered([positions], [tokens])
    chosen = reinstated(episodes, episodes.token, torch.tensor([[7]]), 15, 1)
    assert chosen[0].nonzero().flatten().tolist()[:8] == list(range(8)), "both passages of 7, then that of 8"
    only = remembered([positions], [[8, 7, 5, 2, 3, 5, 8, 9, 5, 2, 3, 5, 4, 5, 5, 6, 1, 5]])
    chosen = reinstated(only, only.token, torch.tensor([[7]]), 15, 1)
    assert chosen[0].nonzero().flatten().tolist() == [0, 1, 2], "what stands there once is chance"


def test_one_rare_word_is_worth_more_than_two_common_ones() -> None:
    positions = [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    tokens = [1, 2, 1, 2, 1, 2, 1, 2, 7, 9]
    episodes = remembered([positions], [tokens])
    chosen = reinstated(episodes, episodes.token, torch.tensor([[1, 2, 7]]), 2, 1)
    assert chosen[0].nonzero().flatten().tolist() == [8, 9]


# ---------------------------------------------------------------- in a model


def read(rows: int = 2, length: int = 90, **options: object) -> tuple:
    """A model, the text it has read, and the state; token 0, which padding becomes, stands in it here and there."""
    model = awake(**({"buffer_size": 48} | options))
    ids, cache = text(rows, length), model.new_cache(rows)
    ids[:, 5::9] = 0
    model.score(ids, past_key_values=cache)
    return model, ids, cache


def test_passages_are_text_that_was_read() -> None:
    _, ids, cache = read()
    told, mask = cache.passages(ids[:, 20:22], n_tokens=12, span=2)
    assert told.shape == mask.shape and 3 <= told.shape[1] <= 12
    for row in range(2):
        own = told[row][mask[row] == 1].tolist()
        assert own == ids[row, cache.places(ids[:, 20:22], n_tokens=12, span=2)[row]].tolist()
        stored = {episode.token for episode in cache.episodes(row)}
        assert set(own) <= stored and {int(ids[row, 20]), int(ids[row, 21])} & stored <= set(own)
    unknown = torch.tensor([[VOCAB - 1]]).expand(2, 1)
    ids[ids == VOCAB - 1] = 5
    fresh_cache = (m := awake(buffer_size=48)).new_cache(2)
    m.score(ids, past_key_values=fresh_cache)
    nothing, none = fresh_cache.passages(unknown)
    assert nothing.shape == none.shape == (2, 0)
    left, right = state_of(fresh_cache.reminded_of(unknown)), state_of(fresh_cache)
    assert same_state(left, right) == []


@torch.no_grad()
def test_being_reminded_is_reading_the_passages_in_a_copy() -> None:
    model, ids, cache = read()
    before, cue = state_of(cache), ids[:, 20:23]
    told, mask = cache.passages(cue, n_tokens=20, span=3)
    assert not mask.all(), "rows of different lengths, or padding is not tested"
    branch = cache.reminded_of(cue, n_tokens=20, span=3)
    assert same_state(state_of(cache), before) == []
    after = model(cue, past_key_values=branch).logits
    for row in range(2):
        own = cache.select_rows(torch.tensor([row]))
        own.new_turn()
        alone = torch.cat((told[row][mask[row] == 1], cue[row])).unsqueeze(0)
        logits = model(alone, past_key_values=own).logits[0, -cue.shape[1] :]
        torch.testing.assert_close(after[row], logits, rtol=0.0, atol=1e-4)
    plain = cache.copy()
    plain.new_turn()
    assert (after - model(cue, past_key_values=plain).logits).abs().max() > 1e-3, "it makes a difference"


def test_padding_of_a_cue_says_nothing() -> None:
    _, ids, cache = read()
    cue = [ids[0, 20:24], ids[1, 40:41]]
    one = [cache.select_rows(torch.tensor([row])).passages(part.unsqueeze(0)) for row, part in enumerate(cue)]
    for side in ("left", "right"):
        padded_cue, mask = padded(cue, side, fill=int(ids[1, 20]))
        told, real = cache.passages(padded_cue, mask)
        for row, (alone, _) in enumerate(one):
            assert told[row][real[row] == 1].tolist() == alone[0].tolist()


def test_generation_goes_on_from_a_reminded_copy() -> None:
    model, ids, cache = read(rows=1)
    cue = ids[:, 20:23]
    made = model.generate(cue, past_key_values=cache.reminded_of(cue), max_new_tokens=5, do_sample=False)
    told, _ = cache.passages(cue)
    own = cache.copy()
    own.new_turn()
    expected = model.generate(torch.cat((told, cue), 1), past_key_values=own, max_new_tokens=5, do_sample=False)
    assert made[0, -5:].tolist() == expected[0, -5:].tolist()


def test_a_window_alone_remembers_nothing_else() -> None:
    """With no store only what is in the window comes back; with the memory off nothing does."""
    model, ids, cache = read(buffer_size=0)
    told, mask = cache.passages(ids[:, :60])
    assert set(told[mask == 1].tolist()) <= set(ids[:, -20:].flatten().tolist())
    off = model.new_cache(2)
    with model.memory_off():
        model.score(ids, past_key_values=off)
        assert off.passages(ids[:, :60])[0].shape == (2, 0)


@pytest.mark.parametrize("wrong", [{"n_tokens": 0}, {"span": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    cache = fresh().new_cache(1)
    with pytest.raises(InputError, match="expected at least"):
        cache.passages(torch.tensor([[1]]), **wrong)


@pytest.mark.parametrize("cue", [torch.tensor([[1]]), torch.tensor([[1.0], [2.0]]), torch.tensor([[1], [VOCAB]])])
def test_a_cue_that_does_not_fit_is_refused(cue: Tensor) -> None:
    model, ids, cache = read()
    before = state_of(cache)
    with pytest.raises(InputError):
        cache.reminded_of(cue)
    assert same_state(state_of(cache), before) == []
    assert read_in_chunks(model, ids, 90).shape[1] == 90
