"""`memory_layer`: with queries, keys and the residual at an inner layer the same invariants hold."""

import pytest
import torch

from test_causality import MOMENTS, with_other_future
from tiny import LAYERS, awake, fresh, read_in_chunks, text

CASES = [
    (name, layer)
    for name in ("llama", "gemma2", "gemma3", "gpt-neox", "cohere", "gpt2")
    for layer in range(1, LAYERS + 1)
]
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


@pytest.mark.parametrize(("name", "layer"), CASES)
@torch.no_grad()
def test_causal(name: str, layer: int) -> None:
    model, ids = awake(name, memory_layer=layer), text(rows=2, length=50)
    logits = model(ids).logits
    for moment in MOMENTS:
        other = model(with_other_future(ids, moment)).logits
        assert torch.equal(logits[:, : moment + 1], other[:, : moment + 1])


@pytest.mark.parametrize(("name", "layer"), CASES)
@torch.no_grad()
def test_chunks(name: str, layer: int) -> None:
    model, ids = awake(name, memory_layer=layer), text(rows=2, length=50)
    whole = model(ids).logits
    for size in (1, 7):
        torch.testing.assert_close(read_in_chunks(model, ids, size), whole, **TOLERANCE)
    expected = whole[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(model.score(ids), expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "layer"), CASES)
@torch.no_grad()
def test_memory_off_and_fresh_are_the_base(name: str, layer: int) -> None:
    model, ids = awake(name, memory_layer=layer), text(rows=2, length=50)
    at_the_end = awake(name)
    with model.memory_off(), at_the_end.memory_off():
        off = model(ids).logits
        assert torch.equal(off, at_the_end(ids).logits)
    assert torch.equal(fresh(name, memory_layer=layer)(ids).logits, off)
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
    expected = model.hippocampus.recall.encode_key(states[position - 1])
    torch.testing.assert_close(episodes.key[0, valid], expected, **TOLERANCE)


@torch.no_grad()
def test_layers_differ() -> None:
    """Each setting reads another layer: a setting without effect would give equal logits."""
    ids = text(rows=1, length=50)
    logits = [awake(memory_layer=layer)(ids).logits for layer in (-1, *range(1, LAYERS + 1))]
    for number, one in enumerate(logits):
        for other in logits[number + 1 :]:
            assert (one - other).abs().max() > 0.01
