"""What training minimises, and the score that says whether salience means anything.

    total = lm + sparsity + credit        (each with its weight)

lm is the next-token loss of the fused distribution. Credit is the gate's only teacher: the share of later predictions
owed to an episode is known after the fact, and the gate learns to predict whether it will be large. Sparsity keeps the
mean salience at or below its target.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits


class HippoFormerLoss(nn.Module):
    """The weighted sum of the terms; no parameters.

    Args:
        lm, credit, sparsity: weights of the terms.
        target_tagged_share: mean salience up to which sparsity is 0.
    """

    def __init__(
        self, lm: float = 1.0, credit: float = 1.0, sparsity: float = 0.1, target_tagged_share: float = 0.3
    ) -> None:
        super().__init__()
        self.weights = {"lm": lm, "credit": credit, "sparsity": sparsity}
        self.target_tagged_share = target_tagged_share

    def forward(
        self,
        target_log_prob: Tensor,
        counted: Tensor,
        salience: Tensor | None = None,
        forecast: Tensor | None = None,
        useful: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms before their weights are applied, and `total`; means over counted tokens, 0 where none is counted.

        Args:
            target_log_prob: (R, N) fused log p of each token.
            counted: (R, N) bool, False for padding and for tokens without a prediction.
            salience: (R, N) in [0, 1]. forecast: (R, N) log-odds of usefulness. None: the next-token loss alone.
            useful: (R, N) in [0, 1], measured usefulness, NaN where it is unknown; None for nowhere.
            learned: (R, N) bool, the counted tokens that are to be predicted; None for all of them.
        """
        # Nothing that is not counted may reach a sum, or a gradient: 0 * NaN is NaN.
        learned = counted if learned is None else counted & learned
        terms = {"lm": _mean(-target_log_prob, learned)}
        if salience is not None:
            terms["sparsity"] = (_mean(salience, counted) - self.target_tagged_share).clamp_min(0.0) ** 2
        if forecast is not None:
            known = torch.zeros_like(counted) if useful is None else counted & ~useful.isnan()
            target = torch.zeros_like(forecast) if useful is None else useful.to(forecast.dtype)
            target, forecast = (torch.where(known, tensor, 0.0) for tensor in (target, forecast))
            terms["credit"] = _mean(binary_cross_entropy_with_logits(forecast, target, reduction="none"), known)
        return terms | {"total": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()}


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp_min(1)


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
