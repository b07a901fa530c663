"""Variants: each is the model as if built with its options, and is compared document by document."""

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from evaluation.common.variants import VariantOptions, ablations, models, with_options
from evaluation.dynamics import run as dynamics
from evaluation.perplexity import run as perplexity
from evaluation.variants.run import Options, run
from hippoformer.errors import ConfigurationError, TextError
from tiny_texts import SEGMENT, documents, tiny_load


@pytest.mark.parametrize(
    "options",
    [
        {"window": 32},
        {"buffer_size": 16},
        {"window": 64, "buffer_size": 8},
        {"selection": "random"},
        {"max_replay_rounds": 0},
    ],
    ids=str,
)
def test_a_variant_is_the_model_as_if_built_with_its_options(options: dict[str, Any]) -> None:
    model, tokenizer = tiny_load()
    ids = tokenizer(documents(300)[0].text, return_tensors="pt").input_ids
    before = model.score(ids)
    variant, built = with_options(model, **options), tiny_load(**options)[0]
    built.load_state_dict(model.state_dict())
    assert torch.equal(variant.score(ids), built.score(ids)) and not torch.equal(variant.score(ids), before)
    assert torch.equal(model.score(ids), before), "the model itself stays as it is"
    assert variant.base is model.base


def test_rows_compare_in_pairs() -> None:
    model, tokenizer = tiny_load()
    texts = documents(300, 200, 260, 400, 1)
    options = Options(variant=["as it is", "random:selection=random", "small:buffer_size=8"])
    result = run(model, tokenizer, texts, options)
    found = {(row.condition, row.metric): row for row in result.rows}
    alone = perplexity.run(model, tokenizer, texts, perplexity.Options())
    assert {
        (row.metric, row.value) for row in alone.rows if (row.condition, row.metric) == ("memory", "perplexity")
    } == {("perplexity", found["as it is", "perplexity"].value)}
    against_off = next(row for row in alone.rows if row.metric == "against off, %")
    assert found["as it is", "against the base, %"].value == pytest.approx(against_off.value)
    assert found["small", "memory, bytes"].value < found["as it is", "memory, bytes"].value  # type: ignore[operator]
    assert ("as it is", "against as it is, %") not in found
    for name in ("random", "small"):
        row = found[name, "against as it is, %"]
        assert row.low is not None and row.high is not None and row.low <= row.value <= row.high and row.n == 4
    nats = {
        name: [n / t for n, t in zip(of, result.details["tokens"], strict=True)]
        for name, of in result.details["nll"].items()
    }
    p = [stats.wilcoxon(nats[name], nats["as it is"]).pvalue for name in ("random", "small")]
    holm = 2 * p[0] if p[0] <= p[1] else max(p[0], 2 * p[1])
    assert found["random", "p against as it is"].value == pytest.approx(min(1.0, holm))


def test_every_ablation_runs() -> None:
    model, tokenizer = tiny_load()
    result = run(model, tokenizer, documents(120, 100), Options())
    assert {row.condition for row in result.rows} == set(ablations(model.config))


def test_other_hippocampi_of_the_same_base_take_part(tmp_path: Path) -> None:
    model, _ = tiny_load("tiny")
    torch.manual_seed(1)
    tiny_load("tiny", buffer_size=16)[0].save_pretrained(tmp_path)
    options = VariantOptions(variant=["as it is"], trained=[f"other={tmp_path}"])
    (_, own), (name, other) = models(model, options)
    assert name == "other" and other.base is own.base is model.base and other.config.buffer_size == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": ["a:colour=red"]}, "colour cannot differ"),
        ({"variant": ["a:memory_layer=1"]}, "memory_layer cannot differ"),
        ({"variant": ["a:recall_head_dim=4"]}, "weights of the hippocampus"),
        ({"variant": ["a:selection"]}, "option=value"),
        ({"variant": ["a", "a"]}, "names that differ"),
        ({"variant": ["a"], "trained": ["a=folder"]}, "names that differ"),
        ({"variant": ["a"], "trained": ["inner"]}, "and folders"),
    ],
)
def test_what_one_hippocampus_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        list(models(tiny_load()[0], VariantOptions(**options)))


@torch.no_grad()
def test_the_memory_is_looked_at_after_every_segment() -> None:
    model, tokenizer = tiny_load()
    result = dynamics.run(model, tokenizer, documents(700, 420), dynamics.Options(limit_tokens=330))
    segments = result.details["segments"]
    assert result.details["title"] == "text 0" and [s["tokens"] for s in segments] == list(range(SEGMENT, 330, SEGMENT))
    ids = tokenizer(documents(700)[0].text, return_tensors="pt").input_ids[:, :330]
    cache, before = model.new_cache(1), set()
    for segment in segments:
        part = ids[:, segment["tokens"] - SEGMENT : segment["tokens"]]
        output = model(part, past_key_values=cache, return_memory_stats=True)
        stored = {episode.position for episode in cache.episodes(0, stored_only=True)}
        assert (segment["stored"], segment["written"]) == (len(stored), len(stored - before))
        assert segment["mean_priority"] == pytest.approx(output.memory_stats["mean_priority"], rel=1e-4)
        before = stored
    assert {int(episode["position"]) for episode in result.details["retained"]} == before
    written = next(row.value for row in result.rows if row.metric == "written, in all")
    assert written == sum(segment["written"] for segment in segments) > 0
    with pytest.raises(TextError, match="name a longer text"):
        dynamics.run(model, tokenizer, documents(SEGMENT - 1), dynamics.Options())
