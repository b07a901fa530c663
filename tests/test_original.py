"""Checkpoints of the original research code, built here to its layout: what carries over, what is refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from evaluation.original.__main__ import import_original, main, read_original
from hippoformer import HippoFormer
from hippoformer.errors import CheckpointError, ConfigurationError
from tiny import text, tiny_base
from tiny_texts import tiny_load

# peft's own wrapper, with which the original made its files, asks transformers for an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

M = 24
LORA = LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"])
SMALL: dict[str, Any] = {"window": 12, "segment_len": 6, "unigram_weight": 0.0}


def modules(d: int) -> dict[str, Tensor]:
    """The tensors around the base."""

    gate = {"threshold": (), "importance_lo": (), "importance_hi": (), "global_query.weight": (d, d)}
    memory = {"keys": (M, d), "values": (M, d), "priorities": (M,), "total_writes": ()}
    fusion = {"gate.0.bias": (d,), "norm.bias": (d,), "cross_attn.in_proj_weight": (3 * d, d)}
    parts = {
        "salience_gate": gate,
        "memory_consolidator": memory,
        "drift_calibrator": {"affine_A": (d, d), "anchors": (6, d)},
        "output_fusion": fusion,
    }
    made = {f"{part}.{name}": torch.randn(shape) for part, of in parts.items() for name, shape in of.items()}
    return made | {f"salience_gate.importance_{end}": torch.tensor(of) for end, of in (("lo", 2.5), ("hi", 4.0))}


def original_state(base: PreTrainedModel, lora: bool = False, d: int = 32) -> dict[str, Tensor]:
    """What `model.state_dict()` of the original gives; `base` may be changed."""
    torch.manual_seed(0)
    head = base.get_output_embeddings().weight.detach().clone()
    wrapped: Any = base
    if lora:
        wrapped = get_peft_model(base, LORA)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.data.normal_()
    state = {f"base_model.{name}": tensor.clone() for name, tensor in wrapped.state_dict().items()}
    return state | modules(d) | {"lm_head.weight": head}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.pt"


def write(file: Path, state: dict[str, Any], **more: Any) -> Path:
    torch.save({"model_state_dict": state, **more}, file)
    return file


@torch.no_grad()
def test_a_checkpoint_with_lora(file: Path, tmp_path: Path) -> None:
    """The imported model with memory off is the base with that LoRA; rank and layers are read off the tensors."""
    state, ids = original_state(tiny_base(), lora=True), text(rows=2, length=11)
    theirs = get_peft_model(tiny_base(), LORA).eval()
    theirs.load_state_dict({n.removeprefix("base_model."): t for n, t in state.items() if n.startswith("base_model.")})
    expected = torch.log_softmax(theirs(ids).logits, dim=-1)
    assert (expected - torch.log_softmax(tiny_base()(ids).logits, dim=-1)).abs().max() > 0.1
    model, lines = import_original(read_original(write(file, state)), tiny_base(), "tiny", lora_alpha=7, **SMALL)
    model.hippocampus.fusion.strength.zero_()  # a hippocampus that was not imported is untrained
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.0, atol=1e-4)
    assert model.config.buffer_size == M and model.config.importance_weight_range == [2.5, 4.0]
    assert any("rank 5 on q_proj, v_proj; alpha 7" in line for line in lines)
    assert any(line.startswith("memory_consolidator.*: 4 tensors not imported") for line in lines)
    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "base").exists()
    again = HippoFormer.from_pretrained(tmp_path / "out", base_model=tiny_base())
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_checkpoint_of_a_training_run_without_lora(file: Path) -> None:
    state, ids = original_state(tiny_base()), text(rows=1, length=11)
    state = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    state["salience_gate.importance_lo"] = torch.tensor(9.0)  # above importance_hi
    original = read_original(write(file, state, optimizer_state_dict=optimizer, epoch=1, global_step=7))
    model, lines = import_original(original, tiny_base(), "tiny", **SMALL)
    model.hippocampus.fusion.strength.zero_()
    assert model.config.freeze_base and lines[0].startswith("base: 0 of")
    assert model.config.importance_weight_range == [2.0, 5.0]
    expected = torch.log_softmax(tiny_base()(ids).logits, dim=-1)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.0, atol=1e-4)


@torch.no_grad()
def test_a_trained_base_comes_along(file: Path, tmp_path: Path) -> None:
    changed, ids = tiny_base(), text(rows=1, length=11)
    for parameter in changed.parameters():
        parameter.mul_(1.1)
    expected = torch.log_softmax(changed(ids).logits, dim=-1)
    model, lines = import_original(read_original(write(file, original_state(changed))), tiny_base(), "tiny", **SMALL)
    assert "stored" in lines[0]
    model.hippocampus.fusion.strength.zero_()
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(HippoFormer.from_pretrained(tmp_path / "out")(ids).logits, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- refusals


class Code:
    """Runs something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_code_is_refused_and_never_run(file: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trapped"
    write(file, original_state(tiny_base()), config=Code(trap))
    with pytest.raises(CheckpointError, match="whose code is not run"):
        read_original(file)
    file.write_bytes(pickle.dumps({"model_state_dict": Code(trap)}, protocol=2))
    with pytest.raises(CheckpointError, match="whose code is not run"):
        read_original(file)
    assert not trap.exists()


@pytest.mark.parametrize("damage", ["no file", "empty", "truncated", "garbage", "no dict", "no tensors"])
def test_what_is_no_checkpoint_is_refused(damage: str, file: Path) -> None:
    content = write(file, original_state(tiny_base())).read_bytes()
    if damage == "no file":
        file.unlink()
    elif damage in ("no dict", "no tensors"):
        torch.save(torch.zeros(3) if damage == "no dict" else {"model_state_dict": {"a": 1}}, file)
    else:
        file.write_bytes({"empty": b"", "truncated": content[:-2000], "garbage": b"only words" * 20}[damage])
    with pytest.raises(CheckpointError):
        read_original(file)


def test_missing_and_contradicting_tensors_are_named(file: Path) -> None:
    state = original_state(tiny_base())
    del state["output_fusion.norm.bias"]
    with pytest.raises(CheckpointError, match=r"output_fusion\.norm\.bias is missing"):
        read_original(write(file, state))
    for name in ("drift_calibrator.affine_A", "memory_consolidator.keys"):
        with pytest.raises(CheckpointError, match="does not fit the others"):
            read_original(write(file, original_state(tiny_base()) | {name: torch.zeros(3, 5)}))


def test_another_base_is_refused(file: Path) -> None:
    plain, state = read_original(write(file, original_state(tiny_base()))), original_state(tiny_base(), lora=True)
    for base in (tiny_base("gpt2"), tiny_load()[0].base):
        with pytest.raises(CheckpointError, match="was not made with other"):
            import_original(plain, base, "other")
    with pytest.raises(CheckpointError, match="base under the LoRA is not other"):
        import_original(state, tiny_base(seed=5), "other")
    broken = {n: t * float("nan") if "lora_B" in n else t for n, t in state.items()}
    with pytest.raises(CheckpointError, match="NaN"):
        import_original(broken, tiny_base(), "tiny", **SMALL)
    name = next(n for n in state if n.endswith("lora_A.default.weight"))
    with pytest.raises(CheckpointError, match=r"ranks \[2, 5\]"):
        import_original(state | {name: state[name][:2]}, tiny_base(), "tiny", **SMALL)
    strange = {n.replace("q_proj", "qq_proj"): t for n, t in state.items() if "base_model" not in n or "lora_" in n}
    with pytest.raises(ConfigurationError, match="qq_proj"):
        import_original(strange, tiny_base(), "tiny", **SMALL)


def test_the_command(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    model, tokenizer = tiny_load()
    model.base.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write(file, original_state(model.base, lora=True, d=16))
    words = [str(file), "--base_model", str(base), "--window", "100", "--output"]
    assert main([*words, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "rank 5" in printed and "buffer_size=24" in printed and "train it" in printed
    config = HippoFormer.from_pretrained(tmp_path / "out").config
    assert (config.window, config.base_model_name) == (100, str(base))
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    assert main([*words, str(tmp_path / "taken")]) == 2
