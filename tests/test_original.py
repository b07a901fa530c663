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
from typer.testing import CliRunner

from hippoformer import HippoFormer
from hippoformer.cli import app
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.model.original import ImportRow, Original, read_original
from hippoformer.model.original import import_original as import_into
from tiny import text, tiny_base
from tiny_texts import tiny_load

# peft's own wrapper, with which the original made its files, asks transformers for an older name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

M, A, K = 24, 6, 3
LORA = LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "v_proj"])


def import_original(
    original: Original, base: PreTrainedModel, name: str, **options: Any
) -> tuple[HippoFormer, list[ImportRow]]:
    """With a window that the tiny bases have positions for."""
    return import_into(original, base, name, **({"window": 12, "segment_len": 6} | options))


def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.randn(out, into), f"{name}.bias": torch.randn(out)}


def modules(d: int) -> dict[str, Tensor]:
    """The tensors around the base."""
    gate = {name: torch.tensor(value) for name, value in (("threshold", 0.1), ("pathway_weight", 0.2))}
    gate |= {"importance_lo": torch.tensor(2.5), "importance_hi": torch.tensor(4.0)}
    gate |= linear("local_gate.0", d // 2, d) | linear("local_gate.3", d // 4, d // 2)
    gate |= linear("local_gate.5", 1, d // 4) | linear("global_proj", 1, d)
    for name in ("query", "key", "value"):
        gate |= linear(f"global_{name}", d, d)
    gate |= {"temporal_smooth.weight": torch.randn(1, 1, K), "temporal_smooth.bias": torch.randn(1)}
    memory = {"keys": torch.randn(M, d), "values": torch.randn(M, d), "priorities": torch.ones(M)}
    memory |= {"ages": torch.zeros(M), "valid_mask": torch.ones(M, dtype=torch.bool)}
    memory |= {"write_ptr": torch.tensor(3), "total_writes": torch.tensor(99)}
    for name in ("key", "value", "query", "consolidation"):
        memory |= linear(f"{name}_proj", d, d)
    drift = {"affine_A": torch.eye(d), "affine_b": torch.zeros(d), "anchors": torch.randn(A, d)}
    drift |= {"anchor_initialized": torch.tensor(True), "running_mean": torch.zeros(d), "running_var": torch.ones(d)}
    drift |= {"n_updates": torch.tensor(5), "drift_history": torch.zeros(100), "drift_ptr": torch.tensor(1)}
    fusion = {"cross_attn.in_proj_weight": torch.randn(3 * d, d), "cross_attn.in_proj_bias": torch.randn(3 * d)}
    fusion |= linear("cross_attn.out_proj", d, d) | linear("gate.0", d, 2 * d) | linear("gate.2", 1, d)
    fusion |= {"norm.weight": torch.ones(d), "norm.bias": torch.zeros(d)}
    parts = {"salience_gate": gate, "memory_consolidator": memory, "drift_calibrator": drift, "output_fusion": fusion}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


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


def row(rows: list[ImportRow], tensors: str) -> ImportRow:
    (found,) = [r for r in rows if r.tensors.startswith(tensors)]
    return found


@torch.no_grad()
def test_a_checkpoint_with_lora(file: Path, tmp_path: Path) -> None:
    """The imported model with memory off is the base with that LoRA; rank and layers are read off the tensors."""
    state, ids = original_state(tiny_base(), lora=True), text(rows=2, length=11)
    theirs = get_peft_model(tiny_base(), LORA).eval()
    theirs.load_state_dict({n.removeprefix("base_model."): t for n, t in state.items() if n.startswith("base_model.")})
    expected = torch.log_softmax(theirs(ids).logits, dim=-1)
    assert (expected - torch.log_softmax(tiny_base()(ids).logits, dim=-1)).abs().max() > 0.1

    original = read_original(write(file, state))
    assert any(name.startswith("base_model.base_model.model.model.layers.0.") for name in original.state)
    assert (original.lora_rank, original.lora_targets) == (5, ("q_proj", "v_proj"))
    model, rows = import_original(original, tiny_base(), "tiny", lora_alpha=7, marginal_weight=0.0)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.0, atol=1e-4)
    config = model.config
    assert (config.use_lora, config.lora_r, config.lora_alpha, config.freeze_base) == (True, 5, 7, True)
    assert (config.buffer_size, config.n_anchors, config.salience_min_duration) == (M, A, K)
    assert config.importance_weight_range == [2.5, 4.0]
    assert (
        row(rows, "base_model.*.lora_A").count == 8 and "rank 5 on q_proj, v_proj" in row(rows, "base_model.*.l").note
    )
    assert "not stored again" in rows[0].note

    model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "base").exists()
    again = HippoFormer.from_pretrained(tmp_path / "out", base_model=tiny_base())
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_checkpoint_of_a_training_run_without_lora(file: Path) -> None:
    state, ids = original_state(tiny_base()), text(rows=1, length=11)
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": [{"lr": 0.1}]}
    original = read_original(write(file, state, optimizer_state_dict=optimizer, epoch=1, global_step=7))
    model, rows = import_original(original, tiny_base(), "tiny", marginal_weight=0.0)
    assert not model.config.use_lora and model.config.freeze_base
    expected = torch.log_softmax(tiny_base()(ids).logits, dim=-1)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.0, atol=1e-4)
    assert not [r for r in rows if "lora" in r.tensors]


