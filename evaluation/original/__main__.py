"""Imports a checkpoint of the original research code: base weights, LoRA and sizes carry over.

    python -m evaluation.original pytorch_model.pt --base_model google/gemma-2b --output runs/imported

Such a file (`pytorch_model.pt`, or the `checkpoint.pt` of a training run) is one state dict: the base, perhaps with
LoRA, and four modules around it. The learned weights of the four modules feed computations that do not exist here, so
the hippocampus is fresh and must be trained. Only tensors are read; a file with pickled objects is refused.
"""

import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HfArgumentParser, PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError, HippoFormerError
from hippoformer.model.base_models import load_base_model
from hippoformer.model.modeling import HippoFormer
from hippoformer.model.weights import load_lora_state, lora_state

_BASE, _LORA_BASE = "base_model.", "base_model.base_model.model."
# Tensors that every such file has, and their shapes: D hidden size, M buffer size.
_SHAPES = {
    "salience_gate.importance_lo": "",
    "salience_gate.importance_hi": "",
    "salience_gate.global_query.weight": "DD",
    "memory_consolidator.keys": "MD",
    "memory_consolidator.values": "MD",
    "memory_consolidator.priorities": "M",
    "drift_calibrator.affine_A": "DD",
    "output_fusion.gate.0.bias": "D",
    "output_fusion.norm.bias": "D",
}
_NOT_IMPORTED = {
    "salience_gate.": "the gate here reads both sides of a transition and the surprise",
    "memory_consolidator.": "episodes here vote for their tokens; stored vectors do not know theirs",
    "drift_calibrator.": "anchors here are token ids, and the map is fitted when a memory is loaded",
    "output_fusion.": "here each token recalls by itself; the original fuses one pooled vector",
    "lm_head.": "the base's own head is used",
}


@dataclass
class Options:
    """What to import, and what the file does not say."""

    file: Path = field(metadata={"help": "pytorch_model.pt or checkpoint.pt of the original"})
    base_model: str = field(metadata={"help": "the base it was trained with: folder, hub or short name"})
    output: Path = field(metadata={"help": "folder for the HippoFormer"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of its LoRA"})
    window: int = field(default=512, metadata={"help": "tokens of the base model's own attention span"})
    seed: int = field(default=0, metadata={"help": "of the fresh hippocampus"})


def read_original(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Raises:
        CheckpointError: no such file, damaged, with pickled objects, or without the tensors of the original.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds pickled objects, whose code is not run here: expected tensors alone. Where "
            "it was made, save {'model_state_dict': model.state_dict()} and nothing else"
        ) from error
    except Exception as error:  # no file, no archive, or whatever the unpickler stumbles over
        raise CheckpointError(f"{file} cannot be read: {error}; expected a file of torch.save") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file} holds no state dict: expected tensors by name under model_state_dict")
    sizes: dict[str, int] = {}
    for name, dims in _SHAPES.items():
        if name not in state:
            raise CheckpointError(f"{file} is no checkpoint of the original: {name} is missing")
        shape = state[name].shape
        if len(shape) != len(dims) or any(sizes.setdefault(d, n) != n for d, n in zip(dims, shape, strict=True)):
            raise CheckpointError(f"{file}: {name} has shape {tuple(shape)}, which does not fit the others")
    return state


def import_original(
    state: dict[str, Tensor], base: PreTrainedModel, base_name: str, **options: Any
) -> tuple[HippoFormer, list[str]]:
    """A HippoFormer with what carries over, and a line on each part of the file.

    Args:
        state: from `read_original`. base: of the checkpoint, wrapped in place. base_name: for the saved config.
        options: of `HippoFormerConfig` that the file does not tell: `lora_alpha`, `window`, `seed`, ...

    Raises:
        CheckpointError: made for another base.
    """
    lora = {n.removeprefix(_LORA_BASE).replace(".default.", "."): t for n, t in state.items() if ".lora_" in n}
    prefix = _LORA_BASE if lora else _BASE
    theirs = {
        n.removeprefix(prefix).replace(".base_layer.", "."): t
        for n, t in state.items()
        if n.startswith(prefix) and ".lora_" not in n
    }
    own = base.state_dict()
    wrong = [n for n, t in theirs.items() if n in own and own[n].shape != t.shape]
    wrong += [n for n, _ in base.named_parameters() if theirs and n not in theirs]
    width = state["memory_consolidator.keys"].shape[1]
    if wrong or base.config.get_text_config(decoder=True).hidden_size != width:
        what = f"{wrong[0]} differs" if wrong else f"the checkpoint has hidden size {width}"
        raise CheckpointError(
            f"the checkpoint was not made with {base_name}: {what}; name the base it was trained with"
        )
    changed = [n for n, t in theirs.items() if n in own and not torch.equal(own[n].to(t.dtype), t)]
    if changed and lora:
        raise CheckpointError(f"the base under the LoRA is not {base_name}: {changed[0]} differs; name its own base")
    base.load_state_dict({n: t for n, t in theirs.items() if n in changed}, strict=False)
    lines = [f"base: {len(changed)} of {len(theirs)} tensors differ from {base_name}" + (", stored" if changed else "")]
    given: dict[str, Any] = {"freeze_base": not changed, "buffer_size": state["memory_consolidator.keys"].shape[0]}
    low, high = (float(state[f"salience_gate.importance_{end}"]) for end in ("lo", "hi"))
    if 1.0 <= low <= high < float("inf"):
        given["importance_weight_range"] = [low, high]
    lines.append(", ".join(f"{name}={value}" for name, value in given.items()))
    alpha = options.pop("lora_alpha", 32)
    if lora:
        (rank, *others) = sorted({t.shape[0] for n, t in lora.items() if ".lora_A." in n})
        if others:
            raise CheckpointError(f"the LoRA has the ranks {[rank, *others]}; expected one rank for all layers")
        targets = sorted({n.split(".")[-3] for n in lora})
        given["lora"] = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
        lines.append(f"LoRA: rank {rank} on {', '.join(targets)}; alpha {alpha} is not in the file")
    with torch.random.fork_rng():
        torch.manual_seed(options.get("seed", 0))
        model = HippoFormer(HippoFormerConfig(base_model_name=base_name, **(given | options)), base)
    if lora:
        strange = sorted(lora.keys() - lora_state(base).keys())
        if strange or not all(torch.isfinite(tensor).all() for tensor in lora.values()):
            what = f"{strange[0]} has no place in this base" if strange else "it holds NaN or infinity"
            raise CheckpointError(f"the LoRA of the checkpoint cannot be imported: {what}")
        load_lora_state(base, lora)
    for part, why in _NOT_IMPORTED.items():
        lines.append(f"{part}*: {sum(n.startswith(part) for n in state)} tensors not imported; {why}")
    return model, lines


def main(words: list[str]) -> int:
    """Imports what the words of a command line say; 0 on success, 2 on an error that was explained."""
    if words and not words[0].startswith("-"):
        words = ["--file", *words]
    (given,) = HfArgumentParser(Options, description=__doc__).parse_args_into_dataclasses(words)  # type: ignore[arg-type]
    try:
        options = {"lora_alpha": given.lora_alpha, "window": given.window, "seed": given.seed}
        base = load_base_model(given.base_model)
        model, lines = import_original(read_original(given.file), base, given.base_model, **options)
        model.save_pretrained(given.output)
    except HippoFormerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([*lines, f"Written to {given.output}. Its hippocampus is fresh: train it."]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
