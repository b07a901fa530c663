"""The door of the hippocampus, `Hippocampus.read`: what it leaves alone, which layers it reads, and that it needs no
values.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hippoformer import HippoCache, HippoFormer
from hippoformer.hippocampus.fusion import mix_target
from hippoformer.hippocampus.hippocampus import BaseReading
from hippoformer.ops import piece
from tiny import LAYERS, VARIANTS, VOTES, after, awake, fresh, read_in_chunks, same_state, text

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@torch.no_grad()
def readings(model: HippoFormer, ids: Tensor, lengths: list[int]) -> list[BaseReading]:
    """What the base alone makes of a text, step by step."""
    with model.memory_off():
        return [
            BaseReading(piece(ids, step.start, step.new), step.hidden, step.prior_log_prob, step.start, step.new)
            for step in model.stream(ids, lengths, model.new_cache(len(ids)))
        ]


@torch.no_grad()
def test_two_memories_on_one_reading_are_as_each_alone() -> None:
    ids, lengths = text(rows=2, length=60), [60, 41]
    models = [awake(**VOTES), awake(**VOTES, buffer_size=8, selection="fifo", max_replay_rounds=0, seed=1)]
    states = [model.new_cache(2).memory for model in models]
    scores: list[list[Tensor]] = [[], []]
    for reading in readings(models[0], ids, lengths):
        given = reading.hidden.clone()
        for number, model in enumerate(models):
            found, states[number] = model.hippocampus.read(states[number], reading)
            fused = mix_target(reading.log_prob, found.prior_mixture, found.prior_nothing, found.hit)
            scores[number].append(fused[0])
        assert torch.equal(reading.hidden, given)
    mask = (torch.arange(60) < torch.tensor(lengths).unsqueeze(-1)).long()
    for model, state, score in zip(models, states, scores, strict=True):
        cache = model.new_cache(2)
        alone = model.score(ids, mask, past_key_values=cache)
        assert torch.equal(torch.cat(score)[1:], alone[0])
        assert not same_state(state.tensors(), cache.memory.tensors())
    assert not torch.allclose(torch.cat(scores[0]), torch.cat(scores[1]), atol=1e-3)


@pytest.mark.parametrize("value", [1e4, float("inf"), float("nan")])
@torch.no_grad()
def test_garbage_hidden_states_in_padding_stay_there(value: float) -> None:
    """Training hands over padded hidden states, whose padding may hold anything."""
    model, ids, lengths = awake(), text(rows=3, length=12), [12, 8, 12]
    before, last = readings(model, ids, lengths)

    def read(fill: float):
        dirty = replace(last, hidden=last.hidden.clone())
        dirty.hidden[1, 2:] = fill
        _, state = model.hippocampus.read(model.new_cache(3).memory, before)
        return model.hippocampus.read(state, dirty)

    clean, clean_state = read(0.0)
    dirty, dirty_state = read(value)
    assert last.new == [6, 2, 6] and not same_state(clean_state.tensors(), dirty_state.tensors())
    for row, n in enumerate(last.new):
        for mine, theirs in ((clean.salience, dirty.salience), (clean.mixture, dirty.mixture), (clean.hit, dirty.hit)):
            assert torch.equal(mine[row, :n], theirs[row, :n])
        assert torch.equal(clean.recollection.weights[row, :n], dirty.recollection.weights[row, :n])


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt-neox", "cohere", "gpt2"])
@pytest.mark.parametrize("option", ["inner layer", "last layer", "two layers"])
@torch.no_grad()
def test_memory_off_and_fresh_are_the_base_at_any_layer(name: str, option: str) -> None:
    options, ids = VARIANTS[option], text(rows=2, length=50)
    model, at_the_end = awake(name, **options), awake(name)
    with model.memory_off(), at_the_end.memory_off():
        off = model(ids).logits
        assert torch.equal(off, at_the_end(ids).logits)
    assert torch.equal(fresh(name, **options)(ids).logits, off)
    on = model(ids).logits
    assert (on - off).abs().max() > 0.1
    torch.testing.assert_close(read_in_chunks(model, ids, 7), on, **TOLERANCE)


@pytest.mark.parametrize("option", ["default", "inner layer", "last layer", "two layers"])
@torch.no_grad()
def test_what_is_stored_never_depends_on_what_was_recalled(option: str) -> None:
    """Keys are made of the base's own states, each layer's in its part, even where the residual changes the last."""
    model, ids = awake(**VARIANTS[option]), text(rows=1, length=18)
    cache = after(model, ids)
    states = torch.cat([reading.hidden for reading in readings(model, ids, [18])], dim=1)[0]
    torch.testing.assert_close(states[:12], model.window.hidden_of(ids[:, :12])[0], **TOLERANCE)
    if option == "two layers":
        first, last = (awake(**VOTES, memory_layer=layer) for layer in (1, -1))
        parts = [torch.cat([r.hidden for r in readings(one, ids, [18])], dim=1)[0] for one in (first, last)]
        assert torch.equal(states, torch.cat(parts, dim=-1)) and not torch.allclose(*parts, atol=0.01)
    episodes = cache.memory.episodes
    position = episodes.position[0, episodes.valid[0]].long()
    expected = model.hippocampus.recall.encode_key(model.hippocampus.normed(states[position - 1]))
    torch.testing.assert_close(episodes.key[0, episodes.valid[0]], expected, **TOLERANCE)


@torch.no_grad()
def test_layers_differ_and_each_of_several_is_heard() -> None:
    ids = text(rows=1, length=50)
    final, inner, last = (awake(**VOTES, memory_layer=layer)(ids).logits for layer in (-1, 1, LAYERS))
    assert min((inner - final).abs().max(), (inner - last).abs().max()) > 0.01
    whole = awake(**VARIANTS["two layers"])(ids).logits
    for half in (slice(0, 32), slice(32, 64)):
        deaf = awake(**VARIANTS["two layers"])
        deaf.hippocampus.recall.query_proj.weight[:, half] = 0.0
        assert (deaf(ids).logits - whole).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["inner layer", "two layers"])
@torch.no_grad()
def test_surprise_is_that_of_the_base_itself(option: str) -> None:
    model, ids = awake(**VARIANTS[option]), text(1, 40)
    heard: list[Tensor] = []
    model.hippocampus.salience_gate.register_forward_pre_hook(lambda module, args: heard.append(args[2].clone()))
    with model.memory_off():
        expected = model.score(ids)
    model.score(ids)
    torch.testing.assert_close(-torch.cat(heard, dim=1)[:, 1:], expected, **TOLERANCE)


# ---------------------------------------------------------------- no values


@torch.no_grad()
def test_without_values_the_state_is_smaller_by_them_and_everything_else_goes_on(tmp_path: Path) -> None:
    with_, without = awake(**VOTES), awake(**VARIANTS["no values"])
    assert not [name for name, _ in without.hippocampus.named_parameters() if "value" in name or "global" in name]
    ids, caches = text(rows=2, length=60), [model.new_cache(2) for model in (with_, without)]
    logits = [model(ids, past_key_values=cache).logits for model, cache in zip((with_, without), caches, strict=True)]
    slots = caches[0].memory.episodes.position.shape[1]
    assert caches[0].memory_nbytes - caches[1].memory_nbytes == 2 * slots * with_.config.recall_value_dim * 4
    with without.memory_off():
        assert (logits[1] - without(ids).logits).abs().amax(-1).median() > 0.1, "nothing is recalled"
    caches[1].save(tmp_path / "memory.safetensors")
    loaded = HippoCache.load(tmp_path / "memory.safetensors", without)
    assert not same_state(loaded.tensors(), caches[1].tensors())
    without.hippocampus.recall.key_proj.weight[:8] *= -1.0  # another code, to which loading maps the keys
    turned = HippoCache.load(tmp_path / "memory.safetensors", without)
    assert turned.drift["calibrated"] and not torch.equal(turned.memory.episodes.key, loaded.memory.episodes.key)
    without.save_pretrained(tmp_path / "model")
    again = HippoFormer.from_pretrained(tmp_path / "model", base_model=without.base)
    assert torch.equal(again(ids).logits, without(ids).logits)
