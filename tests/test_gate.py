"""The salience gate: what it hears, what its judgement decides, and which gradients reach what."""

import math

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormer
from hippoformer.hippocampus.episodes import importance
from hippoformer.hippocampus.salience import surprise_odds
from tiny import VOTES, awake, fresh, small_config, text


@torch.no_grad()
def test_importance_follows_salience() -> None:
    model = awake()
    out = model(text(rows=2, length=60), return_salience=True)
    salience, weight = out.salience_scores[:, 1:], out.importance_weights[:, 1:]
    tagged = salience > 0.5
    assert ((salience >= 0) & (salience <= 1)).all()
    assert (weight[~tagged] == 1.0).all()
    assert (weight[tagged][salience[tagged].argsort()].diff() >= 0).all(), "importance does not grow with salience"
    torch.testing.assert_close(weight[tagged], 2.0 + 3.0 * (2.0 * salience[tagged] - 1.0))
    ends = importance(torch.tensor([0.0, 0.5, 0.5 + 1e-6, 1.0]), small_config(importance_weight_range=(3.0, 30.0)))
    torch.testing.assert_close(ends, torch.tensor([1.0, 1.0, 3.0, 30.0]), rtol=0.0, atol=1e-3)


@torch.no_grad()
def test_an_episode_is_stored_with_what_was_reported() -> None:
    model, ids = awake(max_replay_rounds=0, capture_span=0), text(rows=1, length=30)
    cache = model.new_cache(1)
    out = model(ids, past_key_values=cache, return_salience=True)
    episodes = cache.episodes(0)
    assert len(episodes) > 20
    for episode in episodes:
        assert episode.token == int(ids[0, episode.position])
        assert episode.salience == pytest.approx(float(out.salience_scores[0, episode.position]))
        assert episode.priority == pytest.approx(float(out.importance_weights[0, episode.position]))
        assert ids[0, : episode.position + 1].tolist()[-len(episode.context) :] == list(episode.context)


