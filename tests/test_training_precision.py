"""Half precision and recomputed layers: what a step costs changes, its numbers only as they must."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from hippoformer import HippoFormer, train
from hippoformer.train import main
from hippoformer.training.readers import LiveReader, checkpoint_layers
from hippoformer.training.streams import TextStreams
from tiny import awake
from tiny_training import arguments, differing, history, texts


def adapted(name: str = "llama") -> HippoFormer:
    """A model whose base learns too, with a dropout that must be drawn alike."""
    torch.manual_seed(0)
    options = {"freeze_base": False} if name == "gpt2" else {"lora": {"r": 2, "lora_dropout": 0.2}}
    return awake(name, **options).train()


def losses(model: HippoFormer) -> Iterator[torch.Tensor]:
    """Of every four pieces read live, the state carried on, the graph cut after each loss."""
    reader, streams = LiveReader(model, texts(31, 44, 26), 2), TextStreams([31, 44, 26], 2, 6, 0)
    for _ in range(2):
        yield torch.stack([-reader.read(streams.next()).target_log_prob.mean() for _ in range(4)]).sum()
        reader.cache.detach()


def gradients(model: HippoFormer) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    found = []
    for loss in losses(model):
        loss.backward()
        found.append(loss.item())
    return found, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.supports(architecture="{name}", mode="recomputed layers")
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    """To the bit, dropout and the keys carried from piece to piece included."""
    kept, expected = gradients(adapted(name))
    model = adapted(name)
    checkpoint_layers(model)
    recomputed, got = gradients(model)
    assert recomputed == kept and got.keys() == expected.keys() and len(expected) > 20
    assert [n for n in expected if not torch.equal(got[n], expected[n])] == []


def test_recomputed_layers_keep_less() -> None:
    def saved(model: HippoFormer) -> int:
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
            next(losses(model))
        return sum(tensor.numel() for tensor in kept)

    model = adapted()
    checkpoint_layers(model)
    next(losses(model))  # the first piece of all makes the slots, and is kept
    assert saved(model) < 0.8 * saved(adapted())


@pytest.mark.supports(precision="bfloat16", architecture="llama")
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param([], marks=pytest.mark.supports(trainer="frozen")),
        pytest.param(
            ["--lora_r", "2", "--gradient_checkpointing"],
            marks=pytest.mark.supports(trainer="lora", mode="recomputed layers"),
        ),
        pytest.param(["--train_base"], marks=[pytest.mark.supports(trainer="base"), pytest.mark.slow]),
    ],
)
def test_bfloat16_trains_close_to_float32(folder: Path, mode: list[str]) -> None:
    """Autocast computes in bfloat16 what float32 weights keep; losses agree to its three digits."""
    assert main(arguments(folder, "full", *mode)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(folder, "half", "--mixed_precision", "bf16", *mode)) == 0
    one, other = history(folder / "full"), history(folder / "half")
    assert one[0]["loss_lm"] != other[0]["loss_lm"], "nothing was computed in half precision"
    for a, b in zip(one, other, strict=True):
        assert b["loss_lm"] == pytest.approx(a["loss_lm"], rel=0.05)
    saved = load_file(folder / "half" / "model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values() if t.is_floating_point())


def float16(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """float16 on the CPU, which torch has and accelerate does not offer; all else is accelerate's own."""
    real = train.new_accelerator

    def with_scaler(*args: Any) -> Any:
        accelerator = real(*args)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-30, growth_interval=3)
        return accelerator

    monkeypatch.setattr(train, "new_accelerator", with_scaler)


EACH = ["--logging_steps", "1"]


@pytest.mark.supports(trainer="frozen", precision="float16", architecture="llama")
def test_float16_gradients_are_unscaled_before_they_are_clipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(arguments(folder, "full", *EACH)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    float16(monkeypatch, 2.0**6)
    assert main(arguments(folder, "half", *EACH)) == 0
    one, other = history(folder / "full"), history(folder / "half")
    assert sum(entry["skipped_steps"] for entry in other) == 0
    assert one[0]["loss_lm"] != other[0]["loss_lm"], "nothing was computed in half precision"
    for a, b in zip(one[:4], other[:4], strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1), "the scale is still in the gradients"
        assert b["loss_lm"] == pytest.approx(a["loss_lm"], rel=0.02)


def test_an_overflow_skips_a_step_and_a_resumed_run_hasits_scale(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    float16(monkeypatch, 2.0**40)
    assert main(arguments(folder, "run", *EACH)) == 0
    entries = history(folder / "run")
    assert [entry["skipped_steps"] for entry in entries] == [1.0] + [0.0] * 7
    assert entries[0]["learning_rate"] == 0.0 < entries[1]["learning_rate"], "a skipped step moved the learning rate"
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["--resume_from_checkpoint", str(folder / "run" / "checkpoint-00000006")]
    assert main(arguments(folder, "again", *EACH, *more)) == 0
    last = [folder / run / "checkpoint-00000008" for run in ("run", "again")]
    assert differing(*last) == []
    scales = [json.loads((path / "training.json").read_text())["scaler"]["scale"] for path in last]
    assert scales[0] == scales[1] == 2.0**12, "lowered by the overflow, doubled by every three steps without"
