"""Salience against credit: correlations that can be worked out by hand, and a protocol that leaves the model alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import hippoformer
from evaluation.__main__ import main
from evaluation.salience import run as salience
from hippoformer.errors import TextError
from hippoformer.training.credit import measure_credit
from hippoformer.training.readers import HiddenStateCache
from tiny_texts import documents, tiny_load


def test_what_a_rule_holds_of_the_credit() -> None:
    credit = np.array([0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 0.0])
    assert salience.held(credit, credit) == pytest.approx(0.7)  # two of twenty: 4 and 3 of 10
    assert salience.held(-credit, credit) == 0.0
    ranks = np.arange(20.0)
    spearman, pearson, _ = salience.compare(ranks, credit)
    assert spearman == pytest.approx(np.corrcoef(stats.rankdata(ranks), stats.rankdata(credit))[0, 1])
    assert pearson == pytest.approx(np.corrcoef(ranks, credit)[0, 1])


def test_rules_are_compared_on_the_same_transitions_and_the_model_is_left_alone() -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    before, gate = (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        model.hippocampus.salience_gate,
    )
    result = salience.run(model, tokenizer, documents(400, 300, 2), salience.Options())
    assert model.hippocampus.salience_gate is gate
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.details["documents"] == ["text 0", "text 1"], "a text too short for credit counts for nothing"
    values = {(row.condition, row.metric): row.value for row in result.rows}
    best = values["perfect forecast", salience.METRICS[2]]
    assert all(values[rule, salience.METRICS[2]] <= best for rule in salience.RULES)
    assert len({values[rule, salience.METRICS[0]] for rule in salience.RULES}) == 3
    with pytest.raises(TextError, match="earned credit"):
        salience.run(model, tokenizer, documents(20), salience.Options())


@torch.no_grad()
def test_the_figures_are_those_of_the_gate_on_the_credit_measured(tmp_path: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    (text,) = documents(400)
    ids = tokenizer(text.text, return_tensors="pt").input_ids
    written = model(ids, return_salience=True).salience_scores[0]
    (credit,) = measure_credit(model.hippocampus, [HiddenStateCache(model, [ids[0]], tmp_path)[0]])
    known = ~credit.isnan()
    result = salience.run(model, tokenizer, [text], salience.Options())
    expected = stats.spearmanr(written[known], credit[known]).statistic
    assert (result.rows[0].condition, result.rows[0].metric) == (salience.TRAINED, salience.METRICS[0])
    assert result.rows[0].value == pytest.approx(expected, abs=1e-3) and result.rows[0].low is None


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(residual_readout=False))
    (tmp_path / "text.txt").write_text(documents(300)[0].text)
    words = ["salience", "--model", "tiny", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "o.json")]
    assert main(words) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"][0]["evaluation"] == "salience"
