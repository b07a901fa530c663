"""`memory_layer`: with queries, keys and the residual at an inner layer the same invariants hold."""

import pytest
import torch

from test_causality import MOMENTS, with_other_future
from tiny import LAYERS, awake, fresh, read_in_chunks, text

# Without the residual read-out recall waits for the base, and the surprise of a token is the base's own.
READ_OUTS = [{"residual_readout": True}, {"residual_readout": False}]
SEVERAL = {"memory_layer": [1, -1], "residual_readout": False}
CASES = [
    (name, layer)
    for name in ("llama", "gemma2", "gemma3", "gpt-neox", "cohere", "gpt2")
    for layer in range(1, LAYERS + 1)
]
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.parametrize("read_out", READ_OUTS)
@torch.no_grad()
def test_causal(name: str, layer: int, read_out: dict) -> None:
    model, ids = awake(name, memory_layer=layer, **read_out), text(rows=2, length=50)
    logits = model(ids).logits
    for moment in MOMENTS:
        other = model(with_other_future(ids, moment)).logits
        assert torch.equal(logits[:, : moment + 1], other[:, : moment + 1])


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.parametrize("read_out", READ_OUTS)
@torch.no_grad()
def test_chunks(name: str, layer: int, read_out: dict) -> None:
    model, ids = awake(name, memory_layer=layer, **read_out), text(rows=2, length=50)
    whole = model(ids).logits
    for size in (1, 7):
        torch.testing.assert_close(read_in_chunks(model, ids, size), whole, **TOLERANCE)
    expected = whole[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(model.score(ids), expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "layer"), CASES)
@pytest.mark.parametrize("read_out", READ_OUTS)
@torch.no_grad()
def test_memory_off_and_fresh_are_the_base(name: str, layer: int, read_out: dict) -> None:
    model, ids = awake(name, memory_layer=layer, **read_out), text(rows=2, length=50)
    at_the_end = awake(name, **read_out)
    with model.memory_off(), at_the_end.memory_off():
        off = model(ids).logits
        assert torch.equal(off, at_the_end(ids).logits)
    assert torch.equal(fresh(name, memory_layer=layer, **read_out)(ids).logits, off)
    assert (model(ids).logits - off).abs().max() > 0.1


@pytest.mark.parametrize("layer", range(1, LAYERS + 1))
@torch.no_grad()
def test_what_is_stored_never_depends_on_what_was_recalled(layer: int) -> None:
    """Episodes are made of hidden states that no recollection has touched in their own pass through the layer."""
    model, ids = awake(memory_layer=layer), text(rows=1, length=18)
    hidden: list[torch.Tensor] = []
    handle = model.window.layer(layer).register_forward_hook(
        lambda module, args, out: hidden.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    with model.memory_off():
        model(ids)
    handle.remove()
    cache = model.new_cache(1)
    model(ids, past_key_values=cache)
    states = torch.cat(hidden, dim=1)[0]
    episodes = cache.memory.episodes
    valid = episodes.valid[0]
    position = episodes.position[0, valid].long()
    expected = model.hippocampus.recall.encode_key(model.hippocampus.normed(states[position - 1]))
    torch.testing.assert_close(episodes.key[0, valid], expected, **TOLERANCE)


@torch.no_grad()
def test_layers_differ() -> None:
    """Each setting reads another layer: a setting without effect would give equal logits."""
    ids = text(rows=1, length=50)
    logits = [awake(memory_layer=layer)(ids).logits for layer in (-1, *range(1, LAYERS + 1))]
    for number, one in enumerate(logits):
        for other in logits[number + 1 :]:
            assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "gpt2"])
@torch.no_grad()
def test_several_layers_read_side_by_side(name: str) -> None:
    model, ids = awake(name, **SEVERAL), text(rows=2, length=50)
    whole = model(ids).logits
    torch.testing.assert_close(read_in_chunks(model, ids, 7), whole, **TOLERANCE)
    other = model(with_other_future(ids, 20)).logits
    assert torch.equal(whole[:, :21], other[:, :21])
    with model.memory_off():
        off = model(ids).logits
    assert torch.equal(fresh(name, **SEVERAL)(ids).logits, off)
    # Both layers are heard: each half of the query weights changes what is recalled.
    for half in (slice(0, 32), slice(32, 64)):
        deaf = awake(name, **SEVERAL)
        deaf.hippocampus.recall.query_proj.weight[:, half] = 0.0
        assert (deaf(ids).logits - whole).abs().max() > 1e-3


@pytest.mark.parametrize("layer", [1, [1, -1]])
@torch.no_grad()
def test_surprise_is_that_of_the_base_itself(layer: int | list[int]) -> None:
    """Without the residual read-out the gate hears how surprising a token was to the whole base."""
    model, ids = awake(memory_layer=layer, residual_readout=False, salience_surprise_weight=1.0), text(1, 40)
    heard: list[torch.Tensor] = []
    model.hippocampus.salience_gate.register_forward_pre_hook(lambda module, args: heard.append(args[2].clone()))
    with model.memory_off():
        expected = model.score(ids)
    model.score(ids)
    torch.testing.assert_close(-torch.cat(heard, dim=1)[:, 1:], expected, **TOLERANCE)


@torch.no_grad()
def test_keys_come_from_the_layers_named() -> None:
    """The keys are made of layer 1 and of the final state, each in its half."""
    model, ids = awake(**SEVERAL), text(rows=1, length=10)
    with model.window.tapped() as states:
        final = model.window.read(model.new_cache(1), ids[:, :6], [0], [6])
    read = states(final)
    assert torch.equal(read[..., 32:], final)
    assert torch.equal(read[..., :32], model.window.hidden_of(ids[:, :6])[..., :32])
    assert (read[..., :32] - final).abs().max() > 0.01
    cache = model.new_cache(1)
    model(ids[:, :6], past_key_values=cache)
    keys = cache.memory.episodes.key[0, cache.memory.episodes.valid[0]]
    torch.testing.assert_close(keys, model.hippocampus.recall.encode_key(model.hippocampus.normed(read[0, :5])))
