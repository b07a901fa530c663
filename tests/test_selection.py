"""The selection rule decides which episodes stay, and nothing else."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hippoformer import HippoFormerConfig
from hippoformer.errors import MemoryFileError
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.selection import RULES, Rule
from hippoformer.model.cache import HippoCache
from tiny import awake, read_in_chunks, text

OWN = "even positions"


@pytest.fixture(autouse=True)
def rule_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One function and one entry is all that a new rule takes."""

    def score(episodes: Episodes, config: HippoFormerConfig) -> Tensor:
        return 1.0 - (episodes.position % 2).float()

    monkeypatch.setitem(RULES, OWN, Rule(score))


def kept(selection: str, ids: Tensor, **options: object) -> dict[int, dict[str, Tensor]]:
    """Position -> every field of the episodes that a rule keeps, after nine segment ends."""
    model = awake(selection=selection, **({"max_replay_rounds": 0, "buffer_size": 12, "decay_rate": 0.999} | options))
    with torch.no_grad():  # a gate that does not look at the store, which differs from rule to rule
        model.hippocampus.salience_gate.global_out.weight.zero_()
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    store = cache.memory.episodes.slots(0, model.config.buffer_size)
    assert store.valid.all()
    fields = ("key", "value", "token", "salience", "priority", "age")
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
    assert all(position % 2 == 0 for position in stores[OWN])


@pytest.mark.parametrize("selection", [name for name in RULES if name != "salience"] + [OWN])
def test_where_all_fits_the_rule_changes_nothing(selection: str) -> None:
    """With replay at work."""
    ids = text(length=90)
    expected = read_in_chunks(awake(buffer_size=96), ids, 7)
    assert torch.equal(read_in_chunks(awake(buffer_size=96, selection=selection), ids, 7), expected)
    assert not torch.equal(read_in_chunks(awake(buffer_size=12, selection=selection), ids, 7), expected)


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


@torch.no_grad()
def test_each_rule_keeps_what_its_name_says() -> None:
    """Of the 47 transitions that left the window; without capture, decay and replay."""
    ids, options = text(rows=1, length=60), {"capture_span": 0, "decay_rate": 1.0}
    model = awake(**options)
    model.hippocampus.salience_gate.global_out.weight.zero_()
    weight = model(ids, return_salience=True).importance_weights[0]
    with model.memory_off():
        log_prob = model.score(ids)[0]  # entry t - 1 for token t
    measures = {
        "salience": lambda t: (float(weight[t]), t),  # the newer of equals
        "surprise": lambda t: -float(log_prob[t - 1]),
        "fifo": lambda t: t,
    }
    for selection, measure in measures.items():
        assert sorted(kept(selection, ids, **options)) == sorted(sorted(range(1, 48), key=measure)[-12:]), selection
    drawn = kept("random", ids, **options).keys()
    assert drawn == kept("random", ids, **options, memory_layer=1, residual_readout=False).keys()
    assert drawn != kept("random", ids, **options, seed=1).keys() and drawn != set(range(36, 48))
    cache = awake(selection="surprise", **options).new_cache(1)
    cache.model(ids[:, :18], past_key_values=cache)
    found = cache.memory.episodes.surprise[cache.memory.episodes.valid].squeeze(-1)
    torch.testing.assert_close(found, 1 - log_prob[:17].exp(), rtol=0.0, atol=1e-5)
