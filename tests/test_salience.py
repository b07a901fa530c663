"""Salience against credit: correlations that can be worked out by hand, and a protocol that leaves the model alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from hippoformer import cli
from hippoformer.evaluation import salience
from hippoformer.evaluation.salience import RULES, evaluate_salience
from hippoformer.training.credit import measure_credit, measure_credit_by_halves
from hippoformer.training.hidden_states import HiddenStateCache
from tiny_texts import documents, tiny_load


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hidden_states")


def test_what_a_rule_holds_of_the_credit() -> None:
    credit = np.array([0.0] * 15 + [1.0, 2.0, 3.0, 4.0, 0.0])
    assert salience._held(credit, credit) == pytest.approx(0.7)  # two of twenty: 4 and 3 of 10
    assert salience._held(-credit, credit) == 0.0
    ranks = np.arange(20.0)
    spearman, pearson, _ = salience._compared(ranks, credit)
    assert spearman == pytest.approx(stats.pearsonr(stats.rankdata(ranks), stats.rankdata(credit)).statistic)
    assert pearson == pytest.approx(np.corrcoef(ranks, credit)[0, 1])


def test_rules_are_compared_on_the_same_transitions_and_the_model_is_left_alone(cache: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    gate, texts = model.hippocampus.salience_gate, documents(400, 300, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = evaluate_salience(model, tokenizer, texts, cache, resamples=50)
    assert model.hippocampus.salience_gate is gate
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.documents == ["text 0", "text 1"], "a text too short for credit counts for nothing"
    assert tuple(r.rule for r in report.rules) == RULES
    assert all(-1 <= r.spearman.estimate <= 1 and r.held.estimate <= report.perfect.estimate for r in report.rules)
    assert len({r.spearman.estimate for r in report.rules}) == 3


@torch.no_grad()
def test_the_figures_are_those_of_the_gate_on_the_credit_measured(cache: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    (text,) = documents(400)
    ids = tokenizer(text.text, return_tensors="pt").input_ids
    written = model(ids, return_salience=True).salience_scores[0]
    states = HiddenStateCache(model, [ids[0]], cache)
    (credit,) = measure_credit(model.hippocampus, [states[0]])
    known = ~credit.isnan()
    report = evaluate_salience(model, tokenizer, [text], cache, resamples=50)
    expected = stats.spearmanr(written[known], credit[known]).statistic
    assert report.rules[0].spearman.estimate == pytest.approx(expected, abs=1e-3)
    assert report.transitions == int(known.sum()) and report.rules[0].spearman.low is None


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hippoformer

    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(residual_readout=False))
    (tmp_path / "text.txt").write_text(documents(300)[0].text)
    arguments = ["eval", "salience", "--model", "tiny", "--text", str(tmp_path / "text.txt")]
    arguments += ["--cache-dir", str(tmp_path / "states"), "--output", str(tmp_path / "salience.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "untrained gate" in result.output and (tmp_path / "salience.json").is_file()


def test_halves_of_credit_that_agree_set_no_limit_and_halves_that_do_not_forbid_everything() -> None:
    draws = np.random.default_rng(0)
    worth, chance = draws.normal(size=100_000), draws.normal(size=(2, 100_000))
    assert salience._ceiling(np.stack([worth, worth])) == pytest.approx([1.0])
    # Of each half's variance a third is worth: reliability of their sum 1/2, and no more than that can be foreseen.
    measured = worth + np.sqrt(2.0) * chance
    (most,) = salience._ceiling(measured)
    assert most == pytest.approx(np.sqrt(0.5), abs=0.01)
    assert most == pytest.approx(stats.pearsonr(worth, measured.sum(0)).statistic, abs=0.01)
    assert salience._ceiling(np.stack([worth, -worth])) == [0.0]
    assert salience._ceiling(np.zeros((2, 5))) == salience._ceiling(np.ones((2, 1))) == []


@torch.no_grad()
def test_halves_of_credit_are_what_every_second_segment_owes(cache: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    (text,) = documents(400)
    ids = tokenizer(text.text, return_tensors="pt").input_ids
    read = HiddenStateCache(model, [ids[0]], cache)[0]
    (credit,) = measure_credit(model.hippocampus, [read])
    halves = measure_credit_by_halves(model.hippocampus, read)
    assert torch.allclose(halves.sum(0), credit, atol=1e-4, equal_nan=True)
    assert (halves[:, ~credit.isnan()] >= 0).all() and (halves.nansum(1) > 0).all()
    # Cut after an odd number of segments, the last one of which only the first half can owe to.
    length, window = model.config.segment_len, model.config.window
    cuts = [length * (n + window // length) for n in (3, 4)]
    shorter, longer = (
        measure_credit_by_halves(model.hippocampus, HiddenStateCache(model, [ids[0, :cut]], cache)[0]) for cut in cuts
    )
    known = ~shorter.isnan().any(0)
    grown = [half[: cuts[0]][known] for half in longer]
    same = [torch.equal(now, before[known]) for now, before in zip(grown, shorter, strict=True)]
    assert sorted(same) == [False, True], "one more segment changed more than its own half, or nothing"
