"""Invariant 7: the fast paths compute what the slow references of `references.py` say; properties of the pure
functions.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import references
from hippoformer import HippoFormerConfig
from hippoformer.hippocampus import continuation, replay
from hippoformer.hippocampus.episodes import REPEATED, Episodes, admit, importance, repeats
from hippoformer.hippocampus.fusion import mix_distribution, mix_target
from hippoformer.hippocampus.recall import Recall, Recollection
from hippoformer.hippocampus.replay import consolidate
from hippoformer.hippocampus.selection import RULES
from hippoformer.ops import hashed_uniform, recall_mask, window_mask, winners
from tiny import awake, small_config, text

FEW = settings(max_examples=60, deadline=None)
COUNTERS = ("salience", "surprise", "priority", "age", "credit")


def random_memory(config: HippoFormerConfig, stored: list[int], working: list[int], seed: int) -> Episodes:
    """A memory of one row per entry, with `stored` and `working` episodes; many near-duplicates, a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    episodes = Episodes.empty(len(stored), config, torch.float64, "cpu")
    n_slots, heads = config.buffer_size + config.working_slots, config.recall_n_heads
    for row, (in_store, at_work) in enumerate(zip(stored, working, strict=True)):
        first, last = config.buffer_size - in_store, config.buffer_size + at_work
        slots = range(first, last)
        places = torch.randperm(4 * n_slots, generator=generator)[: len(slots)].sort().values
        kinds = torch.randn(5, heads, config.recall_head_dim, generator=generator, dtype=torch.float64)
        for slot, place in zip(slots, places.tolist(), strict=True):
            kind = int(torch.randint(0, 5, (), generator=generator))
            noise = torch.randn(kinds[0].shape, generator=generator, dtype=torch.float64)
            key = kinds[kind] + noise * (0.05 if torch.rand((), generator=generator) < 0.7 else 2.0)
            episodes.key[row, slot] = torch.nn.functional.normalize(key, dim=-1).flatten()
            episodes.value[row, slot] = torch.randn(config.recall_value_dim, generator=generator, dtype=torch.float64)
            episodes.token[row, slot], episodes.position[row, slot] = kind % 3, place + 1
            numbers = torch.rand(5, generator=generator)
            episodes.salience[row, slot], episodes.surprise[row, slot] = numbers[0], numbers[4]
            # Some priorities tie exactly, as the untagged ones do.
            episodes.priority[row, slot] = 1.0 if numbers[1] < 0.3 else 1.0 + 4.0 * numbers[1]
            episodes.age[row, slot], episodes.credit[row, slot] = float(int(4 * numbers[2])), numbers[3] ** 3
    return episodes


def assert_same_memories(fast: Episodes, row: int, slots: range, expected: list[references.Memory], heads: int) -> None:
    found = [memory for memory in references.memories(fast, row, slots, heads) if memory is not None]
    assert [(m.position, m.token) for m in found] == [(m.position, m.token) for m in expected]
    for mine, theirs in zip(found, expected, strict=True):
        for name in COUNTERS:
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name), rel=1e-5, abs=1e-7), name
        assert mine.key == theirs.key


@pytest.mark.parametrize("selection", list(RULES))
@pytest.mark.parametrize("seed", range(3))
def test_admit(selection: str, seed: int) -> None:
    config = small_config(selection=selection, seed=seed)
    stored, working, leaving = [16, 9, 0, 16], [12, 18, 5, 0], [6, 18, 0, 0]
    episodes = random_memory(config, stored, working, seed)
    with torch.no_grad():
        fast = admit(episodes, torch.tensor(leaving), config)
    heads, size = config.recall_n_heads, config.buffer_size
    for row in range(4):
        everyone = references.memories(episodes, row, range(size + config.working_slots), heads)
        at_work = references.captured([m for m in everyone[size:] if m is not None], leaving[row], config)
        contenders = [m for m in everyone[:size] if m is not None] + at_work[: leaving[row]]
        expected = references.admit(contenders, config)
        assert_same_memories(fast, row, range(size), expected, heads)
        empty = size - len(expected)
        assert (fast.position[row, :empty] == -1).all(), "the empty slots of a store come first"
        staying = [m for m in everyone[size + leaving[row] :] if m is not None]
        assert_same_memories(fast, row, range(size, size + config.working_slots + 1), staying, heads)
        assert (fast.position[row, size : size + len(staying)] >= 0).all(), (
            "working episodes fill their part from the left"
        )


