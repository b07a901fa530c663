"""Whole training runs: they learn what they should, and continue after any interruption as if there had been none."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.model.weights import base_fingerprint
from hippoformer.train import main
from hippoformer.training import processes
from hippoformer.training.arguments import TrainArguments, config_options, parse
from hippoformer.training.trainer import Trainer
from tiny_training import SEGMENT, arguments, differing, history, small_base, texts

# How a run may train: the hippocampus on hidden states of a frozen base, with adapters, with the base's own weights.
WAYS = [
    pytest.param([], marks=pytest.mark.supports(trainer="frozen")),
    pytest.param(["--lora_r", "2"], marks=pytest.mark.supports(trainer="lora")),
    pytest.param(["--train_base"], marks=[pytest.mark.supports(trainer="base"), pytest.mark.slow]),
    pytest.param(["--lora_r", "2", "--memory_off"], marks=pytest.mark.slow),
]


def interrupted(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """A run that ends right after its first checkpoint."""
    save = Trainer._save

    def killed(self: Trainer) -> None:
        save(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "_save", killed)
        main(argv)


@pytest.mark.supports(precision="float32", mode="killed and resumed", architecture="llama")
@pytest.mark.parametrize("mode", WAYS)
def test_a_killed_run_resumes_to_the_same_weights(
    folder: Path, mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(folder, "whole", *mode)) == 0
    interrupted(monkeypatch, arguments(folder, "parts", *mode))
    assert main(arguments(folder, "parts", *mode, "--resume_from_checkpoint", "auto")) == 0
    assert differing(folder / "whole", folder / "parts") == []
    for file in (folder / "parts").rglob("*"):
        assert file.is_dir() or file.suffix in {".safetensors", ".json", ".md"}, "a pickle could run code"


def test_training_lowers_the_loss_and_leaves_a_frozen_base_alone(folder: Path) -> None:
    assert main(arguments(folder, "run", "--eval_text", str(folder / "text.txt"), "--eval_steps", "8")) == 0
    evaluation = [entry for entry in history(folder / "run") if "eval_perplexity" in entry]
    assert evaluation[-1]["eval_perplexity"] < evaluation[-1]["eval_base_perplexity"]
    model = HippoFormer.from_pretrained(folder / "run")
    assert base_fingerprint(model.base) == base_fingerprint(small_base())
    assert (folder / "run" / "README.md").is_file(), "a trained model has its card"
    assert json.loads((folder / "run" / "training_log.json").read_text())["arguments"]["max_steps"] == 8


def test_the_adapters_learn_at_a_tenth_of_the_rate_in_float32(folder: Path) -> None:
    """Steps of a tenth of 1e-4 would be lost in bfloat16's three digits."""
    argv = arguments(
        folder, "run", "--lora_r", "2", "--learning_rate", "1e-3", "--max_steps", "1", "--warmup_ratio", "0"
    )
    argv[argv.index("--dtype") + 1] = "bfloat16"
    assert main(argv) == 0
    saved = load_file(folder / "run" / "model.safetensors")
    adapters = {name: tensor for name, tensor in saved.items() if "lora_B" in name}  # zero before the first step
    assert all(tensor.dtype == torch.float32 for tensor in adapters.values())
    assert max(float(tensor.abs().max()) for tensor in adapters.values()) == pytest.approx(1e-4, rel=0.05)


