"""What training minimises, term by term."""

import math

import numpy
import pytest
import torch
from torch import Tensor

from hippoformer import ConsolidationRScore, HippoFormerLoss
from tiny import small_config


def by_hand(log_prob, counted, salience, forecast, weight, nothing, useful, target_share: float) -> dict[str, float]:
    """Every term with a loop over tokens."""
    tokens = [(r, t) for r in range(len(counted)) for t in range(len(counted[0])) if counted[r][t]]
    sigmoid = {rt: 1 / (1 + math.exp(-forecast[rt[0]][rt[1]])) for rt in tokens}
    n = len(tokens)
    known = [(r, t) for r, t in tokens if not math.isnan(useful[r][t])]
    return {
        "lm": sum(-log_prob[r][t] for r, t in tokens) / n,
        "salience_weighted": sum(-log_prob[r][t] * weight[r][t] for r, t in tokens)
        / sum(weight[r][t] for r, t in tokens),
        "sparsity": max(0.0, sum(salience[r][t] for r, t in tokens) / n - target_share) ** 2,
        "memory_util": sum(nothing[r][t] for r, t in tokens) / n,
        "credit": -sum(
            useful[r][t] * math.log(sigmoid[r, t]) + (1 - useful[r][t]) * math.log(1 - sigmoid[r, t]) for r, t in known
        )
        / len(known),
    }


def loss_inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.rand(3, 7, generator=generator)

    counted = draw() > 0.3
    useful = torch.where(draw() > 0.4, draw(), torch.nan)
    return [-3 * draw(), counted, draw(), 4 * draw() - 1, 1 + 4 * draw(), draw(), useful]


def test_every_term_by_hand() -> None:
    inputs = loss_inputs()
    weights = {
        "lm_loss_weight": 1.3,
        "salience_weighted_loss_weight": 0.7,
        "sparsity_loss_weight": 0.2,
        "memory_util_loss_weight": 0.05,
        "credit_loss_weight": 0.9,
    }
    parts = HippoFormerLoss(small_config(target_tagged_share=0.25, **weights))(*inputs)
    expected = by_hand(*(tensor.tolist() for tensor in inputs), target_share=0.25)
    assert expected["sparsity"] > 0
    scalars = parts.scalars()
    for name, value in expected.items():
        assert scalars[name] == pytest.approx(value, rel=1e-4), name
    total = sum(value * weights[f"{name}_loss_weight"] for name, value in expected.items())
    assert scalars["total"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_padding_never_counts(garbage: float) -> None:
    """Whatever stands where nothing is counted: values and gradients stay as they are."""
    loss = HippoFormerLoss(small_config())
    inputs = loss_inputs()
    counted = inputs[1]
    results = []
    for fill in (0.0, garbage):
        own = [torch.where(counted, t, fill).requires_grad_() if i != 1 else t for i, t in enumerate(inputs)]
        parts = loss(*own)
        parts.total.backward()
        results.append((parts.scalars(), own[0].grad, own[3].grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2][counted], results[1][2][counted])
    assert not results[1][1][~counted].any() and not results[1][2][~counted].any()


def test_nothing_counted_is_no_loss() -> None:
    inputs = loss_inputs()
    inputs[1] = torch.zeros_like(inputs[1])
    parts = HippoFormerLoss(small_config())(*inputs)
    assert parts.scalars() == dict.fromkeys(parts.scalars(), 0.0)


def test_the_gate_cannot_lower_a_loss_by_looking_away() -> None:
    inputs = loss_inputs()
    weight = inputs[4].requires_grad_()
    inputs[0] = inputs[0].requires_grad_()
    HippoFormerLoss(small_config())(*inputs).total.backward()
    assert weight.grad is None and inputs[0].grad.abs().sum() > 0


def test_consolidation_r_is_pearsons() -> None:
    score, generator = ConsolidationRScore(), numpy.random.default_rng(0)
    assert math.isnan(score.compute())
    salience, quality = generator.random(300), generator.random(300)
    quality += 0.8 * salience
    counted = generator.random(300) > 0.2
    for part in numpy.array_split(numpy.arange(300), 4):
        part_counted = torch.tensor(counted[part])
        score.update(torch.tensor(salience[part]), torch.tensor(quality[part]), part_counted)
    assert score.compute() == pytest.approx(numpy.corrcoef(salience[counted], quality[counted])[0, 1], abs=1e-9)
    constant = ConsolidationRScore()
    constant.update(torch.ones(5), torch.rand(5), torch.ones(5, dtype=torch.bool))
    assert math.isnan(constant.compute())
