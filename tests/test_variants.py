"""Variants over cached hidden states: the same numbers as reading everything together, compared in pairs."""

from pathlib import Path

import pytest
from scipy import stats
from typer.testing import CliRunner

from hippoformer import cli
from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation import evaluate_perplexity
from hippoformer.evaluation.variants import ablations, evaluate_variants
from tiny_texts import documents, tiny_load


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hidden_states")


@pytest.mark.parametrize("options", [{}, {"memory_layer": [1, -1], "residual_readout": False}])
def test_numbers_are_those_of_the_streaming_protocol(options: dict, cache: Path) -> None:
    model, tokenizer = tiny_load(**options)
    texts = documents(400, 150, 1)
    streamed = evaluate_perplexity(model, tokenizer, texts, conditions=("memory", "off"), resamples=100)
    report = evaluate_variants(model, tokenizer, texts, {"as it is": {}}, cache, resamples=100)
    assert report.tokens == [document.tokens_scored for document in streamed.documents]
    assert report.base_nll == pytest.approx([d.nll["off"] for d in streamed.documents], rel=1e-5)
    (as_it_is,) = report.variants
    assert as_it_is.nll == pytest.approx([d.nll["memory"] for d in streamed.documents], rel=1e-5)
    assert as_it_is.perplexity == pytest.approx(streamed["memory"].token_perplexity.estimate, rel=1e-5)
    assert as_it_is.memory_nbytes == streamed["memory"].memory_nbytes


def test_documents_side_by_side_are_scored_as_alone(cache: Path) -> None:
    """Rows that are done wait, one of them at the end of a segment, without sleeping again."""
    model, tokenizer = tiny_load()
    texts = documents(400, 160, 23, 2, 300)
    variants = {"salience": {}, "small": {"buffer_size": 8, "max_replay_rounds": 2}}
    alone, together = (evaluate_variants(model, tokenizer, texts, variants, cache, None, n, 0, 20) for n in (1, 5))
    assert alone.tokens == together.tokens and alone.documents == together.documents
    assert together.base_nll == pytest.approx(alone.base_nll, rel=1e-6)
    for one, other in zip(alone.variants, together.variants, strict=True):
        assert other.nll == pytest.approx(one.nll, rel=1e-5) and other.memory_nbytes == one.memory_nbytes


def test_variants_differ_and_leave_the_model_as_it_was(cache: Path) -> None:
    model, tokenizer = tiny_load()
    before = model.hippocampus.config
    variants = {"salience": {}, "random": {"selection": "random"}, "small": {"buffer_size": 8}}
    report = evaluate_variants(model, tokenizer, documents(400, 300), variants, cache, resamples=100)
    assert model.hippocampus.config is before
    by_name = {v.name: v for v in report.variants}
    assert by_name["salience"].against is None
    assert by_name["small"].memory_nbytes < by_name["salience"].memory_nbytes
    assert len({tuple(v.nll) for v in report.variants}) == 3
    for v in report.variants[1:]:
        ratios = v.against.document_ratios
        assert len(ratios) == 2 and v.against.ratio.low <= v.against.ratio.estimate <= v.against.ratio.high
        assert v.against.documents_better == sum(r < 1 for r in ratios)


def test_every_ablation_runs_and_without_recall_there_is_the_base(cache: Path) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    report = evaluate_variants(model, tokenizer, documents(200, 150, 120), ablations(model.config), cache, resamples=20)
    assert model.hippocampus.fusion.has_distribution
    by_name = {v.name: v for v in report.variants}
    assert by_name["no recall distribution"].nll == pytest.approx(report.base_nll)
    assert by_name["as it is"].nll != pytest.approx(report.base_nll)
    assert by_name["buffer 4096"].memory_nbytes > by_name["buffer 512"].memory_nbytes
    assert report.variants[0].test is None and report.variants[0].name == report.reference == "as it is"
    p = [v.test.p_corrected for v in report.variants[1:] if v.test.p is not None]
    assert p and all(0 < value <= 1 for value in p)
    nats = {v.name: [n / t for n, t in zip(v.nll, report.tokens, strict=True)] for v in report.variants}
    fifo = stats.wilcoxon(nats["selection: first in, first out"], nats["as it is"])
    assert by_name["selection: first in, first out"].test.p == pytest.approx(fifo.pvalue)


def test_an_ablation_changes_something() -> None:
    awake = HippoFormerConfig(max_replay_rounds=0, decay_rate=0.95, priority_threshold=0.0)
    asleep = HippoFormerConfig(max_replay_rounds=3, decay_rate=0.8, priority_threshold=0.5)
    found, other = ablations(awake), ablations(asleep)
    assert found["replay"] == {"max_replay_rounds": 10} and "no replay" not in found
    assert other["no replay"] == {"max_replay_rounds": 0} and "replay" not in other
    assert {"decay 0.95", "no forgetting"} & set(found) == set() and "decay 0.8" in found
    assert {"decay 0.95", "no forgetting"} <= set(other) and "decay 0.8" not in other
    assert "importance 1 to 3" not in ablations(HippoFormerConfig(importance_weight_range=(1.0, 3.0)))
    assert next(iter(found)) == next(iter(other)) == "as it is"


def test_what_needs_other_states_or_weights_is_refused(cache: Path) -> None:
    model, tokenizer = tiny_load()
    for wrong in ({"window": 20}, {"recall_n_heads": 1}, {"no_such_option": 1}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            evaluate_variants(model, tokenizer, documents(100), {"wrong": wrong}, cache)
    inner, tokenizer = tiny_load(memory_layer=1)
    with pytest.raises(ConfigurationError, match="residual at layer 1"):
        evaluate_variants(inner, tokenizer, documents(100), {"as it is": {}}, cache)
    with pytest.raises(ConfigurationError, match="at least one"):
        evaluate_variants(model, tokenizer, documents(100), {}, cache)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hippoformer

    monkeypatch.setattr(hippoformer, "load", tiny_load)
    (tmp_path / "text.txt").write_text(documents(300)[0].text)
    arguments = ["eval", "variants", "--model", "tiny", "--text", str(tmp_path / "text.txt"), "--variant", "as-is"]
    arguments += ["--variant", "short:buffer_size=4,max_replay_rounds=0", "--cache-dir", str(tmp_path / "states")]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / "variants.json")])
    assert result.exit_code == 0, result.output
    assert "short" in result.output and (tmp_path / "variants.json").is_file()
