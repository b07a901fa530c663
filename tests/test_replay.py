"""Replay keeps what is useful young and important, and lets the rest fade."""

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormerConfig
from hippoformer.hippocampus import replay
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.replay import consolidate
from tiny import awake, small_config, text

SIZE = 8


def store_of(config: HippoFormerConfig, same: tuple[int, int] | None = None, priority: float = 2.0) -> Episodes:
    """A full store of one row at positions 10, 20, ...; no key resembles another, except the two of `same`."""
    episodes = Episodes.empty(1, config, torch.float32, "cpu")
    keys = torch.eye(SIZE, config.recall_head_dim).repeat(1, config.recall_n_heads)
    if same is not None:
        keys[same[1]] = keys[same[0]]
    episodes.key[0, :SIZE] = keys
    episodes.token[0, :SIZE] = torch.arange(SIZE, dtype=torch.int32)
    episodes.position[0, :SIZE] = 10 * torch.arange(1, SIZE + 1, dtype=torch.int32)
    episodes.priority[0, :SIZE] = priority
    return episodes


@pytest.fixture
def cues(monkeypatch: pytest.MonkeyPatch):
    """Sets how many cues a round has."""
    return lambda number: monkeypatch.setattr(replay, "ROUND", number)


def options(**more: object) -> HippoFormerConfig:
    return small_config(**({"buffer_size": SIZE, "max_replay_rounds": 1, "decay_rate": 0.9} | more))


def end_segments(episodes: Episodes, config: HippoFormerConfig, segments: range, useful: int) -> Episodes:
    """Many segment ends, at which episode number `useful` has just earned credit."""
    for segment in segments:
        episodes.credit[0, useful] += 1.0
        episodes, _ = consolidate(episodes, torch.tensor([segment]), config)
    return episodes


@pytest.mark.parametrize("seed", range(5))
def test_a_useful_episode_stays_young_and_rises(seed: int, cues) -> None:
    """One draw a segment among eight: credit decides what is rehearsed."""
    cues(1)
    config = options(seed=seed)
    after = end_segments(store_of(config), config, range(1, 101), useful=3)
    others = [slot for slot in range(SIZE) if slot != 3]
    assert after.age[0, 3] < 20 and after.priority[0, 3] > 4.9
    assert after.age[0, 3] < after.age[0, others].mean(), "rehearsal chooses nothing"
    assert after.effective_priority(0.9)[0, 3] == after.effective_priority(0.9)[0, :SIZE].max()


def test_without_replay_everything_fades() -> None:
    config = options(max_replay_rounds=0)
    after = end_segments(store_of(config), config, range(1, 8), useful=3)
    torch.testing.assert_close(after.effective_priority(0.9)[0, :SIZE], torch.full((SIZE,), 2.0 * 0.9**7))
    assert after.credit[0, 3] == pytest.approx(sum(0.9**n for n in range(1, 8)))
    _, reactivated = consolidate(after, torch.tensor([8]), config)
    assert reactivated.tolist() == [0]


def test_a_reactivated_episode_is_young_and_nearer_to_the_top(cues) -> None:
    cues(1)
    config = options(replay_rate=0.25)
    before = store_of(config)
    before.age[0, :SIZE], before.credit[0, :SIZE] = 3.0, 10.0
    after, reactivated = consolidate(before.map(Tensor.clone), torch.tensor([1]), config)
    (chosen,) = (after.age[0, :SIZE] == 0).nonzero().flatten().tolist()
    assert reactivated.tolist() == [1]
    assert after.priority[0, chosen] == 2.0 + 0.25 * (5.0 - 2.0)
    others = [slot for slot in range(SIZE) if slot != chosen]
    assert (after.age[0, others] == 4.0).all() and (after.priority[0, others] == 2.0).all()


@pytest.mark.parametrize(("span", "young"), [(0, [3]), (1, [2, 3, 4]), (2, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_a_reactivation_takes_its_sequence_along_up_to_a_gap(
    span: int, young: list[int], cues, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots 1 to 4 are one sequence; 0 comes two tokens earlier, 5 and the rest much later."""
    cues(1)
    monkeypatch.setattr(replay, "SPAN", span)
    config = options(decay_rate=1.0)
    episodes = store_of(config)
    episodes.position[0, :SIZE] = torch.tensor([8, 10, 11, 12, 13, 40, 60, 61], dtype=torch.int32)
    episodes.credit[0, 3] = 1e6
    after, reactivated = consolidate(episodes, torch.tensor([1]), config)
    assert reactivated.tolist() == [1], "what is taken along is no cue"
    assert (after.age[0, :SIZE] == 0).nonzero().flatten().tolist() == young
    assert after.priority[0, 3] == 3.5, "it has proven itself"
    assert (after.priority[0, [0, 1, 2, 4, 5, 6, 7]] == 2.0).all(), "these have not"


def test_a_cue_reactivates_what_resembles_it(cues) -> None:
    """Slots 0 and 1 share a key: whichever is drawn takes the other along."""
    cues(1)
    config = options()
    episodes = store_of(config, same=(0, 1))
    episodes.credit[0, 0] = 1e6
    after, _ = consolidate(episodes, torch.tensor([1]), config)
    assert (after.age[0, :SIZE] == 0).nonzero().flatten().tolist() == [0, 1]


def test_what_is_reactivated_twice_rises_twice_and_only_as_far_as_it_is_proven(cues) -> None:
    """Slots 0 and 1 are both cues, and each reactivates the other; slot 7 never earned anything."""
    cues(4)
    config = options(max_replay_rounds=2, decay_rate=1.0)
    episodes = store_of(config, same=(0, 1))
    episodes.credit[0, :SIZE] = torch.tensor([2.0] * 6 + [0.5, 0.0])
    after, reactivated = consolidate(episodes, torch.tensor([1]), config)
    assert reactivated.tolist() == [8] and not after.age[0, :SIZE].any()
    assert after.priority[0, :SIZE].tolist() == [4.25, 4.25, 3.5, 3.5, 3.5, 3.5, 2.75, 2.0]


def test_draws_depend_on_the_row_the_segment_and_the_seed(cues) -> None:
    cues(2)
    config = options()
    one, other = store_of(config), store_of(config, priority=3.0)
    both = Episodes(**{name: torch.cat((tensor, one.tensors()[name])) for name, tensor in other.tensors().items()})
    alone, _ = consolidate(one, torch.tensor([5]), config)
    together, _ = consolidate(both, torch.tensor([2, 5]), config)
    assert all(torch.equal(tensor[0], together.tensors()[name][1]) for name, tensor in alone.tensors().items())

    def drawn(segment: int, seed: int) -> tuple[float, ...]:
        return tuple(consolidate(one, torch.tensor([segment]), options(seed=seed))[0].age[0, :SIZE].tolist())

    assert len({drawn(segment, 0) for segment in range(12)}) > 4, "every segment rehearses the same memories"
    assert len({drawn(5, seed) for seed in range(12)}) > 4, "the seed does not matter"


@torch.no_grad()
def test_replay_in_the_stream_is_reported_and_keeps_what_is_old() -> None:
    ids, oldest = text(rows=1, length=240), {}
    for rounds in (0, 2):
        model = awake(max_replay_rounds=rounds, decay_rate=0.8)
        cache = model.new_cache(1)
        stats = [
            model(part, past_key_values=cache, return_memory_stats=True).memory_stats for part in ids.split(6, dim=1)
        ]
        oldest[rounds] = min(e.position for e in cache.episodes(0, stored_only=True))
        assert (sum(s["reactivated"] for s in stats) > 0) == (rounds > 0)
    assert oldest[2] < oldest[0]