def test_a_run_can_continue_from_a_saved_hippocampus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run that learns nothing ends with the weights of the first; another shape is refused."""
    first, short = folder / "first", ["--recall_share", "1.0", "--max_steps"]
    assert main(arguments(folder, "first", *short, "2")) == 0
    monkeypatch.setattr("hippoformer.train.shipped_hippocampus", {"the-short-name": first}.get)
    more = ["--hippocampus", "the-short-name", *short, "1", "--learning_rate", "1e-12"]
    assert main(arguments(folder, "second", *more)) == 0
    saved = [load_file(path / "model.safetensors") for path in (first, folder / "second")]
    for name, tensor in saved[0].items():
        if "anchor" not in name:
            torch.testing.assert_close(saved[1][name], tensor, rtol=0.0, atol=1e-6)
    with pytest.raises(CheckpointError, match="does not fit"):
        main([*arguments(folder, "third", *more), "recall_n_heads=8"])
    words = arguments(folder, "fourth", *more, "--seed", "5", "--decay_rate", "0.7")
    assert main(words[: words.index("--set")]) == 0, "shapes and segments are those of the first"
    continued, before = (json.loads((path / "config.json").read_text()) for path in (folder / "fourth", first))
    assert {name for name in before if continued[name] != before[name]} == {"decay_rate", "seed"}


def test_with_the_memory_off_the_base_learns_alone(folder: Path) -> None:
    """Its loss is the base's own; the hippocampus and its options are carried along to the last bit."""
    assert main(arguments(folder, "first", "--max_steps", "4", "--decay_rate", "0.7")) == 0
    short = ["--max_steps", "30", "--lora_r", "4", "--learning_rate", "0.05", "--logging_steps", "1"]
    words = arguments(folder, "alone", "--hippocampus", str(folder / "first"), "--memory_off", *short)
    assert main(words[: words.index("--set")]) == 0
    first, alone = (load_file(folder / name / "model.safetensors") for name in ("first", "alone"))
    assert [name for name in first if not torch.equal(first[name], alone[name])] == []
    assert any(tensor.any() for name, tensor in alone.items() if "lora_B" in name)
    config = HippoFormerConfig.from_pretrained(folder / "alone")
    assert config.decay_rate == 0.7 and config.segment_len == SEGMENT
    entries = history(folder / "alone")
    assert all(entry["perplexity"] == pytest.approx(entry["base_perplexity"]) for entry in entries)
    assert entries[-1]["perplexity"] < 0.9 * entries[0]["perplexity"] and "salience_mean" not in entries[0]


def test_the_gate_selects_after_the_recall_phase(tmp_path: Path) -> None:
    trainer = run_on_answers(tmp_path, texts(10), {}, recall_share=0.25, max_steps=8)
    found = []
    for trainer.step in range(3):
        with trainer._during_phase():
            found.append(trainer.model.hippocampus.config.selection)
    assert found == ["fifo", "fifo", "salience"]


# ---------------------------------------------------------------- questions


def run_on_answers(tmp_path: Path, documents: list[torch.Tensor], answers: dict[int, int], **more: object) -> Trainer:
    torch.manual_seed(0)
    sizes = {"window": 12, "segment_len": SEGMENT, "buffer_size": 16, "recall_head_dim": 8, "recall_value_dim": 8}
    config = HippoFormerConfig(**sizes, memory_layer=-1, unigram_weight=0.0, freeze_base=False)
    given = TrainArguments(
        output_dir=str(tmp_path), batch_size=len(documents), max_seq_length=SEGMENT, train_base=True, **more
    )
    return Trainer(HippoFormer(config, small_base()), given, documents, answers=answers)


def test_what_comes_before_an_answer_is_read_and_not_learned(tmp_path: Path) -> None:
    documents = texts(10, 10)
    trainer = run_on_answers(tmp_path, documents, {0: 8, 1: 8})
    order = trainer.schedule.documents
    first, second = (trainer._read()[1] for _ in range(2))
    assert (first["tokens"], first["learned"], first["perplexity"], first["loss_lm"]) == (10, 0, 0.0, 0.0)
    assert (second["tokens"], second["learned"]) == (8, 4)
    scored = trainer.model.eval().score(torch.stack([documents[number] for number in order]))
    assert second["perplexity"] == pytest.approx(-float(scored[:, 7:].sum()), rel=1e-4)
    assert second["loss_lm"] == pytest.approx(second["perplexity"] / 4, rel=1e-4)


def test_no_gradient_comes_from_before_the_answer(tmp_path: Path) -> None:
    documents = texts(6)
    trainer = run_on_answers(tmp_path, documents, {0: 4}, memory_off=True)
    with trainer._during_phase():
        trainer._read()[0].backward()
    embedding = trainer.model.base.model.embed_tokens.weight
    found, embedding.grad = embedding.grad, None
    trainer.model.zero_grad()
    log_prob = trainer.model.base(documents[0].unsqueeze(0)).logits[0].log_softmax(-1)
    (-(log_prob[3, documents[0][4]] + log_prob[4, documents[0][5]]) / 2).backward()
    assert torch.allclose(found, embedding.grad, atol=1e-5) and found.any()


