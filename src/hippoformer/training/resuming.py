"""What a run takes with it into a checkpoint, and how it goes on from there as if it had never stopped.

Weights come back before the engine (DDP, FSDP2) takes the model over, everything else after: an engine shards what it
finds, and the optimizer's state follows the shards.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from hippoformer.errors import CheckpointError
from hippoformer.model import checkpoint
from hippoformer.model.base_models import load_base_model
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import checkpoints
from hippoformer.training.processes import whole
from hippoformer.training.streaming import StreamedTexts

_TEXT = "text."


class Run(Protocol):
    """What of a `hippoformer.training.trainer.Trainer` a checkpoint is made of."""

    model: HippoFormer
    accelerator: Accelerator
    optimizer: Any
    scheduler: Any
    options: Any
    reader: Any
    streams: Any
    drift: Any
    useful: dict[int, Tensor]
    history: list[dict[str, Any]]
    step: int


def save(run: Run) -> None:
    """Writes a checkpoint of the run; every process must call it."""
    tensors = checkpoints.optimizer_tensors(run.optimizer)
    tensors |= {f"useful.{number}": target for number, target in run.useful.items()}
    if run.drift.reference is not None:
        tensors["drift.reference"] = run.drift.reference
    counters: dict[str, Any] = {
        "step": run.step,
        "scheduler": run.scheduler.state_dict(),
        "history": run.history,
        "streamed": isinstance(run.streams, StreamedTexts),
    }
    if run.accelerator.scaler is not None:
        counters["scaler"] = run.accelerator.scaler.state_dict()
    own = checkpoints.Own(
        {f"{checkpoints.ROWS}{name}": tensor for name, tensor in run.reader.state().items()},
        {"bound": run.reader.bound},
    )
    own.tensors["random.cpu"] = torch.get_rng_state()
    if run.model.device.type == "cuda":
        own.tensors["random.cuda"] = torch.cuda.get_rng_state(run.model.device)
    if isinstance(run.streams, StreamedTexts):
        own.tensors |= {f"{_TEXT}{row}": ids for row, ids in enumerate(run.streams.texts())}
        own.notes["streams"] = run.streams.state()
    else:
        counters["streams"] = run.streams.state()
    checkpoints.save(
        run.options.output_dir,
        run.step,
        run.model,
        tensors,
        counters,
        run.options.keep_checkpoints,
        own,
        weights(run),
        run.accelerator.state,
    )


def weights(run: Run) -> dict[str, Tensor] | None:
    """The model's tensors where an engine has them in pieces, put together; None where they are whole.

    A frozen base is no part of a checkpoint, so it stays in its pieces.
    """
    state = run.model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return None
    frozen = {f"base.{name}" for name, p in run.model.base.named_parameters() if not p.requires_grad}
    if not run.model.config.freeze_base:
        frozen = set()
    return {name: tensor if name in frozen else whole(tensor).cpu() for name, tensor in state.items()}


def restore_weights(run: Run, path: Path) -> None:
    """Puts the checkpoint's weights into the model.

    Raises:
        CheckpointError: there is none, or it is damaged or of another model.
    """
    tensors, _, _ = checkpoints.load(path)
    checkpoint.restore(run.model, tensors)
    base = checkpoints.locate(path) / checkpoint.BASE
    if base.is_dir():
        run.model.base.load_state_dict(load_base_model(str(base), dtype=run.model.dtype).state_dict())


def restore_run(run: Run, path: Path) -> None:
    """Puts back everything else: optimizer, rows, order, draws, counters.

    Raises:
        CheckpointError: there is none, or it is damaged, or a streamed run's that other processes wrote.
    """
    _, tensors, counters = checkpoints.load(path)
    accelerator = run.accelerator
    if counters["streamed"] != isinstance(run.streams, StreamedTexts) or (
        counters["streamed"] and counters["processes"] != accelerator.num_processes
    ):
        kind = "streamed" if counters["streamed"] else "kept"
        raise CheckpointError(
            f"{path} is of a run over {kind} texts with {counters['processes']} processes: resume it with the same "
            "data, and a streamed run on as many processes"
        )
    own = checkpoints.load_own(path, accelerator.process_index, accelerator.num_processes)
    checkpoints.restore_optimizer(run.optimizer, tensors)
    rows = {
        name.removeprefix(checkpoints.ROWS): tensor.to(run.model.device)
        for name, tensor in own.tensors.items()
        if name.startswith(checkpoints.ROWS)
    }
    run.reader.restore(rows, own.notes["bound"])
    run.useful = {int(n.removeprefix("useful.")): t for n, t in tensors.items() if n.startswith("useful.")}
    run.drift.reference = tensors.get("drift.reference")
    if isinstance(run.streams, StreamedTexts):
        texts = {int(n.removeprefix(_TEXT)): t for n, t in own.tensors.items() if n.startswith(_TEXT)}
        run.streams.restore(own.notes["streams"], [texts[row] for row in sorted(texts)])
    else:
        run.streams.restore(counters["streams"])
    run.scheduler.load_state_dict(counters["scheduler"])
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    if accelerator.scaler is not None and "scaler" in counters:
        accelerator.scaler.load_state_dict(counters["scaler"])
    run.step, run.history = counters["step"], counters["history"]
    if "random.cpu" in own.tensors:
        torch.set_rng_state(own.tensors["random.cpu"])
    if "random.cuda" in own.tensors and run.model.device.type == "cuda":
        torch.cuda.set_rng_state(own.tensors["random.cuda"], run.model.device)
