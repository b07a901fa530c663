"""lm-evaluation-harness reads as we do: same streams, same numbers, nothing carried from one request to the next."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hippoformer import HippoFormer, evaluation
from hippoformer.cli import main
from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from tiny_texts import byte_tokenizer, text, tiny_load

pytest.importorskip("lm_eval")
# The harness and what it brings are not ours to keep free of warnings.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_offline")]

DOCUMENTS = [text(1, 401).strip(), text(2, 90).strip(), "x y", text(3, 700).strip()]


@pytest.fixture(scope="module")
def loaded() -> tuple[HippoFormer, Any]:
    model, tokenizer = tiny_load()
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.fill_(0.0)
    return model, tokenizer


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def load(loaded: tuple[HippoFormer, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[HippoFormer, Any]:
    """The tiny model instead of what `pretrained` names."""
    monkeypatch.setattr("hippoformer.lm_eval.load", lambda name, **options: loaded)
    return loaded


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def lm(**options: Any) -> Any:
    from lm_eval.api.registry import get_model

    import hippoformer.lm_eval  # noqa: F401, registers

    return get_model("hippoformer")(pretrained="tiny", device="cpu", **options)


def write_task(tmp_path: Path, task: str, field: str, records: list[str]) -> None:
    """A task `local` that reads its records from a file."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({field: record}) + "\n" for record in records))
    task += f"task: local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
    (tmp_path / "task.yaml").write_text(task, encoding="utf-8")


def test_plain_documents_equal_our_own_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a start token every token is scored, so the two count the same words and bytes."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, _ = tiny_load()
    tokenizer = byte_tokenizer(["<s>"], start="<s>", bos_token="<s>", eos_token="<s>", pad_token="<s>")
    monkeypatch.setattr("hippoformer.lm_eval.load", lambda name, **options: (model, tokenizer))
    task = "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    task += "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    write_task(tmp_path, task, "text", DOCUMENTS)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    options = {"model_args": "pretrained=tiny", "batch_size": 4, "device": "cpu", "bootstrap_iters": 0}
    found = simple_evaluate("hippoformer", tasks=["local"], task_manager=manager, **options)
    results = found["results"]["local"]
    documents = [Document(str(i), t, "test") for i, t in enumerate(DOCUMENTS)]
    scored = evaluation.measure(model, tokenizer, documents, evaluation.Options(["memory"]))["memory"]
    ours = evaluation.figures(scored)
    assert results["word_perplexity,none"] == pytest.approx(ours["word perplexity"], rel=1e-6)
    assert results["bits_per_byte,none"] == pytest.approx(ours["bits/byte"], rel=1e-6)
    assert found["config"]["condition"] == "memory" and found["config"]["model_name"] == "tiny"


@pytest.mark.parametrize("condition", ["memory", "off", "window-only"])
def test_rolling_is_one_stream_from_an_empty_memory(load: tuple[HippoFormer, Any], condition: str) -> None:
    model, tokenizer = load
    got = lm(condition=condition).loglikelihood_rolling(requests("loglikelihood_rolling", *[(d,) for d in DOCUMENTS]))
    for document, value in zip(DOCUMENTS, got, strict=True):
        ids = torch.tensor([tokenizer(document)["input_ids"]])
        cache = model.new_cache()
        if condition != "memory":
            cache.freeze_memory()
        with model.memory_off() if condition == "off" else torch.no_grad():
            expected = float(model.score(ids, past_key_values=cache).double().sum())
        assert value == pytest.approx(expected, rel=1e-5)
    other = lm(condition=condition).loglikelihood_rolling(requests("loglikelihood_rolling", (DOCUMENTS[3],)))
    assert other[0] == pytest.approx(got[3], rel=1e-5), "documents know of each other"


def test_a_prefix_token_lets_the_first_token_count(load: tuple[HippoFormer, Any]) -> None:
    model, tokenizer = load
    (got,) = lm(prefix_token_id=0).loglikelihood_rolling(requests("loglikelihood_rolling", (DOCUMENTS[1],)))
    ids = torch.tensor([[0, *tokenizer(DOCUMENTS[1])["input_ids"]]])
    assert got == pytest.approx(float(model.score(ids).double().sum()), rel=1e-5)


def test_loglikelihood_is_that_of_the_whole_text_from_an_empty_memory(load: tuple[HippoFormer, Any]) -> None:
    """Shared contexts, contexts far longer than the window, continuations of one token, several batches."""
    model, tokenizer = load
    long, short = DOCUMENTS[3], "ab"
    asked = [(long, "c"), (long, "de fg"), (short, "cab"), (long, "a" * 40), ("", "hello"), (short, "c")]
    got = lm(batch_size=2).loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(asked, got, strict=True):
        first = tokenizer(context)["input_ids"] if context else [0]
        ids = torch.tensor([first + tokenizer(continuation)["input_ids"]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, len(first) - 1 : -1]
        target = ids[0, len(first) :]
        assert value == pytest.approx(float(log_probs.gather(-1, target.unsqueeze(-1)).sum()), rel=1e-4)
        assert greedy == bool((log_probs.argmax(-1) == target).all())
    best = int(model(torch.tensor([tokenizer(short)["input_ids"]])).logits[0, -1].argmax())
    ((_, greedy),) = lm()._loglikelihood_tokens([(("", ""), tokenizer(short)["input_ids"], [best])], disable_tqdm=True)
    assert greedy


def test_generation_is_generate_and_stops(load: tuple[HippoFormer, Any]) -> None:
    """Prompts of different lengths side by side, one of them longer than the window."""
    model, tokenizer = load
    prompts = [DOCUMENTS[3], "abc", DOCUMENTS[0]]
    options = {"until": ["\0never"], "max_gen_toks": 12, "do_sample": False}
    got = lm(batch_size=3).generate_until(requests("generate_until", *[(p, options) for p in prompts]), True)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert answer == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    stop = {"until": [got[1][2]], "max_gen_toks": 12, "do_sample": False}
    (cut,) = lm().generate_until(requests("generate_until", (prompts[1], stop)), True)
    assert got[1].startswith(cut) and got[1][2] not in cut


def test_what_cannot_be_is_refused(
    load: tuple[HippoFormer, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong in ({"condition": "sometimes"}, {"batch_size": "auto"}, {"dtype": "float7"}):
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            lm(**wrong)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "--help"]) == 2 and "hippoformer[harness]" in capsys.readouterr().err
