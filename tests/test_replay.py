"""Replay keeps what is useful alive, lets the rest fade, and merges what is the same."""

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormerConfig
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.replay import consolidate
from tiny import awake, small_config, text


def store_of(config: HippoFormerConfig, keys: Tensor, priority: float = 2.0) -> Episodes:
    """A full store of one row: keys (M, K), every episode of its own token, at positions 10, 20, ..."""
    episodes = Episodes.empty(1, config, torch.float32, "cpu")
    size = config.buffer_size
    heads = torch.nn.functional.normalize(keys.unflatten(-1, (config.recall_n_heads, -1)), dim=-1)
    episodes.key[0, :size] = heads.flatten(-2)
    episodes.token[0, :size] = torch.arange(size, dtype=torch.int32)
    episodes.position[0, :size] = 10 * torch.arange(1, size + 1, dtype=torch.int32)
    episodes.priority[0, :size], episodes.strength[0, :size] = priority, 1.0
    return episodes


def orthogonal(config: HippoFormerConfig) -> Tensor:
    """(M, K): keys none of which resembles another, so that a cue awakens itself alone."""
    assert config.buffer_size <= config.recall_head_dim
    return torch.eye(config.buffer_size, config.recall_head_dim).repeat(1, config.recall_n_heads)


def sleep(episodes: Episodes, config: HippoFormerConfig, segments: range, useful: int | None = None) -> Episodes:
    """Many segment ends, at which memory number `useful` has just earned credit."""
    for segment in segments:
        if useful is not None:
            episodes.credit[0, useful] += 1.0
        episodes, _ = consolidate(episodes, torch.tensor([segment]), config)
    return episodes


def alive(episodes: Episodes) -> list[bool]:
    return (episodes.position[0, :8] >= 0).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_useful_memory_outlives_the_others(seed: int) -> None:
    """One draw a segment among eight: credit decides who is rehearsed, and rehearsal who stays."""
    config = small_config(
        buffer_size=8,
        max_replay_rounds=1,
        replay_batch=1,
        replay_rate=0.5,
        decay_rate=0.9,
        priority_threshold=1.0,
        seed=seed,
    )
    useful = sleep(store_of(config, orthogonal(config)), config, range(1, 101), useful=3)
    assert alive(useful)[3], "a memory that earned credit in every segment was forgotten"
    assert useful.age[0, 3] < 20 and useful.priority[0, 3] > 4.9
    assert sum(alive(useful)) < 8, "everything survives: rehearsal chooses nothing"


def test_without_replay_everything_fades() -> None:
    """P 2 decays by 0.9 a segment: 2 * 0.9^6 = 1.06 is above the threshold of 1, 2 * 0.9^7 = 0.96 is not."""
    config = small_config(buffer_size=8, max_replay_rounds=0, decay_rate=0.9, priority_threshold=1.0)
    episodes = sleep(store_of(config, orthogonal(config)), config, range(1, 7), useful=3)
    assert alive(episodes) == [True] * 8
    assert episodes.priority[0, 3] == 2.0 and episodes.age[0, 3] == 6.0
    episodes, report = consolidate(episodes, torch.tensor([7]), config)
    assert alive(episodes) == [False] * 8
    assert (int(report.reactivated), int(report.merged), int(report.forgotten)) == (0, 0, 8)


def test_enough_replay_keeps_everything_for_a_very_long_time() -> None:
    config = small_config(buffer_size=8, max_replay_rounds=2, replay_batch=4, decay_rate=0.9, priority_threshold=1.0)
    episodes = sleep(store_of(config, orthogonal(config)), config, range(1, 501))
    assert alive(episodes) == [True] * 8 and not episodes.age[0, :8].any()


def test_a_reactivated_memory_is_young_and_nearer_to_the_top() -> None:
    config = small_config(buffer_size=8, max_replay_rounds=1, replay_batch=1, replay_rate=0.25, priority_threshold=0.1)
    before = store_of(config, orthogonal(config))
    before.age[0, :8] = 3.0
    before.credit[0, :8] = 10.0
    after, report = consolidate(before.map(Tensor.clone), torch.tensor([1]), config)
    (chosen,) = (after.age[0, :8] == 0).nonzero().flatten().tolist()
    assert int(report.reactivated) == 1
    assert after.priority[0, chosen] == 2.0 + 0.25 * (5.0 - 2.0)
    others = [slot for slot in range(8) if slot != chosen]
    assert (after.age[0, others] == 4.0).all() and (after.priority[0, others] == 2.0).all()


