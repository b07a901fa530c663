"""Key/value selection: nothing selected is the window, everything selected is the whole text, and who is kept is who
a slow count of attention says."""

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormer
from hippoformer.errors import ConfigurationError, UnsupportedArchitectureError
from hippoformer.evaluation.causality import check
from hippoformer.evaluation.kv_selection import SelectedKeys
from tiny import ROTARY, fresh, small_config, text, tiny_base

IDS = text(1, 61)[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt-neox"])
def test_nothing_selected_is_the_window(name: str) -> None:
    base = tiny_base(name)
    base.set_attn_implementation("eager")  # sdpa of transformers 5.3 leaves out Gemma 2's soft capping
    model = HippoFormer(fresh(name).config, base)
    with model.memory_off():
        expected = model.score(IDS.unsqueeze(0))[0]
    for method in ("h2o", "snapkv", "random"):
        selecting = SelectedKeys(model.base, model.config, method, 0)
        assert torch.allclose(selecting.scores(IDS), expected, atol=2e-4)
        logits = torch.log_softmax(selecting.logits(IDS, 5)[:-1], -1).gather(-1, IDS[1:, None]).squeeze(-1)
        assert torch.allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("method", ["h2o", "snapkv", "random"])
def test_everything_selected_is_the_whole_text(method: str) -> None:
    base = tiny_base()
    with torch.no_grad():
        expected = base(IDS.unsqueeze(0)).logits[0].log_softmax(-1)[:-1].gather(-1, IDS[1:, None]).squeeze(-1)
    scores = SelectedKeys(base, small_config(), method, 60).scores(IDS)
    assert torch.allclose(scores, expected, atol=1e-4)
    assert not torch.allclose(SelectedKeys(base, small_config(), method, 8).scores(IDS), expected, atol=1e-2)
    assert base.config._attn_implementation == "sdpa"


def listened(base: torch.nn.Module, selecting: SelectedKeys) -> list[tuple[int, int, Tensor]]:
    """(layer, tokens read before, attention (heads, queries, slots)) of every call, by hooks of the test's own."""
    found: list[tuple[int, int, Tensor]] = []
    for number, layer in enumerate(base.model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, output, number=number: found.append((number, selecting.done, output[1][0]))
        )
    return found


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_who_is_kept_is_who_was_looked_at(method: str) -> None:
    base, config, budget = tiny_base(), small_config(), 5
    selecting = SelectedKeys(base, config, method, budget)
    calls = listened(base, selecting)
    selecting.scores(IDS[:54])
    sinks, window, others = config.sink_tokens, config.window, set()
    for layer in range(2):
        for head in range(2):
            kept = list(range(sinks + budget))  # positions in the slots that stay visible, sinks first
            slots: list[int] = []
            mass: dict[int, float] = {}
            history: list[dict[int, float]] = []
            for number, done, weights in calls:
                if number != layer:
                    continue
                tokens = list(range(done, done + weights.shape[1]))
                slots = [*slots, *tokens]
                for query in range(len(tokens)):
                    votes = {p: float(weights[2 * head : 2 * head + 2, query, s].sum()) for s, p in enumerate(slots)}
                    history.append(votes)
                    for position, vote in votes.items():
                        mass[position] = mass.get(position, 0.0) + vote
                leave = max(0, len(slots) - sinks - budget - window)
                if leave:
                    contenders = slots[sinks : sinks + budget + leave]
                    if method == "h2o":
                        worth = mass
                    else:
                        means = []
                        for slot, p in enumerate(slots):
                            saw = [q for q in range(p, done + len(tokens)) if slot < sinks + budget or p > q - window]
                            saw = [q for q in saw if q >= done + len(tokens) - 38][-32:]
                            means.append(sum(history[q].get(p, 0.0) for q in saw) / max(1, len(saw)))
                        worth = {p: sum(means[max(0, i - 3) : i + 4]) for i, p in enumerate(slots)}
                    best = sorted(sorted(contenders, key=lambda p: -worth[p])[:budget])
                    slots = [*slots[:sinks], *best, *slots[sinks + budget + leave :]]
                    kept = slots[: sinks + budget]
            assert selecting.origin[layer, head, : sinks + budget].tolist() == kept
            others.add(tuple(kept))
    assert len(others) > 1, "heads choose for themselves"


def test_kept_keys_stand_at_their_new_positions() -> None:
    """The first layer's keys depend on token and position alone."""
    base = tiny_base()
    selecting = SelectedKeys(base, small_config(), "h2o", 5)
    selecting.scores(IDS[:54])
    used = 2 + 5 + 12
    for head in range(2):
        tokens = IDS[selecting.origin[0, head, :used]]
        cache = base(tokens.unsqueeze(0), use_cache=True).past_key_values
        assert torch.allclose(selecting.cache.layers[0].keys[0, head, :used], cache.layers[0].keys[0, head], atol=1e-5)


def test_state_is_bounded_and_the_past_alone_is_read() -> None:
    selecting = SelectedKeys(tiny_base(), small_config(), "h2o", 5)
    selecting.scores(IDS[:30])
    before = selecting.nbytes
    selecting.scores(text(1, 200)[0])
    assert selecting.nbytes == before and before[1] > 0
    for method in ("h2o", "snapkv", "random"):
        assert check(SelectedKeys(tiny_base(), small_config(), method, 5), IDS).future == 0.0


def test_what_cannot_be_selected() -> None:
    with pytest.raises(ConfigurationError, match="h2o, snapkv, random"):
        SelectedKeys(tiny_base(), small_config(), "lru", 5)
    with pytest.raises(UnsupportedArchitectureError, match="learned positions"):
        SelectedKeys(tiny_base("gpt2"), small_config(), "h2o", 5)
    with pytest.raises(ConfigurationError, match="positions"):
        SelectedKeys(tiny_base(), small_config(), "h2o", 500)
    assert "llama" in ROTARY
