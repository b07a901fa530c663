"""Facts asked of several variants in one reading: each answers as it would alone."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hippoformer import cli
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.evaluation.recall import evaluate_recall
from hippoformer.evaluation.recall_variants import evaluate_recall_variants
from hippoformer.model.loading import load_beside
from tiny_texts import documents, tiny_load

FAST = {"distances": (600, 1200), "facts": 1}
VARIANTS = {
    "as it is": {},
    "random": {"selection": "random"},
    "no replay, few": {"max_replay_rounds": 0, "buffer_size": 16},
}


@pytest.mark.slow
def test_each_variant_answers_as_it_would_alone() -> None:
    model, tokenizer = tiny_load(priority_threshold=0.0)
    texts = documents(1500, 900)
    together = evaluate_recall_variants(model, tokenizer, texts, VARIANTS, **FAST)
    kept = []
    for variant in together.variants:
        alone_model, _ = tiny_load(priority_threshold=0.0, **variant.options)
        alone = evaluate_recall(alone_model, tokenizer, texts, **FAST)
        assert len(alone.asked) == len(variant.asked) == 2 * 3 * 2
        for one, other in zip(alone.asked, variant.asked, strict=True):
            assert one.nats == pytest.approx(other.nats, abs=1e-3) and one.nats_off == pytest.approx(other.nats_off)
            assert (one.right, one.kept, one.position) == (other.right, other.kept, other.position)
        kept.append(sum(question.kept for question in variant.asked))
    assert len({round(question.nats, 3) for v in together.variants for question in v.asked[:1]}) == 3
    assert together.reference == "as it is" and together.variants[0].against is None
    assert together.variants[1].against is not None and set(together.variants[1].against) == {600, 1200}


@pytest.mark.slow
@pytest.mark.parametrize("marginals", [{}, {"marginal_weight": 0.75}], ids=["episodes", "and marginals"])
def test_hippocampi_of_other_layers_and_shapes_answer_as_they_would_alone(marginals: dict, tmp_path: Path) -> None:
    """Three hippocampi, one reading of their base; the second hears a layer that the first does not."""
    common = {"priority_threshold": 0.0, "residual_readout": False, **marginals}
    model, tokenizer = tiny_load(memory_layer=1, **common)
    others = {"last": {"memory_layer": -1, "recall_n_heads": 2}, "both": {"memory_layer": [2, 1], "buffer_size": 16}}
    trained = {}
    for seed, (name, options) in enumerate(others.items()):
        torch.manual_seed(seed)
        tiny_load(**common, **options)[0].save_pretrained(tmp_path / name)
        trained[name] = load_beside(model, tmp_path / name)
        assert trained[name].base is model.base
    texts, asked = documents(900), {"distances": (600,), "facts": 1}
    together = evaluate_recall_variants(model, tokenizer, texts, {"as it is": {}}, **asked, trained=trained)
    assert [variant.name for variant in together.variants] == ["as it is", "last", "both"]
    assert together.variants[1].options == {"trained": str(tmp_path / "last")}
    for variant, alone_model in zip(together.variants, [model, *trained.values()], strict=True):
        alone = evaluate_recall(alone_model, tokenizer, texts, **asked)
        for one, other in zip(alone.asked, variant.asked, strict=True):
            assert one.nats == pytest.approx(other.nats, abs=1e-3) and one.nats_off == pytest.approx(other.nats_off)
            assert (one.right, one.kept, one.position) == (other.right, other.kept, other.position)
    assert len({round(variant.asked[0].nats, 3) for variant in together.variants}) == 3


def test_hippocampi_that_cannot_share_a_reading_are_refused(tmp_path: Path) -> None:
    model, tokenizer = tiny_load()
    ask = partial(evaluate_recall_variants, model, tokenizer, documents(900), {"as it is": {}}, **FAST)
    other_base, _ = tiny_load()
    with pytest.raises(ConfigurationError, match="a base of its own"):
        ask(trained={"other": other_base})
    other_base.save_pretrained(tmp_path / "beside")
    with pytest.raises(ConfigurationError, match="two variants"):
        ask(trained={"as it is": load_beside(model, tmp_path / "beside")})
    with pytest.raises(ConfigurationError, match="another segment_len"):
        ask(trained={"other": load_beside(model, tmp_path / "beside", segment_len=model.config.segment_len // 2)})
    with pytest.raises(CheckpointError, match="is not a HippoFormer checkpoint"):
        load_beside(model, tmp_path)
    saved = json.loads((tmp_path / "beside" / "config.json").read_text())
    for change, said in (({"base_model_name": "another"}, "not on"), ({"use_lora": True}, "weights of the base")):
        (tmp_path / "beside" / "config.json").write_text(json.dumps(saved | change))
        with pytest.raises(ConfigurationError, match=said):
            load_beside(model, tmp_path / "beside")


def test_options_without_parameters_differ_too() -> None:
    model, tokenizer = tiny_load(priority_threshold=0.0)
    variants = {"all": {}, "one": {"recall_top_k": 1}, "longest": {"match_power": 0.0}}
    found = evaluate_recall_variants(model, tokenizer, documents(900), variants, distances=(600,), facts=1)
    nats = [[question.nats for question in variant.asked] for variant in found.variants]
    assert nats[0] != nats[1] != nats[2] != nats[0]
    assert model.hippocampus.recall.top_k == 0 and model.hippocampus.recall.match_power == 8.0


def test_differences_are_of_the_same_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variant that knows every answer, and one that knows none."""
    from hippoformer.evaluation import examination

    model, tokenizer = tiny_load()

    def knows(of, cache, needles):  # type: ignore[no-untyped-def]
        right = of.episodes_on and cache.config.selection == "fifo"
        return [(n.answer if right else [-1], 0.0) for n in needles]

    monkeypatch.setattr(examination, "answers", knows)
    report = evaluate_recall_variants(
        model, tokenizer, documents(1500, 900), {"none": {}, "all": {"selection": "fifo"}}, **FAST
    )
    none, everything = report.variants
    assert {i.estimate for i in none.right.values()} == {0.0}
    assert everything.against is not None and {i.estimate for i in everything.against.values()} == {1.0}
    assert everything.test is not None and everything.test.p is not None and everything.test.p < 0.01


