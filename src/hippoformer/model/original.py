"""Importing a checkpoint of the original research code: what has a counterpart here, and what has none and why.

Such a file (`pytorch_model.pt`, or the `checkpoint.pt` of a training run) is one state dict: the base, perhaps with
LoRA, and four modules around it. The base's weights, the LoRA and the sizes carry over. The learned weights of the four
modules do not: they feed other computations than those here, so the hippocampus is fresh and is to be trained. Only
tensors are read; a file that holds pickled objects is refused unopened.
"""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import CheckpointError
from hippoformer.model.adapters import load_lora_state, lora_state
from hippoformer.model.modeling import HippoFormer

_PLAIN_BASE = "base_model."
_LORA_BASE = "base_model.base_model.model."
# The modules of the original around its base, without the tensors that carry over.
_NO_COUNTERPART = {
    "salience_gate.local_gate.": "reads one hidden state; the gate here reads both sides of a transition, and surprise",
    "salience_gate.global_": "attends over the sequence at full width; here the gate asks the episodes, by their keys",
    "salience_gate.temporal_smooth.": "smooths, mixes and shifts the scores of the two pathways above",
    "salience_gate.pathway_weight": "smooths, mixes and shifts the scores of the two pathways above",
    "salience_gate.threshold": "smooths, mixes and shifts the scores of the two pathways above",
    "memory_consolidator.": "stored vectors know no token that followed, and their projections learned from no loss; "
    "episodes here vote for their tokens",
    "drift_calibrator.": "probes are token ids here, and the map is fitted when a memory is loaded",
    "output_fusion.": "looks at one pooled vector for all tokens; here each token recalls by itself",
}
_LINEAR = ("weight", "bias")


@dataclass(frozen=True)
class ImportRow:
    """What became of some tensors of the file.

    Attributes:
        tensors: their names, or what they have in common. count: how many. here: what they became, None for nothing.
        note: how, or why not.
    """

    tensors: str
    count: int
    here: str | None
    note: str


@dataclass(frozen=True)
class Original:
    """A checkpoint of the original.

    Attributes:
        state: every tensor by name.
        hidden_size: D. buffer_size: M. n_anchors: A. kernel: k, width of the smoothing.
        lora_rank: of its LoRA, 0 without. lora_targets: names of the layers that have it.
    """

    state: dict[str, Tensor]
    hidden_size: int
    buffer_size: int
    n_anchors: int
    kernel: int
    lora_rank: int
    lora_targets: tuple[str, ...]

    @property
    def base(self) -> dict[str, Tensor]:
        """The base's own weights, by the names that the base gives them."""
        prefix = _LORA_BASE if self.lora_rank else _PLAIN_BASE
        return {
            name.removeprefix(prefix).replace(".base_layer.", "."): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix) and ".lora_" not in name
        }

    @property
    def lora(self) -> dict[str, Tensor]:
        """The LoRA's weights, by the names that `adapters.lora_state` gives them."""
        return {
            name.removeprefix(_LORA_BASE).replace(".default.", "."): tensor
            for name, tensor in self.state.items()
            if ".lora_" in name
        }


