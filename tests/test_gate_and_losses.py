"""The salience gate, what trains it, and what it decides."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from hippoformer import HippoFormer
from hippoformer.hippocampus.episodes import importance
from hippoformer.hippocampus.fusion import mix_distribution, mix_target
from hippoformer.hippocampus.salience import surprise_odds
from tiny import VOCAB, awake, fresh, small_config, text

# ---------------------------------------------------------------- importance


@torch.no_grad()
def test_importance_follows_salience() -> None:
    model = awake()
    out = model(text(rows=2, length=60), return_salience=True)
    salience, weight = out.salience_scores[:, 1:], out.importance_weights[:, 1:]
    tagged = salience > 0.5
    assert ((salience >= 0) & (salience <= 1)).all()
    assert (weight[~tagged] == 1.0).all(), "an untagged token has another weight than untagged_weight"
    assert ((weight[tagged] >= 2.0) & (weight[tagged] <= 5.0)).all()
    order = salience[tagged].argsort()
    assert (weight[tagged][order].diff() >= 0).all(), "importance does not grow with salience"
    torch.testing.assert_close(weight[tagged], 2.0 + 3.0 * (2.0 * salience[tagged] - 1.0))


@torch.no_grad()
def test_importance_options_are_used() -> None:
    options = {"untagged_weight": 0.25, "importance_weight_range": (3.0, 30.0)}
    weight = awake(**options)(text(rows=2, length=60), return_salience=True).importance_weights[:, 1:]
    assert set(weight[weight < 3.0].tolist()) == {0.25} and weight.max() > 10.0
    ends = importance(torch.tensor([0.0, 0.5, 0.5 + 1e-6, 1.0]), small_config(**options))
    torch.testing.assert_close(ends, torch.tensor([0.25, 0.25, 3.0, 30.0]), rtol=0.0, atol=1e-3)


@torch.no_grad()
def test_an_episode_is_stored_with_what_was_reported() -> None:
    model, ids = awake(max_replay_rounds=0, priority_threshold=0.0, capture_span=0), text(rows=1, length=30)
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
def test_salience_changes_the_logits() -> None:
    """At the beginning through the mass of an episode, later through what was kept at all."""
    ids = text(rows=2, length=60)
    low, high = awake(), awake()
    high.hippocampus.salience_gate.threshold.add_(1.0)
    one, two = low(ids, return_salience=True), high(ids, return_salience=True)
    assert (two.salience_scores < one.salience_scores)[:, 1:].all()
    assert (one.logits - two.logits).abs().amax(-1)[:, 20:].median() > 1e-3


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
    # Smoothing by hand: each logit is the weighted mean with the one before, nothing before the first.
    logit = torch.logit(plain)
    smooth = torch.logit(salience(lambda gate: gate.smoothing.copy_(torch.tensor([0.25, 0.75]))))
    # The global pathway looks at what was stored, keys and values, which smoothing does not change in the first
    # segment.
    expected = 0.75 * logit[1:5] + 0.25 * logit[0:4]
    torch.testing.assert_close(smooth[1:5], expected, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- the loss of forward


def test_the_loss_of_forward_is_the_mean_over_real_labels() -> None:
    model, ids = awake(), text(rows=2, length=40)
    mask = torch.ones_like(ids)
    mask[0, 30:], mask[1, :17] = 0, 0
    labels = ids.clone()
    labels[1, 20:25] = -100
    garbage = torch.where(mask == 1, labels, 5)  # under the mask a label means nothing
    with torch.no_grad():
        out = model(ids, attention_mask=mask, labels=garbage)
    total, count = 0.0, 0
    for row in range(2):
        real = [t for t in range(40) if mask[row, t]]
        for before, after in itertools.pairwise(real):
            if labels[row, after] != -100:
                total -= float(out.logits[row, before, labels[row, after]])
                count += 1
    assert count == 29 + 22 - 5
    assert float(out.loss) == pytest.approx(total / count, rel=1e-5)


# ---------------------------------------------------------------- gradients


def gradients_of_lm_loss(model: HippoFormer) -> dict[str, float]:
    """Gradient norms of the next-token loss alone, on the last segment of a text that has long filled the store."""
    model.train()
    ids = text(rows=2, length=66)
    ids[:, -6:] = ids[:, -15:-9]  # a passage comes again, so that one memory leads to the next
    labels = torch.full_like(ids, -100)
    labels[:, -6:] = ids[:, -6:]
    cache = model.new_cache(2)
    model(ids, labels=labels, past_key_values=cache).loss.backward()
    assert (cache.memory.episodes.position[:, : model.config.buffer_size] >= 0).all(), "the store is not full"
    return {n: float(p.grad.norm()) for n, p in model.hippocampus.named_parameters() if p.grad is not None}


def test_the_lm_loss_reaches_everything_with_a_full_store() -> None:
    gradients = gradients_of_lm_loss(awake(fusion_dropout=0.0))
    for name in (
        "salience_gate.local_in.weight",
        "salience_gate.local_out.weight",
        "salience_gate.global_query.weight",
        "salience_gate.global_out.weight",
        "salience_gate.pathway_weight",
        "salience_gate.smoothing",
        "salience_gate.threshold",
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


def test_without_a_store_the_lm_loss_reaches_recall() -> None:
    model = awake(fusion_dropout=0.0, buffer_size=0)
    assert gradients_of_lm_loss(model)["recall.key_proj.weight"] > 1e-7


def test_a_fresh_global_pathway_is_silent_and_can_learn_to_speak() -> None:
    """Random words of its own would undo what the local pathway has been taught alone."""
    gate = fresh().hippocampus.salience_gate
    assert not gate.global_out.weight.any() and not gate.global_out.bias.any()
    model = awake(fusion_dropout=0.0)
    with torch.no_grad():
        model.hippocampus.salience_gate.global_out.weight.zero_()
    assert gradients_of_lm_loss(model)["salience_gate.global_out.weight"] > 1e-7


def test_a_gate_that_learns_from_credit_only() -> None:
    """credit_only_gate shuts the next-token loss out of the gate and changes nothing else."""
    both = [awake(fusion_dropout=0.0, credit_only_gate=only) for only in (False, True)]
    with torch.no_grad():
        assert torch.equal(*(model(text(rows=1, length=60)).logits for model in both))
    gradients = gradients_of_lm_loss(both[1])
    assert not any(norm for name, norm in gradients.items() if name.startswith("salience_gate"))
    assert gradients["recall.key_proj.weight"] > 1e-7


def test_the_lm_loss_reaches_what_was_stored_long_ago() -> None:
    """Not only through the working episodes: the stored ones alone carry gradient to gate, keys and values."""
    model = awake(fusion_dropout=0.0).train()
    ids, cache = text(rows=1, length=66), model.new_cache(1)
    model(ids[:, :60], past_key_values=cache)
    for name, tensor in cache.memory.episodes.tensors().items():
        if name in ("key", "value", "priority"):
            tensor.retain_grad()
    stored = cache.memory.episodes
    model(ids[:, 60:], labels=ids[:, 60:], past_key_values=cache).loss.backward()
    for tensor in (stored.key, stored.value, stored.priority):
        assert tensor.grad[:, : model.config.buffer_size].abs().sum() > 1e-7


def test_competition_is_relaxed_for_the_gradient_alone() -> None:
    """The temperature changes what the gate learns, not what the model computes."""
    losses, gradients = [], []
    for temperature in (0.5, 4.0):
        model = awake(fusion_dropout=0.0, soft_topk_temperature=temperature)
        gradients.append(gradients_of_lm_loss(model)["salience_gate.local_out.weight"])
        with torch.no_grad():
            losses.append(model.eval()(text(rows=2, length=66)).logits)
    assert torch.equal(*losses)
    assert gradients[0] != pytest.approx(gradients[1], rel=1e-3)


def test_training_and_reading_compute_the_same() -> None:
    """With and without gradients, one set of numbers."""
    model, ids = awake(fusion_dropout=0.0), text(rows=2, length=60)
    with torch.no_grad():
        reading = model(ids).logits
    training = model.train()(ids).logits
    assert training.requires_grad
    torch.testing.assert_close(training.detach(), reading, rtol=0.0, atol=1e-4)


def test_a_frozen_base_gets_no_gradient() -> None:
    model = awake()
    gradients_of_lm_loss(model)
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    assert model.get_num_trainable_params() == sum(p.numel() for p in model.hippocampus.parameters())
    assert model.get_num_total_params() > model.get_num_trainable_params()


def test_adapters_get_gradient_and_the_base_under_them_none() -> None:
    model = awake(use_lora=True, lora_r=2, lora_dropout=0.0)
    gradients_of_lm_loss(model)
    for name, parameter in model.base.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


# ---------------------------------------------------------------- the two ways to fuse agree


def test_mixtures_by_hand() -> None:
    """p(v) = (1 - l (1 - nothing)) p_base(v) + l * votes(v), entry by entry."""
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.log_softmax(torch.randn(1, 2, 7, generator=generator), -1)
    attention = torch.softmax(torch.randn(1, 2, 5, generator=generator), -1)
    weights, nothing = attention[..., 1:], attention[..., 0]
    token, share = torch.tensor([[3, 3, 0, 6]], dtype=torch.int32), torch.tensor([[0.0, 0.7]])
    mixed = mix_distribution(log_probs, share, nothing, weights, token)
    assert torch.equal(mixed[0, 0], log_probs[0, 0]), "a mixture of weight 0 is not the base to the last bit"
    for query in range(2):
        for v in range(7):
            votes = sum(float(weights[0, query, e]) for e in range(4) if int(token[0, e]) == v)
            own = (1 - float(share[0, query]) * (1 - float(nothing[0, query]))) * float(log_probs[0, query, v].exp())
            expected = math.log(own + float(share[0, query]) * votes)
            assert float(mixed[0, query, v]) == pytest.approx(expected, abs=1e-5)
            single = mix_target(
                log_probs[:, query, v : v + 1],
                share[:, query : query + 1],
                nothing[:, query : query + 1],
                torch.tensor([[votes]]),
            )
            assert float(single) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- selection rules


@torch.no_grad()
def stored_positions(selection: str, length: int = 66, **options) -> tuple[set[int], HippoFormer, Tensor]:
    """What is in the store after a text, and what left the window of it: positions 1 .. length - 13."""
    model, ids = awake(selection=selection, **options), text(rows=1, length=length)
    cache = model.new_cache(1)
    model(ids, past_key_values=cache)
    return {e.position for e in cache.episodes(0, stored_only=True)}, model, ids


def test_first_in_first_out_keeps_the_last() -> None:
    stored, _, _ = stored_positions("fifo")
    assert stored == set(range(54 - 16, 54))


@torch.no_grad()
def test_surprise_keeps_the_least_expected() -> None:
    stored, model, ids = stored_positions("surprise", capture_span=0, decay_rate=1.0)
    with model.memory_off():
        surprise = -model.score(ids)[0]  # entry t - 1 for token t
    ranked = sorted(range(1, 54), key=lambda t: float(surprise[t - 1]), reverse=True)
    assert stored == set(ranked[:16])


def test_random_keeps_by_chance_alone() -> None:
    stored, _, _ = stored_positions("random")
    again, _, _ = stored_positions("random", salience_threshold_init=3.0)
    other, _, _ = stored_positions("random", seed=1)
    assert len(stored) == 16 and stored == again, "the draw depends on more than seed and position"
    assert stored != other and stored != set(range(54 - 16, 54))


@torch.no_grad()
def test_salience_keeps_the_most_salient() -> None:
    """Without decay and replay: the highest importance, the newer of equals."""
    options = {"max_replay_rounds": 0, "decay_rate": 1.0, "priority_threshold": 0.0, "capture_span": 0}
    stored, model, ids = stored_positions("salience", **options)
    weight = model(ids, return_salience=True).importance_weights[0]
    ranked = sorted(range(1, 54), key=lambda t: (float(weight[t]), t), reverse=True)
    assert stored == set(ranked[:16])


@torch.no_grad()
def test_credit_is_the_share_of_later_predictions() -> None:
    """A text that repeats: the episodes of the first time are owed the second, in nats of nobody else."""
    model = awake(buffer_size=64, max_replay_rounds=0, priority_threshold=0.0, decay_rate=1.0)
    ids = text(rows=1, length=60)
    cache = model.new_cache(1)
    model(ids, past_key_values=cache)
    credit = {e.position: e.credit for e in cache.episodes(0, stored_only=True)}
    assert min(credit.values()) >= 0 and sum(credit.values()) <= 60
    # Tokens 30-39 and 50-59 repeat 0-9 and 20-29: only episodes of those very tokens can have been right.
    repeated = {t for t in credit if int(ids[0, t]) in ids[0, t + 1 :].tolist()}
    assert all(credit[t] == 0 for t in credit if t not in repeated)
    assert sum(credit[t] for t in repeated) > 1.0
    assert len(ids.unique()) < VOCAB


@torch.no_grad()
def test_surprise_is_an_expert_whose_log_odds_add() -> None:
    model, ids = awake(), text(rows=1, length=20)
    with model.memory_off():
        probability = model.score(ids).exp()[0]  # of tokens 1..19
    without = model(ids, return_salience=True).salience_scores[0, 1:]
    model.hippocampus.salience_gate.surprise_weight.fill_(0.5)
    with_it = model(ids, return_salience=True).salience_scores[0, 1:]
    odds = without / (1 - without) * ((1 - probability) / probability) ** 0.5
    torch.testing.assert_close(with_it, odds / (1 + odds))


def test_certainty_and_impossibility_have_finite_odds() -> None:
    odds = surprise_odds(torch.tensor([0.0, 1e4]))
    assert torch.isfinite(odds).all() and odds[0] < -9 and odds[1] > 20