@torch.no_grad()
def test_both_pathways_and_the_smoothing_are_heard() -> None:
    ids = text(rows=1, length=60)

    def salience(change=lambda gate: None) -> Tensor:
        model = awake()
        model.hippocampus.salience_gate.smoothing.copy_(torch.tensor([0.0, 1.0]))
        change(model.hippocampus.salience_gate)
        return model(ids, return_salience=True).salience_scores[0, 1:]

    plain = salience()
    for change in (
        lambda gate: gate.local_out.weight.mul_(0.5),
        lambda gate: gate.global_out.weight.mul_(5.0),
        lambda gate: gate.global_query.weight.mul_(5.0),
        lambda gate: gate.pathway_weight.add_(2.0),
        lambda gate: gate.smoothing.copy_(torch.tensor([0.5, 0.5])),
    ):
        assert (salience(change) - plain).abs().max() > 1e-3
    # By hand: the weighted mean with the logit before. In the first segment the global pathway sees the same episodes.
    logit = torch.logit(plain)
    smooth = torch.logit(salience(lambda gate: gate.smoothing.copy_(torch.tensor([0.25, 0.75]))))
    torch.testing.assert_close(smooth[1:5], 0.75 * logit[1:5] + 0.25 * logit[0:4], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_surprise_is_an_expert_whose_log_odds_add() -> None:
    model, ids = awake(), text(rows=1, length=20)
    assert fresh().hippocampus.salience_gate.surprise_weight == 1.0
    with model.memory_off():
        probability = model.score(ids).exp()[0]  # of tokens 1..19
    without = model(ids, return_salience=True).salience_scores[0, 1:]
    model.hippocampus.salience_gate.surprise_weight.fill_(0.5)
    with_it = model(ids, return_salience=True).salience_scores[0, 1:]
    odds = without / (1 - without) * ((1 - probability) / probability) ** 0.5
    torch.testing.assert_close(with_it, odds / (1 + odds))
    odds = surprise_odds(torch.tensor([0.0, 1e4]))
    assert torch.isfinite(odds).all() and odds[0] < -9 and odds[1] > 20


@torch.no_grad()
def test_credit_is_the_share_of_later_predictions() -> None:
    """A text that repeats: the episodes of the first time are owed the second, in nats of nobody else."""
    model = awake(buffer_size=64, decay_rate=1.0, replay_rate=0.0)
    ids, cache = text(rows=1, length=60), model.new_cache(1)
    model(ids, past_key_values=cache)
    credit = {e.position: e.credit for e in cache.episodes(0, stored_only=True)}
    assert min(credit.values()) >= 0 and sum(credit.values()) <= 60
    # Tokens 30-39 and 50-59 repeat 0-9 and 20-29: only episodes of those very tokens can have been right.
    repeated = {t for t in credit if int(ids[0, t]) in ids[0, t + 1 :].tolist()}
    assert all(credit[t] == 0 for t in credit if t not in repeated)
    assert sum(credit[t] for t in repeated) > 1.0


# ---------------------------------------------------------------- gradients


def without_dropout(**options: object) -> HippoFormer:
    model = awake(**options).train()
    model.hippocampus.fusion.dropout.p = 0.0
    return model


def gradients_of_lm_loss(model: HippoFormer) -> dict[str, float]:
    """Gradient norms of the next-token loss, on the last segment of a text that has long filled the store."""
    ids = text(rows=2, length=66)
    ids[:, -6:] = ids[:, -15:-9]  # a passage comes again, so that one memory leads to the next
    labels = torch.full_like(ids, -100)
    labels[:, -6:] = ids[:, -6:]
    cache = model.new_cache(2)
    model(ids, labels=labels, past_key_values=cache).loss.backward()
    assert (cache.memory.episodes.position[:, : model.config.buffer_size] >= 0).all(), "the store is not full"
    return {n: float(p.grad.norm()) for n, p in model.hippocampus.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [16, 0])
def test_the_next_token_loss_reaches_recall_and_fusion_and_never_the_gate(size: int) -> None:
    gradients = gradients_of_lm_loss(without_dropout(buffer_size=size))
    assert not any(norm for name, norm in gradients.items() if name.startswith("salience_gate"))
    for name in (
        "recall.key_proj.weight",
        "recall.value_proj.weight",
        "recall.query_proj.weight",
        "recall.null_proj.weight",
        "recall.log_scale",
        "recall.priority_weight",
        "recall.follow_gate.weight",
        "recall.match_weight",
        "fusion.gate_in.weight",
        "fusion.strength",
        "fusion.residual_scale",
        "fusion.residual_proj.weight",
    ):
        assert gradients.get(name, 0.0) > 1e-7 and math.isfinite(gradients[name]), f"no gradient reaches {name}"


def test_it_reaches_what_was_stored_long_ago() -> None:
    """Not only through the working episodes: the stored ones alone carry gradient to keys and values."""
    model = without_dropout()
    ids, cache = text(rows=1, length=66), model.new_cache(1)
    model(ids[:, :60], past_key_values=cache)
    stored = cache.memory.episodes
    stored.key.retain_grad(), stored.value.retain_grad()
    model(ids[:, 60:], labels=ids[:, 60:], past_key_values=cache).loss.backward()
    for tensor in (stored.key, stored.value):
        assert tensor.grad[:, : model.config.buffer_size].abs().sum() > 1e-7


def test_a_forecast_reaches_all_of_the_gate_and_a_fresh_global_pathway_is_silent() -> None:
    """Random words of its own would undo what the local pathway has been taught alone; it can learn to speak."""
    assert not fresh().hippocampus.salience_gate.global_out.weight.any()
    model = without_dropout(**VOTES)
    for step in model.stream(text(rows=1, length=30), [30], model.new_cache(1)):
        forecast = step.found.forecast
    forecast.sum().backward()
    for name, parameter in model.hippocampus.salience_gate.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 1e-7, name


def test_training_and_reading_compute_the_same() -> None:
    model, ids = without_dropout(), text(rows=2, length=60)
    training = model(ids).logits
    assert training.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(training.detach(), model.eval()(ids).logits, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_frozen_base_gets_no_gradient_and_its_adapters_do(lora: dict | None) -> None:
    model = awake(lora=lora).train()
    gradients_of_lm_loss(model)
    for name, parameter in model.base.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == ("lora_" in name), name
    trained = [*model.hippocampus.parameters(), *(p for n, p in model.base.named_parameters() if "lora_" in n)]
    assert model.get_num_trainable_params() == sum(p.numel() for p in trained) < model.get_num_total_params()