def test_a_run_learns_the_answer(folder: Path) -> None:
    row = {"context": "the cat sat on the mat. " * 3, "question": "who sat", "answers": ["the cat", "cat"]}
    (folder / "asked.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    alone = ["--questions", str(folder / "asked.jsonl"), "--train_base", "--memory_off", "--learning_rate", "3e-2"]
    given = arguments(folder, "run", *alone, "--num_epochs", "8")
    for option in ("--text", "--max_steps"):
        del given[(where := given.index(option)) : where + 2]
    assert main(given) == 0
    with_answers = [entry["loss_lm"] for entry in history(folder / "run") if entry["perplexity"] != 1.0]
    assert with_answers[-1] < with_answers[0]
    with pytest.raises(ConfigurationError, match="no room"):
        main([*given[: given.index("--set")], "--max_document_tokens", "8", "--segment_len", "6"])


# ---------------------------------------------------------------- checkpoints


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, argv = folder / "run", arguments(folder, "run")
    interrupted(monkeypatch, argv)
    before = processes.complete(output)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="No space left"):
        patched.setattr("hippoformer.model.checkpoint.save_file", full)
        main([*argv, "--resume_from_checkpoint", "auto"])
    assert processes.complete(output) == before and processes.load(output)[2]["step"] == 3
    assert not list(output.glob(".*6*")), "half a checkpoint was left behind"


def test_a_half_written_checkpoint_is_not_a_checkpoint(folder: Path) -> None:
    assert main(arguments(folder, "run")) == 0
    broken = folder / "run" / "checkpoint-00000099"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\x00" * 10)
    assert processes.load(folder / "run")[2]["step"] == 8
    assert len(processes.complete(folder / "run")) == 2, "more than the two newest were kept"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        processes.load(broken)


# ---------------------------------------------------------------- arguments


def test_options_of_training_and_of_the_config() -> None:
    one = parse(["--text", "a", "--max_seq_length", "512", "--no_wandb", "--window", "64", "--memory_layer", "1", "-1"])
    other = parse(
        ["--text", "a", "--max-seq-length", "512", "--no-wandb", "--set", "window=64", "memory_layer=[1, -1]"]
    )
    assert one == other and one.max_seq_length == 512 and one.no_wandb
    assert config_options(one.set) == {"window": 64, "memory_layer": [1, -1]}
    assert config_options(["selection=fifo"]) == {"selection": "fifo"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--text"),
        (["--text", "a", "--dataset", "wikitext"], "--dataset"),
        (["--text", "a", "--max_steps", "3", "--num_epochs", "1"], "not both"),
        (["--text", "a", "--lora_r", "4", "--train_base"], "not both"),
        (["--text", "a", "--gradient_checkpointing"], "frozen"),
        (["--text", "a", "--memory_off"], "only the base"),
        (["--text", "a", "--set", "a=1"], "'a=1'"),
        (["--text", "a", "--windw", "3"], "--windw 3"),
        (["--text", "a", "--streaming"], "--streaming"),
        (["--dataset", "pile", "--streaming", "--num_epochs", "1"], "--streaming"),
        (["--dataset", "pile", "--streaming", "--planted_documents", "3"], "--streaming"),
        (["--dataset", "pile", "--streaming", "--questions", "babi-qa1"], "--streaming"),
    ],
)
def test_contradicting_options_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(argv)


def test_what_cannot_be_trained_is_said(folder: Path) -> None:
    with pytest.raises(TextError, match=r"missing\.txt"):
        main(["--base_model", str(folder / "base"), "--text", str(folder / "missing.txt")])
    refused = [(["--max-seq-length", "7"], "multiple of segment_len"), (["--report_to", "nosuch"], "nosuch")]
    refused += [] if torch.cuda.is_available() else [(["--mixed_precision", "fp16"], "float16")]
    for more, message in refused:
        with pytest.raises(ConfigurationError, match=message):
            main(arguments(folder, "run", *more))
        AcceleratorState._reset_state(reset_partial_state=True)
