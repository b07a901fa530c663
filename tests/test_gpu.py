"""What a GPU does otherwise than a processor. Where there is none, only what can be told without one is tested."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evaluation.perplexity.run import Options, run
from hippoformer.train import main as train
from test_precisions import LENGTH, listening
from tiny import text
from tiny_texts import documents, tiny_load
from tiny_training import arguments, folder  # noqa: F401

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class OnePrecision(TorchDispatchMode):
    """Refuses to normalise states of one dtype with weights of another, as a GPU does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.native_layer_norm.default:
            self.seen += 1
            dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            assert len(dtypes) == 1, f"{dtypes} in one norm"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_no_norm_mixes_precisions(precision: str) -> None:
    model, ids = listening(precision), text(rows=2, length=LENGTH)
    with torch.no_grad(), OnePrecision() as watch:
        model(ids)
    assert watch.seen > 0


@on_a_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@torch.no_grad()
def test_a_gpu_reads_as_a_processor_does(precision: str) -> None:
    model, ids = listening(precision), text(rows=2, length=LENGTH)
    here = model(ids).logits
    there = model.to("cuda")(ids.cuda()).logits.cpu()
    torch.testing.assert_close(there, here, rtol=0.0, atol=1e-3 if precision == "float32" else 0.5)


@on_a_gpu
def test_perplexity_on_a_gpu_is_that_of_a_processor() -> None:
    model, tokenizer = tiny_load()
    texts = documents(400, 150)
    here, there = (run(model.to(device), tokenizer, texts, Options()).details for device in ("cpu", "cuda"))
    for one, other in zip(here["documents"], there["documents"], strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-3)


@on_a_gpu
def test_training_on_a_gpu(folder: Path) -> None:  # noqa: F811
    precision = ("--dtype", "bfloat16")
    assert train([*arguments(folder, "frozen"), *precision, "--credit_documents", "1"]) == 0
    assert train([*arguments(folder, "adapters", "--lora_r", "2"), *precision]) == 0
    assert (folder / "adapters" / "config.json").is_file()
