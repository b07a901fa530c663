"""The drift calibrator: old memories, new code (homeostasis).

Memories are written in the code of one checkpoint. When LoRA steps or another quantisation change that code, what was
stored no longer matches what is asked. Fixed probe inputs, the anchors, are encoded whenever a memory is saved and
again when it is loaded: how far they moved, relative to their own spread, is the drift; the regularised affine map
that carries the old representations to the new ones, h' = h + h A + b, carries the stored keys and values too. The
decision depends on the anchors alone, never on the text being read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import InputError

# Ridge strengths tried, relative to the mean variance of the anchors; the best on held-out anchors is taken.
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_FOLDS = 4
# Probes, and tokens of each.
N_ANCHORS, ANCHOR_LEN = 64, 16


@dataclass
class AffineMap:
    """x -> x + x @ change + shift, in float32; change (K, K), shift (K,).

    `left` is the drift that remains after it, on anchors that it was not fitted to.
    """

    change: Tensor
    shift: Tensor
    left: float

    def __call__(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K) in the dtype of x."""
        return (x.float() + x.float() @ self.change + self.shift).to(x.dtype)


def relative_drift(old: Tensor, new: Tensor) -> float:
    """How far anchors moved: root mean square distance over their root mean square spread.

    Args:
        old, new: (A, K) representations of the same probes.

    Returns:
        0 for unmoved anchors; about 1.4 for unrelated ones of the same spread.

    Raises:
        InputError: the two do not have the same shape, or contain NaN.
    """
    if old.shape != new.shape:
        raise InputError(f"anchors of shape {tuple(old.shape)} and {tuple(new.shape)} cannot be compared")
    old, new = old.double(), new.double()
    moved = (new - old).square().sum(-1).mean().sqrt()
    spread = (old - old.mean(0)).square().sum(-1).mean().sqrt()
    drift = (moved / spread.clamp_min(1e-12)).item()
    if drift != drift:
        raise InputError("the anchors' representations contain NaN: check the weights of the model")
    return drift


def fit_affine(old: Tensor, new: Tensor) -> AffineMap:
    """Ridge regression of the anchors' movement, its strength chosen on held-out anchors.

    Args:
        old, new: (A, K).

    Returns:
        The map; with few anchors it tends to the identity plus a shift, never to something wild.
    """
    old, new = old.double(), new.double()
    # In one piece each: the tokens of one probe are too alike to judge each other.
    fold = torch.arange(old.shape[0], device=old.device) * _FOLDS // old.shape[0]

    def held_out_error(ridge: float) -> float:
        error = 0.0
        for number in range(_FOLDS):
            train, test = fold != number, fold == number
            change, shift = _ridge(old[train], new[train], ridge)
            error += (old[test] + old[test] @ change + shift - new[test]).square().sum().item()
        return error

    errors = {ridge: held_out_error(ridge) for ridge in _RIDGES}
    best = min(errors, key=errors.__getitem__)
    change, shift = _ridge(old, new, best)
    spread = (old - old.mean(0)).square().sum().clamp_min(1e-12).item()
    return AffineMap(change.float(), shift.float(), left=(errors[best] / spread) ** 0.5)


def _ridge(old: Tensor, new: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    centre, movement = old.mean(0), new - old
    x, y = old - centre, movement - movement.mean(0)
    gram = x.T @ x
    penalty = (
        strength * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(gram.shape[0], dtype=x.dtype, device=x.device)
    )
    change = torch.linalg.solve(gram + penalty, x.T @ y)
    return change, movement.mean(0) - centre @ change


class EmbeddingDriftCalibrator(nn.Module):
    """Owns the probe inputs. What they look like under a model is computed by the model, kept in memory files.

    Args:
        vocab_size: ids of the probes are below this.
        config: `drift_threshold`, `seed`.

    The probes start as pseudo-random tokens; training replaces them by spans of its own text (`set_anchors`), which lie
    closer to what memories are made of.
    """

    anchor_ids: Tensor

    def __init__(self, vocab_size: int, config: HippoFormerConfig) -> None:
        super().__init__()
        self.threshold = config.drift_threshold
        generator = torch.Generator().manual_seed(config.seed)
        shape = (N_ANCHORS, ANCHOR_LEN)
        self.register_buffer("anchor_ids", torch.randint(0, vocab_size, shape, generator=generator, dtype=torch.int32))

    def set_anchors(self, ids: Tensor) -> None:
        """Replaces the probes by (N_ANCHORS, ANCHOR_LEN) token ids."""
        if ids.shape != self.anchor_ids.shape:
            raise InputError(f"expected anchors of shape {tuple(self.anchor_ids.shape)}, got {tuple(ids.shape)}")
        self.anchor_ids.copy_(ids)

    def resize_vocabulary(self, size: int) -> None:
        """Takes another number of tokens: probes keep theirs, or get others where the vocabulary ends before them."""
        self.anchor_ids.remainder_(size)

    def correction(self, old: Tensor, new: Tensor) -> AffineMap | None:
        """The map from old to new code, or None when the drift is within the threshold."""
        return fit_affine(old, new) if relative_drift(old, new) > self.threshold else None