def test_bad_variants_are_refused() -> None:
    model, tokenizer = tiny_load()
    for variants in ({}, {"a": {"window": 12}}, {"a": {"colour": "red"}}):
        with pytest.raises(ConfigurationError):
            evaluate_recall_variants(model, tokenizer, documents(900), variants, **FAST)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hippoformer

    monkeypatch.setattr(hippoformer, "load", tiny_load)
    (tmp_path / "text.txt").write_text(documents(1500)[0].text)
    output = tmp_path / "recall.json"
    arguments = ["eval", "recall-variants", "--model", "tiny", "--text", str(tmp_path / "text.txt"), "--facts", "1"]
    arguments += ["--distances", "600", "--variant", "as it is", "--variant", "fifo:selection=fifo"]
    tiny_load("tiny", memory_layer=1, residual_readout=False)[0].save_pretrained(tmp_path / "inner")
    arguments += ["--trained", f"inner={tmp_path / 'inner'}"]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    written = json.loads(output.read_text())
    assert [v["name"] for v in written["variants"]] == [
        "as it is",
        "fifo",
        "inner",
    ] and "600 tokens ago" in result.output
    assert written["variants"][1]["options"] == {"selection": "fifo"}
    for bad, said in ((["inner"], "expected NAME=FOLDER"), (["a=x", "--trained", "a=y"], "alike")):
        refused = CliRunner().invoke(cli.app, [*arguments[:-2], "--trained", *bad])
        assert refused.exit_code == 2 and said in refused.output
