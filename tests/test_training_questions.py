"""Training on questions: the text is read, the answer is learned."""

import json
from pathlib import Path

import pytest
import torch

from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.errors import ConfigurationError
from hippoformer.train import main
from hippoformer.training.arguments import parse
from hippoformer.training.trainer import Trainer, TrainingOptions
from tiny_training import arguments, folder, small_base, texts

__all__ = ["folder"]


def trainer(
    tmp_path: Path, documents: list[torch.Tensor], answers: dict[int, int], memory_off: bool = False, **options: object
) -> Trainer:
    torch.manual_seed(0)
    config = HippoFormerConfig(
        window=12, segment_len=6, buffer_size=16, recall_n_heads=4, recall_head_dim=8, recall_value_dim=8,
        salience_n_heads=2, n_anchors=8, anchor_len=4,
        **{"use_lora": True, "memory_layer": -1, "residual_readout": True, "marginal_weight": 0.0} | options,
    )  # fmt: skip
    made = TrainingOptions(
        tmp_path, max_steps=4, rows=len(documents), segments_per_step=1, credit_documents=0, memory_off=memory_off
    )
    return Trainer(HippoFormer(config, small_base()), made, documents, answers=answers)


def test_what_comes_before_an_answer_is_read_and_not_learned(tmp_path: Path) -> None:
    documents = texts(10, 10)
    of_answers = trainer(tmp_path / "a", documents, {0: 8, 1: 8}, fusion_dropout=0.0)
    order = of_answers.streams.documents  # which document each row reads
    first, second = (of_answers._read()[1] for _ in range(2))
    assert first["tokens"] == 10 and first["learned"] == 0 and first["nll"] == 0.0 and first["loss_lm"] == 0.0
    assert second["tokens"] == 8 and second["learned"] == 4
    of_answers.model.eval()
    scored = of_answers.model.score(torch.stack([documents[number] for number in order]))
    # Of a fresh hippocampus all that dropout could touch is closed; what the base foretells is the same either way.
    with of_answers.model.memory_off():
        alone = of_answers.model.score(torch.stack([documents[number] for number in order]))
    assert second["base_nll"] == pytest.approx(-float(alone[:, 7:].sum()), rel=1e-4)
    assert second["nll"] == pytest.approx(-float(scored[:, 7:].sum()), rel=1e-4)
    assert second["loss_lm"] == pytest.approx(second["nll"] / 4, rel=1e-4)


def test_no_gradient_comes_from_before_the_answer(tmp_path: Path) -> None:
    documents = texts(6)
    run = trainer(tmp_path, documents, {0: 4}, memory_off=True, freeze_base=False)
    with run._phase():
        run._read()[0].backward()
    embedding = run.model.base.model.embed_tokens.weight
    found, embedding.grad = embedding.grad, None
    run.model.zero_grad()
    log_prob = run.model.base(documents[0].unsqueeze(0)).logits[0].log_softmax(-1)
    (-(log_prob[3, documents[0][4]] + log_prob[4, documents[0][5]]) / 2).backward()
    assert torch.allclose(found, embedding.grad, atol=1e-5) and found.any()


def test_a_run_learns_the_answer(folder: Path) -> None:
    row = {"context": "the cat sat on the mat. " * 3, "question": "who sat", "answers": ["the cat", "cat"]}
    (folder / "asked.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    alone = ["--questions", str(folder / "asked.jsonl"), "--train_base", "--memory_off", "--learning_rate", "3e-2"]
    given = arguments(folder, "run", *alone)
    given[given.index("--max_steps") + 1] = "40"
    del given[(where := given.index("--text")) : where + 2]
    assert main(given) == 0
    log = json.loads((folder / "run" / "training_log.json").read_text(encoding="utf-8"))
    with_answers = [entry["loss_lm"] for entry in log["history"] if entry["perplexity"] != 1.0]
    assert with_answers[-1] < with_answers[0]
    assert log["arguments"]["questions"] == [str(folder / "asked.jsonl")]


def test_an_answer_must_fit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"context": "a text", "question": "what", "answers": ["this"]}
    (folder / "asked.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    more = ["--questions", str(folder / "asked.jsonl"), "--max_document_tokens", "8"]
    assert main(arguments(folder, "run", *more)) == 2
    assert "no room" in capsys.readouterr().err


def test_questions_need_texts_that_are_there() -> None:
    assert parse(["--questions", "babi-qa1"]).text == []
    with pytest.raises(ConfigurationError, match="--questions"):
        parse(["--dataset", "wikitext", "--streaming", "--questions", "babi-qa1", "--max_steps", "2"])