def test_a_cue_awakens_what_resembles_it() -> None:
    """Slots 0 and 1 share a key but not a token: whichever is drawn takes the other along, and they stay two."""
    config = small_config(buffer_size=8, max_replay_rounds=1, replay_batch=1, priority_threshold=0.1)
    keys = orthogonal(config)
    keys[1] = keys[0]
    episodes = store_of(config, keys)
    episodes.credit[0, 0] = 1e6
    after, report = consolidate(episodes, torch.tensor([1]), config)
    assert (after.age[0, :8] == 0).nonzero().flatten().tolist() == [0, 1]
    assert int(report.merged) == 0 and alive(after) == [True] * 8


@pytest.mark.parametrize(("span", "young"), [(0, [3]), (1, [2, 3, 4]), (2, [1, 2, 3, 4]), (9, [1, 2, 3, 4])])
def test_a_reactivation_takes_its_story_along_up_to_a_gap(span: int, young: list[int]) -> None:
    """Slots 1 to 4 are one story; 0 comes two tokens earlier, 5 and the rest much later."""
    config = small_config(
        buffer_size=8,
        max_replay_rounds=1,
        replay_batch=1,
        replay_span=span,
        replay_rate=0.5,
        priority_threshold=0.1,
        decay_rate=1.0,
    )
    episodes = store_of(config, orthogonal(config))
    episodes.position[0, :8] = torch.tensor([8, 10, 11, 12, 13, 40, 60, 61], dtype=torch.int32)
    episodes.credit[0, 3] = 1e6
    after, report = consolidate(episodes, torch.tensor([1]), config)
    assert int(report.reactivated) == 1, "what is taken along is no cue"
    assert (after.age[0, :8] == 0).nonzero().flatten().tolist() == young
    assert after.priority[0, 3] == 3.5, "it has proven itself"
    assert (after.priority[0, [0, 1, 2, 4, 5, 6, 7]] == 2.0).all(), "these have not"


def test_what_is_reactivated_twice_rises_twice_and_only_as_far_as_it_is_proven() -> None:
    """Slots 0 and 1 are both cues, and each awakens the other; slot 7 never earned anything."""
    config = small_config(
        buffer_size=8, max_replay_rounds=2, replay_batch=4, replay_rate=0.5, priority_threshold=0.1, decay_rate=1.0
    )
    keys = orthogonal(config)
    keys[1] = keys[0]
    episodes = store_of(config, keys)
    episodes.credit[0, :8] = torch.tensor([2.0] * 6 + [0.5, 0.0])
    after, report = consolidate(episodes, torch.tensor([1]), config)
    assert int(report.reactivated) == 8 and not after.age[0, :8].any()
    assert after.priority[0, :8].tolist() == [4.25, 4.25, 3.5, 3.5, 3.5, 3.5, 2.75, 2.0]


def test_merging_adds_strength_and_credit_and_keeps_the_newer_key() -> None:
    config = small_config(
        buffer_size=8,
        max_replay_rounds=1,
        replay_batch=8,
        replay_rate=0.0,
        merge_threshold=0.95,
        priority_threshold=0.1,
    )
    keys = orthogonal(config)
    keys[5] = keys[2] + 0.05
    episodes = store_of(config, keys)
    episodes.token[0, 2] = episodes.token[0, 5]
    episodes.strength[0, 2], episodes.strength[0, 5] = 2.0, 3.0
    episodes.credit[0, 2], episodes.credit[0, 5] = 1.0, 0.5
    episodes.priority[0, 2] = 4.0
    newer = episodes.key[0, 5].clone()
    after, report = consolidate(episodes, torch.tensor([1]), config)
    assert int(report.merged) == 1 and int(report.forgotten) == 0
    assert alive(after) == [slot != 2 for slot in range(8)]
    assert after.strength[0, 5] == 5.0
    assert after.credit[0, 5] == pytest.approx(1.5 * config.decay_rate)
    assert after.priority[0, 5] == 4.0  # that of the more important
    assert torch.equal(after.key[0, 5], newer)


@pytest.mark.parametrize(("cosine", "same_token"), [(0.99, False), (0.90, True)])
def test_only_near_duplicates_of_one_token_merge(cosine: float, same_token: bool) -> None:
    config = small_config(
        buffer_size=8, max_replay_rounds=2, replay_batch=8, merge_threshold=0.95, priority_threshold=0.1
    )
    keys = orthogonal(config)
    keys[5] = cosine * keys[2] + (1 - cosine**2) ** 0.5 * keys[5]
    episodes = store_of(config, keys)
    if same_token:
        episodes.token[0, 2] = episodes.token[0, 5]
    _, report = consolidate(episodes, torch.tensor([1]), config)
    assert int(report.merged) == 0