def read_original(file: str | Path) -> Original:
    """Reads a file of the original, weights only.

    Raises:
        CheckpointError: no such file; damaged; holding pickled objects; without tensors that such a file has, or with
            ones of shapes that contradict each other.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {file}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is damaged, or holds pickled objects, whose code is not run here: expected tensors alone. Where "
            "it was made, save model.state_dict() under the name model_state_dict, without a config or other objects"
        ) from error
    except Exception as error:  # whatever the unpickler stumbles over
        raise CheckpointError(f"{file} is damaged or not a file of torch.save: {error}") from error
    state = content.get("model_state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} holds no state dict: expected tensors by name under model_state_dict")
    return _checked(state, file)


def import_original(
    original: Original, base: PreTrainedModel, base_name: str, **options: Any
) -> tuple[HippoFormer, list[ImportRow]]:
    """A HippoFormer with what carries over.

    Args:
        base: the base model of the checkpoint, wrapped in place. base_name: what the saved config calls it.
        options: of `HippoFormerConfig` that the file does not tell: `lora_alpha` (32, the original's default, unless
            given), `window`, `seed` of the fresh hippocampus, ...

    Returns:
        The model, untrained in its hippocampus, and what became of every tensor.

    Raises:
        CheckpointError: made for a base of another hidden size, or of other weights than this one.
    """
    width = base.config.get_text_config(decoder=True).hidden_size
    if width != original.hidden_size:
        raise CheckpointError(
            f"the checkpoint was made for a base of hidden size {original.hidden_size}, but {base_name} has {width}: "
            "name the base it was trained with"
        )
    trained, base_row = _take_base(original, base, base_name)
    importance, importance_row = _importance(original)
    found: dict[str, Any] = {
        "base_model_name": base_name,
        "freeze_base": not trained,
        "use_lora": original.lora_rank > 0,
        "buffer_size": original.buffer_size,
        "n_anchors": original.n_anchors,
        "salience_min_duration": original.kernel,
    }
    if original.lora_rank:
        found |= {"lora_r": original.lora_rank, "lora_target_modules": original.lora_targets}
    with torch.random.fork_rng():
        torch.manual_seed(options.get("seed", 0))
        model = HippoFormer(HippoFormerConfig(**(found | importance | options)), base)
    rows = [base_row, *_take_lora(original, model), importance_row]
    rows.append(ImportRow("shapes of buffer, anchors, smoothing", 0, _sizes(original), "the same meaning"))
    return model, rows + _left_out(original, base)


def report_table(rows: list[ImportRow]) -> Table:
    """The rows, for the terminal."""
    table = Table(title="What became of the original's tensors")
    table.add_column("tensors", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("here", overflow="fold")
    table.add_column("how, or why not", overflow="fold")
    for row in rows:
        table.add_row(row.tensors, f"{row.count:,}" if row.count else "", row.here or "no counterpart", row.note)
    return table


def _checked(state: dict[str, Tensor], file: str | Path) -> Original:
    missing = sorted(name for name in _names() if name not in state)
    if missing:
        raise CheckpointError(
            f"{file} is no checkpoint of the original: {len(missing)} of its tensors are missing, {missing[0]} first"
        )
    hidden_size = (*state["salience_gate.global_query.weight"].shape, 0)[0]
    buffer_size = (*state["memory_consolidator.keys"].shape, 0)[0]
    n_anchors = (*state["drift_calibrator.anchors"].shape, 0)[0]
    kernel = (*state["salience_gate.temporal_smooth.weight"].shape, 0, 0, 0)[2]
    lora = {name: tensor for name, tensor in state.items() if name.endswith("lora_A.default.weight")}
    ranks = {tensor.shape[0] for tensor in lora.values()}
    if len(ranks) > 1:
        raise CheckpointError(f"the LoRA in {file} has the ranks {sorted(ranks)}: only one rank for all is known here")
    for name, shape in _shapes(hidden_size, buffer_size, n_anchors, kernel).items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"{name} in {file} has shape {tuple(state[name].shape)}, expected {shape}: its tensors do not belong "
                "together"
            )
    targets = sorted({name.split(".")[-4] for name in lora})
    return Original(state, hidden_size, buffer_size, n_anchors, kernel, max(ranks, default=0), tuple(targets))


def _names() -> list[str]:
    """Every tensor that such a file has around the base."""
    gate = ["threshold", "importance_lo", "importance_hi", "pathway_weight"]
    layers = [f"local_gate.{n}" for n in (0, 3, 5)] + [f"global_{n}" for n in ("query", "key", "value", "proj")]
    gate += [f"{layer}.{part}" for layer in (*layers, "temporal_smooth") for part in _LINEAR]
    memory = ["keys", "values", "priorities", "ages", "valid_mask", "write_ptr", "total_writes"]
    memory += [f"{n}_proj.{part}" for n in ("key", "value", "query", "consolidation") for part in _LINEAR]
    drift = ["affine_A", "affine_b", "anchors", "anchor_initialized", "running_mean", "running_var", "n_updates"]
    drift += ["drift_history", "drift_ptr"]
    fusion = ["cross_attn.in_proj_weight", "cross_attn.in_proj_bias"]
    fusion += [f"{layer}.{part}" for layer in ("cross_attn.out_proj", "gate.0", "gate.2", "norm") for part in _LINEAR]
    modules = {
        "salience_gate": gate,
        "memory_consolidator": memory,
        "drift_calibrator": drift,
        "output_fusion": fusion,
    }
    return [f"{module}.{name}" for module, names in modules.items() for name in names]


def _shapes(d: int, m: int, a: int, k: int) -> dict[str, tuple[int, ...]]:
    """Shapes that tell whether the four modules belong together."""
    return {
        "salience_gate.importance_lo": (),
        "salience_gate.importance_hi": (),
        "salience_gate.global_query.weight": (d, d),
        "salience_gate.temporal_smooth.weight": (1, 1, k),
        "memory_consolidator.keys": (m, d),
        "memory_consolidator.values": (m, d),
        "memory_consolidator.priorities": (m,),
        "drift_calibrator.affine_A": (d, d),
        "drift_calibrator.anchors": (a, d),
        "output_fusion.cross_attn.in_proj_weight": (3 * d, d),
    }


def _take_base(original: Original, base: PreTrainedModel, name: str) -> tuple[bool, ImportRow]:
    """Whether the checkpoint's base was trained, in which case its weights are now in `base`, and the row."""
    theirs, own = original.base, base.state_dict()
    if not theirs:
        return False, ImportRow("base_model.*", 0, name, "not in the file: the base is taken as it is")
    wrong = [n for n, t in theirs.items() if n in own and own[n].shape != t.shape]
    # Tied weights may be there once or twice; buffers of older releases are no weights.
    missing = [n for n, _ in base.named_parameters() if n not in theirs]
    if wrong or missing:
        what = f"{wrong[0]} has another shape" if wrong else f"{missing[0]} is not in it"
        raise CheckpointError(
            f"the base inside the checkpoint is not {name}: {what}; name the base it was trained with"
        )
    changed = [n for n, t in theirs.items() if n in own and not torch.equal(own[n].to(t.dtype), t)]
    count = len(theirs)
    if not changed:
        return False, ImportRow("base_model.*", count, name, "the same weights: named, not stored again")
    if original.lora_rank:
        raise CheckpointError(
            f"the base under the LoRA is not {name}: {changed[0]} and {len(changed) - 1} other tensors differ; name "
            "the base it was trained with"
        )
    base.load_state_dict({n: t for n, t in theirs.items() if n in own}, strict=False)
    return True, ImportRow("base_model.*", count, "base/", f"{len(changed)} differ from {name}: stored as trained")


