"""The selection rule decides which episodes stay, and nothing else."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.errors import ConfigurationError, MemoryFileError
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.selection import RULES, Rule
from hippoformer.model.cache import HippoCache
from tiny import awake, fresh, read_in_chunks, text

OWN = "even positions"


@pytest.fixture(autouse=True)
def rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function and one entry is all that a new rule takes."""

    def score(episodes: Episodes, config: HippoFormerConfig) -> Tensor:
        return 1.0 - (episodes.position % 2).float()

    monkeypatch.setitem(RULES, OWN, Rule(score))


def reader(selection: str, **options: object) -> HippoFormer:
    """A model whose gate does not look at the store, which differs from rule to rule."""
    model = awake(selection=selection, **options)
    with torch.no_grad():
        model.hippocampus.salience_gate.global_out.weight.zero_()
    return model


def kept(selection: str, ids: Tensor) -> dict[int, dict[str, Tensor]]:
    """Position -> every field of the episodes that a rule keeps, after nine segment ends."""
    model = reader(selection, max_replay_rounds=0, priority_threshold=0.0, buffer_size=12, decay_rate=0.999)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    store = cache.memory.episodes.slots(0, 12)
    assert store.valid.all()
    fields = ("key", "value", "token", "salience", "priority", "age", "strength")
    return {
        int(position): {name: getattr(store, name)[0, slot] for name in fields}
        for slot, position in enumerate(store.position[0])
    }


def test_what_two_rules_keep_is_the_same_to_the_bit() -> None:
    ids = text(rows=1, length=60)
    stores = {selection: kept(selection, ids) for selection in RULES}
    shared = 0
    for one, other in combinations(stores, 2):
        assert stores[one].keys() != stores[other].keys(), f"{one} and {other} keep the same"
        for position in stores[one].keys() & stores[other].keys():
            shared += 1
            for name, value in stores[one][position].items():
                assert torch.equal(value, stores[other][position][name]), (one, other, position, name)
    assert shared > 20
    ages = {float(fields["age"]) for store in stores.values() for fields in store.values()}
    assert len(ages) > 3, "nothing aged"
    assert sorted(stores["fifo"]) == list(range(60 - 12 - 12, 60 - 12))
    assert all(position % 2 == 0 for position in stores[OWN])


@pytest.mark.parametrize("selection", [name for name in RULES if name != "salience"] + [OWN])
def test_where_all_fits_the_rule_changes_nothing(selection: str) -> None:
    """With replay, merging and forgetting at work."""
    ids = text(length=90)
    expected = read_in_chunks(awake(buffer_size=96), ids, 7)
    assert torch.equal(read_in_chunks(awake(buffer_size=96, selection=selection), ids, 7), expected)
    assert not torch.equal(read_in_chunks(awake(buffer_size=12, selection=selection), ids, 7), expected)


def test_an_unknown_rule_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"selection in \(salience, surprise, random, fifo, even positions\)"):
        fresh(selection="best")


def test_only_a_rule_that_reads_surprise_pays_for_it() -> None:
    sizes = {selection: awake(selection=selection).new_cache(1) for selection in RULES}
    assert sizes["fifo"].nbytes == sizes["salience"].nbytes == sizes[OWN].nbytes
    slots = sizes["salience"].memory.episodes.position.shape[1]
    assert sizes["surprise"].nbytes == sizes["salience"].nbytes + 4 * slots


def test_surprise_goes_into_the_memory_file(tmp_path: Path) -> None:
    model, ids = awake(selection="surprise"), text(rows=1)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.save(tmp_path / "surprise")
    again = HippoCache.load(tmp_path / "surprise", model)
    assert torch.equal(again.memory.episodes.surprise, cache.memory.episodes.surprise)
    assert cache.memory.episodes.surprise.count_nonzero() > 20
    gated = awake(selection="salience")
    HippoCache.load(tmp_path / "surprise", gated).save(tmp_path / "salience")
    with pytest.raises(MemoryFileError, match="selection='surprise'"):
        HippoCache.load(tmp_path / "salience", model)
    # A file of before the field was there.
    with safe_open(tmp_path / "salience", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["memory.surprise"]
    save_file(tensors, tmp_path / "older", metadata)
    assert HippoCache.load(tmp_path / "older", gated).lengths == cache.lengths
    with pytest.raises(MemoryFileError, match="selection='surprise'"):
        HippoCache.load(tmp_path / "older", model)


def test_surprise_is_one_minus_p_of_the_base() -> None:
    model, ids = fresh(selection="surprise", capture_span=0), text(rows=1, length=18)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        log_prob = model.score(ids)
    episodes = cache.memory.episodes
    found = episodes.surprise[episodes.valid].squeeze(-1)
    assert found.tolist() == pytest.approx((1 - log_prob[0].exp()).tolist(), abs=1e-6)
