"""What training minimises, and the score that says whether salience means anything.

    total = lm + salience_weighted + sparsity + memory_util + credit        (each with its weight from the config)

lm is the next-token loss of the fused distribution. The salience-weighted term repeats it with each token weighted by
its importance, detached: a gate must not lower a loss by looking away. Sparsity holds the mean salience at or under its
target share. Memory utilisation is the mass that recall gives to nothing. Credit is what makes salience useful: the
share of later predictions owed to an episode is known after the fact, and the gate learns to foresee whether it will
be large.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hippoformer.configuration import HippoFormerConfig


@dataclass
class LossParts:
    """The total and its terms, each a scalar tensor before its weight is applied."""

    total: Tensor
    lm: Tensor
    salience_weighted: Tensor
    sparsity: Tensor
    memory_util: Tensor
    credit: Tensor

    def scalars(self) -> dict[str, float]:
        """Term name -> value, for logs."""
        return {name: float(value.detach()) for name, value in vars(self).items()}


class HippoFormerLoss(nn.Module):
    """The weighted sum of all terms; no parameters."""

    def __init__(self, config: HippoFormerConfig) -> None:
        super().__init__()
        self.weights = {
            "lm": config.lm_loss_weight,
            "salience_weighted": config.salience_weighted_loss_weight,
            "sparsity": config.sparsity_loss_weight,
            "memory_util": config.memory_util_loss_weight,
            "credit": config.credit_loss_weight,
        }
        self.target_tagged_share = config.target_tagged_share

    def forward(
        self,
        target_log_prob: Tensor,
        counted: Tensor,
        salience: Tensor,
        forecast: Tensor,
        importance: Tensor,
        nothing: Tensor,
        useful: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> LossParts:
        """All terms over the counted tokens.

        Args:
            target_log_prob: (R, N) fused log p of each token.
            counted: (R, N) bool, False for padding and for tokens without a prediction.
            salience: (R, N) in [0, 1]. forecast: (R, N) log-odds of usefulness. importance: (R, N) weights.
            nothing: (R, N) null mass of the query that predicted the token.
            useful: (R, N) in [0, 1], how useful each episode turned out to be, NaN where it is not known; None for
                nowhere.
            learned: (R, N) bool, the counted tokens that are to be predicted; None for all of them.

        Returns:
            The parts; means over counted tokens, 0 when none is counted.
        """
        share = counted.float() / counted.sum().clamp_min(1)
        # Nothing that is not counted may reach a sum, or a gradient: 0 * NaN is NaN.
        learned = counted if learned is None else counted & learned
        nll = torch.where(learned, -target_log_prob, 0.0)
        weight = torch.where(learned, importance.detach(), 0.0)
        excess = (torch.where(counted, salience, 0.0) * share).sum() - self.target_tagged_share * share.sum()
        parts = {
            "lm": nll.sum() / learned.sum().clamp_min(1),
            "salience_weighted": (nll * weight).sum() / weight.sum().clamp_min(1e-12),
            "sparsity": excess.clamp_min(0.0) ** 2,
            "memory_util": (torch.where(counted, nothing, 0.0) * share).sum(),
            "credit": nll.new_zeros(()),
        }
        if useful is not None:
            known = counted & ~useful.isnan()
            target = torch.where(known, useful, 0.0).to(forecast.dtype)
            error = binary_cross_entropy_with_logits(torch.where(known, forecast, 0.0), target, reduction="none")
            parts["credit"] = torch.where(known, error, 0.0).sum() / known.sum().clamp_min(1)
        total = torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()
        return LossParts(total=total, **parts)


class ConsolidationRScore:
    """Pearson correlation of salience and retrieval quality (the original's consolidation R), streamed.

    Retrieval quality of an episode is the credit it earned. Sums are kept in float64; `update` any number of times.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64)

    def update(self, salience: Tensor, quality: Tensor, counted: Tensor) -> None:
        """Adds episodes: three tensors of one shape, the last one bool."""
        x, y = salience.detach()[counted].double().cpu(), quality.detach()[counted].double().cpu()
        count = torch.tensor(float(x.numel()), dtype=torch.float64)
        self._sums += torch.stack((count, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()))

    def compute(self) -> float:
        """The correlation in [-1, 1]; NaN while fewer than two episodes, or only equal ones, were added."""
        n, x, y, xx, yy, xy = self._sums.tolist()
        spread = (n * xx - x * x) * (n * yy - y * y)
        return (n * xy - x * y) / spread**0.5 if spread > 0 else float("nan")
