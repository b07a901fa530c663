"""The gate's lessons: it learns what can be foreseen, from measured documents alone, the same way each time."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormer
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.training.foresight import teach_foresight
from hippoformer.training.hidden_states import HiddenStateCache
from tiny import untrained

WORTH = 7  # transitions into this token turn out to be useful, all others useless


def lesson(tmp_path: Path) -> tuple[HippoFormer, HiddenStateCache, dict[int, Tensor]]:
    model = untrained("llama", residual_readout=False)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 12, (length,), generator=generator) for length in (700, 300, 90)]
    states = HiddenStateCache(model, texts, tmp_path)
    useful = {number: (ids == WORTH).float() for number, ids in enumerate(texts[:2])}
    useful[0][:50] = torch.nan
    return model, states, useful


@torch.no_grad()
def tagged(model: HippoFormer, states: HiddenStateCache, number: int) -> tuple[float, float]:
    """Mean salience of useful and of useless transitions of a document."""
    read, hippocampus = states[number], model.hippocampus
    hidden = hippocampus.normed(read.hidden.float()).unsqueeze(0)
    logit = hippocampus.salience_gate.at_a_glance(hidden[:, :-1], hidden[:, 1:], -read.log_prob[None, 1:])[0]
    worth = read.tokens[1:] == WORTH
    return torch.sigmoid(logit[worth]).mean().item(), torch.sigmoid(logit[~worth]).mean().item()


def test_the_gate_learns_what_can_be_foreseen(tmp_path: Path) -> None:
    """Also in a document that was not measured; and nothing but the gate changes."""
    model, states, useful = lesson(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.hippocampus.state_dict().items()}
    first = teach_foresight(model.hippocampus, states, useful, passes=1, rate=1e-3, seed=0)
    last = teach_foresight(model.hippocampus, states, useful, passes=40, rate=1e-2, seed=0)
    assert last < first / 2
    useful_salience, useless_salience = tagged(model, states, 2)
    assert useful_salience > 2 * useless_salience
    changed = {n for n, tensor in model.hippocampus.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed and all(name.startswith("salience_gate.") for name in changed)


@torch.no_grad()
def test_the_target_share_is_tagged(tmp_path: Path) -> None:
    """However rarely anything is useful."""
    model, states, useful = lesson(tmp_path)
    with torch.enable_grad():
        teach_foresight(model.hippocampus, states, useful, passes=4, rate=1e-2, seed=0)
    gate, read = model.hippocampus.salience_gate, states[0]
    hidden = model.hippocampus.normed(read.hidden.float()).unsqueeze(0)
    forecast = gate.at_a_glance(hidden[:, :-1], hidden[:, 1:], -read.log_prob[None, 1:])
    share = (forecast > gate.tagging_threshold).float().mean().item()
    assert share == pytest.approx(model.config.target_tagged_share, abs=0.1)


def test_lessons_are_a_function_of_the_seed(tmp_path: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model, states, useful = lesson(tmp_path)
        torch.manual_seed(seed + len(weights))  # what else was drawn must not matter
        teach_foresight(model.hippocampus, states, useful, passes=2, rate=1e-2, seed=seed)
        weights.append(model.hippocampus.salience_gate.local_in.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_nothing_known_teaches_nothing(tmp_path: Path) -> None:
    model, states, useful = lesson(tmp_path)
    unknown = {number: torch.full_like(target, torch.nan) for number, target in useful.items()}
    before = model.hippocampus.salience_gate.local_in.weight.clone()
    for nothing in ({}, unknown):
        assert math.isnan(teach_foresight(model.hippocampus, states, nothing, passes=2, rate=1e-2, seed=0))
    assert torch.equal(model.hippocampus.salience_gate.local_in.weight, before)


@torch.no_grad()
def test_a_glance_is_the_gate_where_nothing_is_remembered() -> None:
    model = untrained("llama")
    gate = model.hippocampus.salience_gate
    gate.global_out.bias.zero_()
    generator = torch.Generator().manual_seed(0)
    width = model.hippocampus.width
    before, after = torch.randn(2, 1, 9, width, generator=generator)
    surprise = torch.rand(1, 9, generator=generator) * 8
    empty = Episodes.empty(1, model.config, torch.float32, "cpu")
    sees = torch.zeros(1, 9, empty.position.shape[1], dtype=torch.bool)
    recent = torch.zeros(1, model.config.salience_min_duration - 1)
    whole, _ = gate(before, after, surprise, empty, sees, recent)
    assert gate.at_a_glance(before, after, surprise)[0].tolist() == pytest.approx(whole[0].tolist(), abs=1e-6)