@pytest.mark.parametrize(("neighbour", "merges"), [(1, False), (3, False), (4, True)])
def test_a_story_is_not_cut(neighbour: int, merges: bool) -> None:
    """Slot 2 would go into slot 5, but what led to it, or what followed it, is remembered too."""
    config = small_config(
        buffer_size=8, max_replay_rounds=2, replay_batch=8, merge_threshold=0.95, priority_threshold=0.1
    )
    keys = orthogonal(config)
    keys[5] = keys[2]
    episodes = store_of(config, keys)
    episodes.token[0, 2] = episodes.token[0, 5]
    episodes.position[0, :8] = torch.arange(8, dtype=torch.int32) * 10
    episodes.position[0, neighbour] = episodes.position[0, 2] + neighbour - 2
    _, report = consolidate(episodes, torch.tensor([1]), config)
    assert int(report.merged) == merges


def test_three_of_a_kind_become_one_without_losing_strength() -> None:
    config = small_config(
        buffer_size=8, max_replay_rounds=4, replay_batch=8, merge_threshold=0.95, priority_threshold=0.1
    )
    keys = orthogonal(config)
    keys[4], keys[7] = keys[1], keys[1]
    episodes = store_of(config, keys)
    episodes.token[0, [1, 4, 7]] = 7
    for segment in range(1, 5):
        episodes, _ = consolidate(episodes, torch.tensor([segment]), config)
    assert [slot for slot in (1, 4, 7) if alive(episodes)[slot]] == [7]
    assert episodes.strength[0, 7] == 3.0


def test_draws_depend_on_the_row_alone() -> None:
    """The same memory in another row, another batch, or with another seed."""
    config = small_config(buffer_size=8, max_replay_rounds=1, replay_batch=2, priority_threshold=0.1)
    one = store_of(config, orthogonal(config))
    other = store_of(config, orthogonal(config).flip(0), priority=3.0)
    both = Episodes(**{name: torch.cat((tensor, one.tensors()[name])) for name, tensor in other.tensors().items()})
    alone, _ = consolidate(one, torch.tensor([5]), config)
    together, _ = consolidate(both, torch.tensor([2, 5]), config)
    assert all(torch.equal(tensor[0], together.tensors()[name][1]) for name, tensor in alone.tensors().items())
    drawn = {tuple(consolidate(one, torch.tensor([s]), config)[0].age[0, :8].tolist()) for s in range(12)}
    assert len(drawn) > 4, "every segment rehearses the same memories"
    seeds = {
        tuple(
            consolidate(one, torch.tensor([5]), small_config(**{**vars_of(config), "seed": seed}))[0]
            .age[0, :8]
            .tolist()
        )
        for seed in range(12)
    }
    assert len(seeds) > 4, "the seed does not matter"


def vars_of(config: HippoFormerConfig) -> dict:
    return {
        name: getattr(config, name)
        for name in ("buffer_size", "max_replay_rounds", "replay_batch", "priority_threshold")
    }


@torch.no_grad()
def test_replay_in_the_stream_and_its_report() -> None:
    """Through the model: with replay old memories remain after 40 segments, without it none is older than the decay
    lets it.
    """
    ids = text(rows=1, length=240)
    oldest = {}
    for rounds in (0, 2):
        model = awake(max_replay_rounds=rounds, replay_batch=8, priority_threshold=1.0, decay_rate=0.8)
        cache = model.new_cache(1)
        stats = [
            model(part, past_key_values=cache, return_memory_stats=True).memory_stats for part in ids.split(6, dim=1)
        ]
        stored = cache.episodes(0, stored_only=True)
        oldest[rounds] = min(e.position for e in stored)
        assert all(e.priority * 0.8**e.age >= 1.0 for e in stored)
        assert (sum(s["reactivated"] for s in stats) > 0) == (rounds > 0)
        assert (sum(s["forgotten"] for s in stats) > 0) or rounds > 0
    # 5 * 0.8^7 is the last above 1: no episode is kept more than 8 segments after it left the window.
    assert oldest[0] > 240 - 12 - 8 * 6 - 6
    assert oldest[2] < oldest[0]