def _take_lora(original: Original, model: HippoFormer) -> list[ImportRow]:
    if not original.lora_rank:
        return []
    theirs = original.lora
    stranger = sorted(theirs.keys() - lora_state(model.base).keys())
    if stranger or not all(torch.isfinite(tensor).all() for tensor in theirs.values()):
        what = f"{stranger[0]} has no place in this base" if stranger else "it holds NaN or infinity"
        raise CheckpointError(f"the LoRA of the checkpoint cannot be taken over: {what}")
    load_lora_state(model.base, theirs)
    config = model.config
    note = (
        f"rank {config.lora_r} on {', '.join(config.lora_target_modules)}; alpha {config.lora_alpha} is not in the file"
    )
    return [ImportRow("base_model.*.lora_A, lora_B", len(theirs), "LoRA adapters", note)]


def _importance(original: Original) -> tuple[dict[str, Any], ImportRow]:
    low, high = (float(original.state[f"salience_gate.importance_{end}"]) for end in ("lo", "hi"))
    names = "salience_gate.importance_lo, importance_hi"
    if 1.0 <= low <= high < float("inf"):
        row = ImportRow(names, 2, f"importance_weight_range=[{low:g}, {high:g}]", "the same meaning")
        return {"importance_weight_range": [low, high]}, row
    return {}, ImportRow(names, 2, None, f"[{low:g}, {high:g}] is no range above the weight 1 of what is not tagged")


def _sizes(original: Original) -> str:
    return (
        f"buffer_size={original.buffer_size}, n_anchors={original.n_anchors}, salience_min_duration={original.kernel}"
    )


def _left_out(original: Original, base: PreTrainedModel) -> list[ImportRow]:
    carried = {"salience_gate.importance_lo", "salience_gate.importance_hi", "lm_head.weight"}
    left = [n for n in original.state if n not in carried and not n.startswith(_PLAIN_BASE)]
    rows, told = [], set()
    for prefix, why in _NO_COUNTERPART.items():
        names = [n for n in left if n.startswith(prefix)]
        told |= set(names)
        rows.append(ImportRow(f"{prefix}*" if prefix.endswith((".", "_")) else prefix, len(names), None, why))
    head, own = original.state.get("lm_head.weight"), base.get_output_embeddings().weight
    if head is not None and head.shape == own.shape and torch.equal(own.to(head.dtype), head):
        rows.append(ImportRow("lm_head.weight", 1, "the base's head", "another name of the base's own"))
    elif head is not None:
        rows.append(ImportRow("lm_head.weight", 1, None, "a head of its own; the base's is used here"))
    unknown = sorted(set(left) - told)
    if unknown:
        rows.append(ImportRow(", ".join(unknown[:5]), len(unknown), None, "not in the layout that is known here"))
    return rows