@torch.no_grad()
def test_what_stands_among_things_of_note_is_kept() -> None:
    """Capture keeps a passage of notable things whole, and lets go of one that is as notable but stands alone."""
    for span, expected in ((0, [3, 7, 8, 10, 11]), (2, [7, 8, 9, 10, 11])):
        config = small_config(buffer_size=5, capture_span=span)
        episodes = random_memory(config, [0], [16], 0)
        working = slice(5, 21)
        salience = torch.tensor([0.1] * 3 + [0.95] + [0.1] * 3 + [0.9, 0.9, 0.2, 0.9, 0.9] + [0.1] * 4)
        episodes.salience[0, working], episodes.priority[0, working] = salience, importance(salience, config)
        episodes.age.zero_()
        place = episodes.position[0, working].tolist()
        after = admit(episodes, torch.tensor([16]), config)
        assert [place.index(position) for position in after.position[0, :5].tolist()] == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_replay_rounds": 10, "replay_rate": 1.0},
        {"max_replay_rounds": 0},
        {"max_replay_rounds": 1, "replay_rate": 0.3, "decay_rate": 0.5},
    ],
)
@pytest.mark.parametrize("span", [0, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_consolidate(options: dict, span: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "SPAN", span)
    config = small_config(seed=seed, **options)
    stored, working = [16, 7, 1, 0], [12, 12, 3, 0]
    episodes = random_memory(config, stored, working, seed + 10)
    episodes.position[0, :16] = torch.tensor([1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 20, 22, 23, 24])
    segment = torch.tensor([3, 8, 1, 2])
    with torch.no_grad():
        fast, reactivated = consolidate(episodes.map(Tensor.clone), segment, config)
    heads, size = config.recall_n_heads, config.buffer_size
    for row in range(4):
        expected = [m for m in references.memories(episodes, row, range(size), heads) if m is not None]
        assert references.consolidate(expected, int(segment[row]), config) == int(reactivated[row])
        assert_same_memories(fast, row, range(size), expected, heads)
    for name, tensor in episodes.tensors().items():
        assert torch.equal(getattr(fast, name)[:, size:], tensor[:, size:]), f"replay touched the working part: {name}"


@pytest.mark.parametrize("seed", range(6))
def test_repeats(seed: int) -> None:
    """Against a loop over all pairs; texts of two tokens, with stretches that come again and gaps."""
    draw = torch.Generator().manual_seed(seed)
    token = torch.randint(0, 2, (2, 90), generator=draw, dtype=torch.int32)
    token[0, :40], token[1, 30:60] = 3, token[1, :30]
    position = torch.arange(90, dtype=torch.int32).repeat(2, 1)
    position[:, 50:] += seed % 3
    position[1, :seed] = -1
    expected = torch.zeros(2, 90, dtype=torch.bool)
    for row in range(2):
        where, what = position[row].tolist(), token[row].tolist()
        stretches = [
            what[slot : slot + REPEATED] if where[slot : slot + REPEATED] == [*range(first, first + REPEATED)] else None
            for slot, first in enumerate(where)
        ]
        for slot, stretch in enumerate(stretches):
            expected[row, slot] = stretch is not None and where[slot] >= 0 and stretch in stretches[slot + 1 :]
    assert expected.any() and torch.equal(repeats(token, position), expected)


def in_single_precision(episodes: Episodes) -> Episodes:
    """As the model keeps them; the references compute on the same numbers in double precision."""
    return episodes.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def random_recall(seed: int, queries: int = 7, **options: object) -> tuple[Recall, tuple]:
    """A recall module with every parameter away from its start, and what it is called with."""
    config = small_config(**options)
    torch.manual_seed(seed)
    module = Recall(32, 100, config)
    module.word_of_token[2] = 1  # two tokens, one word
    spelled = (b"ab", b"b", b" b", b"", b"aaaabbb", b"bb")
    module.ending_of_token[: len(spelled)] = torch.tensor([int.from_bytes(letters) for letters in spelled])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        module.null_proj.bias.fill_(1.0)
    episodes = in_single_precision(random_memory(config, [16, 5], [12, 12], seed))
    # Neighbours in the text, so that contiguity has something to favour.
    episodes.position[0, 4:12] = torch.arange(20, 28)
    episodes.matched[:] = torch.randint(0, 4, (2, episodes.position.shape[1]))
    mass = episodes.effective_priority(config.decay_rate)
    visible = episodes.valid.unsqueeze(1) & (torch.rand(2, queries, episodes.position.shape[1]) < 0.8)
    visible[1, 2] = False  # a query that sees nothing at all
    tokens = torch.randint(0, 3, (2, queries))  # of which random_memory holds many
    return module, (torch.randn(2, queries, 32), tokens, episodes, mass, visible, torch.tensor([21, 16]))


def assert_same_recall(module: Recall, asked: tuple) -> Recollection:
    fast = module(*asked)
    for name, expected in references.recall(module, *asked).items():
        torch.testing.assert_close(
            getattr(fast, name).double(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    return fast


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("seed", range(3))
def test_recall(seed: int, grad: bool) -> None:
    module, asked = random_recall(seed)
    with torch.set_grad_enabled(grad):
        fast = assert_same_recall(module, asked)
    torch.testing.assert_close(fast.weights.sum(-1) + fast.nothing, torch.ones(2, 7), rtol=0.0, atol=1e-5)
    assert not fast.weights[~asked[-2]].any() and fast.nothing[1, 2].item() == pytest.approx(1.0)


@pytest.mark.parametrize("loud", [60.0, 500.0])
@torch.no_grad()
def test_recall_stays_a_distribution_whatever_the_scale(loud: float) -> None:
    """One query may want nothing with all its might; that must not drown the others."""
    module, asked = random_recall(0)
    module.null_proj.weight.mul_(loud)
    assert_same_recall(module, asked)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_without_following_it_is_as_if_no_episode_had_predicted_what_was_read(grad: bool) -> None:
    module, asked = random_recall(0)
    hidden, tokens, *rest = asked
    off, _ = random_recall(0, following=False)
    with torch.set_grad_enabled(grad):
        expected = module(hidden, torch.full_like(tokens, 99), *rest)  # no episode predicts it
        found, followed = off(*asked), module(*asked)
    assert torch.equal(found.weights, expected.weights) and torch.equal(found.nothing, expected.nothing)
    assert not found.followed.any() and not found.matched.any()
    assert followed.followed.any() and followed.matched.any()
    assert not torch.allclose(followed.weights, expected.weights, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_only_the_longest_matches_are_considered(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equally long ones the newest: with room for two the fast path leaves out what the reference leaves out."""
    module, asked = random_recall(seed)
    every = module(*asked).weights
    monkeypatch.setattr(continuation, "PLACES", 2)
    few = assert_same_recall(module, asked)
    assert not torch.allclose(few.weights, every, atol=1e-4)


@given(st.integers(1, 70), st.integers(2, 40), st.integers(1, 3), st.integers(0, 2**31))
@FEW
def test_match_lengths_are_counted_along_the_text(n_queries: int, n_slots: int, n_words: int, seed: int) -> None:
    """Against a loop over queries, for texts of one word, of two, of three."""
    draw = torch.Generator().manual_seed(seed)
    predicted = torch.randint(-1, n_words, (2, n_slots), generator=draw, dtype=torch.int32)
    read = torch.randint(0, n_words, (2, n_queries), generator=draw, dtype=torch.int32)
    visible = torch.rand(2, n_queries, n_slots, generator=draw) < 0.95
    length = torch.randint(0, 1020, (2, n_slots), generator=draw)
    found = continuation.match_lengths(predicted, read, visible, length.float())
    for t in range(n_queries):
        matches = (predicted == read[:, t, None]) & visible[:, t]
        length = torch.where(matches, (torch.nn.functional.pad(length, (1, 0))[:, :-1] + 1).clamp_max(1024), 0)
        assert torch.equal(found[:, t].long(), length)


@torch.no_grad()
def test_recall_of_many_queries_is_that_of_few() -> None:
    """Longer than any block the fast path may cut its queries into; what a part needs of the one before is carried."""
    module, (hidden, tokens, episodes, mass, visible, own_slot) = random_recall(0, queries=150)
    own_slot[:] = 6
    whole = module(hidden, tokens, episodes, mass, visible, own_slot)
    for start in (1, 40, 101, 130):
        few = slice(start, start + 20)
        there = replace(episodes, matched=whole.matched[:, start - 1].float())
        part = module(hidden[:, few], tokens[:, few], there, mass, visible[:, few], own_slot + start)
        for name in ("weights", "nothing", "content", "peak", "matched", "followed"):
            torch.testing.assert_close(getattr(whole, name)[:, few], getattr(part, name), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_slots_seen_alike_may_be_said_to_be() -> None:
    module, (hidden, tokens, episodes, mass, visible, own_slot) = random_recall(0)
    visible[:, :, :9] = visible[:, :1, :9]
    expected = module(hidden, tokens, episodes, mass, visible, own_slot)
    torch.testing.assert_close(module(hidden, tokens, episodes, mass, visible, own_slot, 9).weights, expected.weights)


@torch.no_grad()
def test_the_whole_write_path_against_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segment by segment through the model: what is stored is what the references make of the same episodes."""
    model = awake(max_replay_rounds=3)
    config, hippocampus, cache = model.config, model.hippocampus, model.new_cache(1)
    heads, size = config.recall_n_heads, config.buffer_size
    original, checked = hippocampus._end_segment, []

    def end_segment(state, done, rows, frozen):
        everyone = references.memories(state.episodes, 0, range(size + config.working_slots), heads)
        at_work = [m for m in everyone[size:] if m is not None]
        n_leaving = sum(m.position < done[0] - config.window for m in at_work)
        at_work = references.captured(at_work, n_leaving, config)
        contenders = [m for m in everyone[:size] if m is not None] + at_work[:n_leaving]
        state, reactivated = original(state, done, rows, frozen)
        expected = references.admit(contenders, config)
        assert references.consolidate(expected, done[0] // config.segment_len, config) == int(reactivated)
        assert_same_memories(state.episodes, 0, range(size), expected, heads)
        checked.append(len(expected))
        return state, reactivated

    monkeypatch.setattr(hippocampus, "_end_segment", end_segment)
    model(text(rows=1, length=72), past_key_values=cache)
    assert len(checked) == 12 and checked[-1] == size


def test_mixtures_by_hand() -> None:
    """p(v) = (1 - l (1 - nothing)) p_base(v) + l * votes(v), entry by entry, of all tokens and of one."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(torch.randn(1, 2, 7, generator=generator), -1)
    attention = torch.softmax(torch.randn(1, 2, 5, generator=generator), -1)
    weights, nothing = attention[..., 1:], attention[..., 0]
    token, share = torch.tensor([[3, 3, 0, 6]], dtype=torch.int32), torch.tensor([[0.0, 0.7]])
    mixed = mix_distribution(log_probs, share, nothing, weights, token)
    assert torch.equal(mixed[0, 0], log_probs[0, 0]), "a mixture of weight 0 is not the base to the last bit"
    for query in range(2):
        for v in range(7):
            votes = sum(float(weights[0, query, e]) for e in range(4) if int(token[0, e]) == v)
            own = (1 - float(share[0, query]) * (1 - float(nothing[0, query]))) * float(log_probs[0, query, v].exp())
            expected = math.log(own + float(share[0, query]) * votes)
            assert float(mixed[0, query, v]) == pytest.approx(expected, abs=1e-5)
            one = (log_probs[:, query, v : v + 1], share[:, query : query + 1], nothing[:, query : query + 1])
            assert float(mix_target(*one, torch.tensor([[votes]]))) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- properties


@FEW
@given(st.data())
def test_winners(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 12))
    number = st.one_of(st.just(-math.inf), st.integers(0, 4).map(float), st.floats(-5, 5, width=32))
    rows = data.draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=1, max_size=3))
    k = data.draw(st.integers(0, width))
    chosen = winners(torch.tensor(rows), k).tolist()
    for row, mine in zip(rows, chosen, strict=True):
        expected = references.winners(row, k)
        empty = k - len(expected)
        assert mine[empty:] == expected
        assert all(row[index] == -math.inf for index in mine[:empty])


QUERIES = st.lists(st.integers(0, 13), min_size=1, max_size=4)


@FEW
@given(st.integers(1, 14), st.integers(1, 6), st.integers(0, 4), QUERIES, st.booleans())
def test_window_mask(n_slots: int, window: int, sinks: int, queries: list[int], padded: bool) -> None:
    queries = [query % n_slots for query in queries]
    off = [padded and index % 2 == 1 for index in range(len(queries))]
    mask = window_mask(torch.tensor([queries]), n_slots, window, sinks, torch.tensor([off]))
    assert mask.shape == (1, 1, len(queries), n_slots)
    for index, query in enumerate(queries):
        for slot in range(n_slots):
            sees = slot == 0 if off[index] else slot <= query and (query - slot < window or slot < sinks)
            assert bool(mask[0, 0, index, slot]) == sees
    assert mask.any(-1).all(), "a softmax over nothing"


@FEW
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.integers(1, 6))
def test_recall_mask(valid: list[bool], first_new: int, n_queries: int) -> None:
    mask = recall_mask(torch.tensor([valid]), torch.tensor([first_new]), n_queries)
    assert mask.shape == (1, n_queries, len(valid))
    for query in range(n_queries):
        for slot, holds in enumerate(valid):
            assert bool(mask[0, query, slot]) == (holds and slot < first_new + query)


WORDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)


@FEW
@given(WORDS, WORDS)
def test_hashed_uniform(keys: list[int], tensor: list[int]) -> None:
    drawn = hashed_uniform(*keys, torch.tensor(tensor))
    assert drawn.dtype == torch.float32 and ((drawn > 0) & (drawn < 1)).all()
    for value, last in zip(drawn.tolist(), tensor, strict=True):
        assert value == pytest.approx(references.uniform(*keys, last), abs=1e-7)