@torch.no_grad()
def test_a_trained_base_comes_along(file: Path, tmp_path: Path) -> None:
    changed, ids = tiny_base(), text(rows=1, length=11)
    for parameter in changed.parameters():
        parameter.mul_(1.1)
    expected = torch.log_softmax(changed(ids).logits, dim=-1)
    original = read_original(write(file, original_state(changed)))
    model, rows = import_original(original, tiny_base(), "tiny", marginal_weight=0.0)
    assert "stored as trained" in rows[0].note
    model.save_pretrained(tmp_path / "out")
    torch.testing.assert_close(HippoFormer.from_pretrained(tmp_path / "out")(ids).logits, expected, rtol=0, atol=1e-5)


def test_half_precision_weights_are_those_of_the_base(file: Path) -> None:
    state = {n: t.half() if t.is_floating_point() else t for n, t in original_state(tiny_base()).items()}
    _, rows = import_original(read_original(write(file, state)), tiny_base(), "tiny")
    assert "the same weights" in rows[0].note


def test_the_report_names_every_tensor_once(file: Path) -> None:
    state = original_state(tiny_base(), lora=True) | {"something.else": torch.zeros(2)}
    _, rows = import_original(read_original(write(file, state)), tiny_base(), "tiny")
    assert sum(r.count for r in rows) == len(state)
    assert all(r.note for r in rows) and row(rows, "something.else").here is None
    for lost in ("salience_gate.local_gate", "memory_consolidator", "output_fusion", "drift_calibrator"):
        assert row(rows, lost).here is None
    assert row(rows, "lm_head").here == "the base's head"
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    state["salience_gate.importance_lo"] = torch.tensor(9.0)
    model, rows = import_original(read_original(write(file, state)), tiny_base(), "tiny")
    assert row(rows, "lm_head").here is None
    assert row(rows, "salience_gate.importance").here is None and model.config.importance_weight_range == [2.0, 5.0]


def test_the_fresh_hippocampus_goes_by_the_seed(file: Path) -> None:
    original = read_original(write(file, original_state(tiny_base())))
    one, two, other = (import_original(original, tiny_base(), "tiny", seed=s)[0].hippocampus for s in (0, 0, 1))
    key = "recall.key_proj.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


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


@pytest.mark.parametrize("damage", ["no file", "folder", "empty", "truncated", "garbage", "no dict", "no tensors"])
def test_what_is_no_checkpoint_is_refused(damage: str, file: Path) -> None:
    write(file, original_state(tiny_base()))
    if damage == "no file":
        file.unlink()
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-2000])
    elif damage == "garbage":
        file.write_bytes(b"these are only words" * 20)
    else:
        torch.save(torch.zeros(3) if damage == "no dict" else {"model_state_dict": {"a": 1}}, file)
    with pytest.raises(CheckpointError):
        read_original(file)


def test_missing_and_contradicting_tensors_are_named(file: Path) -> None:
    state = original_state(tiny_base())
    del state["output_fusion.norm.bias"]
    with pytest.raises(CheckpointError, match=r"1 of its tensors are missing, output_fusion\.norm\.bias"):
        read_original(write(file, state))
    for name in ("drift_calibrator.affine_A", "memory_consolidator.keys", "salience_gate.temporal_smooth.weight"):
        with pytest.raises(CheckpointError, match="do not belong together"):
            read_original(write(file, original_state(tiny_base()) | {name: torch.zeros(())}))


def test_another_base_is_refused(file: Path) -> None:
    plain = read_original(write(file, original_state(tiny_base())))
    with pytest.raises(CheckpointError, match=r"hidden size 32, but wide has 48"):
        wide = tiny_base("llama")
        wide.config.hidden_size = 48
        import_original(plain, wide, "wide")
    with pytest.raises(CheckpointError, match="is not other"):
        import_original(plain, tiny_base("gpt2"), "other")
    with_lora = read_original(write(file, original_state(tiny_base(), lora=True)))
    with pytest.raises(CheckpointError, match="base under the LoRA is not other"):
        import_original(with_lora, tiny_base(seed=5), "other")
    broken = {n: t * float("nan") if "lora_B" in n else t for n, t in with_lora.state.items()}
    with pytest.raises(CheckpointError, match="NaN"):
        import_original(read_original(write(file, broken)), tiny_base(), "tiny")


# ---------------------------------------------------------------- the command


def test_the_command(file: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, tokenizer = tiny_load()
    model.base.save_pretrained(base)
    tokenizer.save_pretrained(base)
    write(file, original_state(model.base, lora=True, d=16))
    arguments = ["import-original", str(file), "--base-model", str(base), "--window", "100", "--output"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "out")], prog_name="hippoformer")
    assert done.exit_code == 0, done.output
    for expected in ("no counterpart", "LoRA adapters", "rank 5", "buffer_size=24", "fresh"):
        assert expected in done.stdout
    config = HippoFormer.from_pretrained(tmp_path / "out").config
    assert (config.lora_alpha, config.window, config.base_model_name) == (32, 100, str(base))
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    failed = CliRunner().invoke(app, [*arguments, str(tmp_path / "taken")], prog_name="hippoformer")
    assert failed.exit_code == 2 and "could not write" in failed.stderr


def test_the_rank_must_be_one(file: Path) -> None:
    state = original_state(tiny_base(), lora=True)
    name = next(n for n in state if n.endswith("lora_A.default.weight"))
    state[name] = state[name][:2]
    with pytest.raises(CheckpointError, match=r"ranks \[2, 5\]"):
        read_original(write(file, state))


def test_lora_on_a_base_without_such_layers(file: Path) -> None:
    state = original_state(tiny_base(), lora=True)
    state = {n: t for n, t in state.items() if "base_model" not in n or "lora_" in n}
    state = {n.replace("q_proj", "qq_proj"): t for n, t in state.items()}
    with pytest.raises(ConfigurationError, match="qq_proj"):
        import_original(read_original(write(file, state)), tiny_base(), "tiny")
