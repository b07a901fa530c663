"""UnigramCounts: what kind of text this is, learned slowly and kept for ever.

Episodes tell what followed what, once. Beside them each row counts how often every token of the vocabulary came, and
sums up how often the base expected it: the slow statistics of complementary learning systems (McClelland et al. 1995).
The base's predictions are moved by the ratio of both (fast marginal adaptation: Kneser, Peters and Klakow 1997),

    p(v) ~ p_base(v) ((count_v + k) / (expected_v + k)) ^ w,

k observations as expected being believed in advance. No token becomes less likely than by a factor of e: a long run of
one token, in which the base goes on expecting others, would silence these for ever. Their size is fixed and nothing
of them is trained. Predictions follow them only from segment end to segment end, so that any chunking of a stream gives
the same numbers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hippoformer.configuration import HippoFormerConfig

# In nats; prose loses nothing by it (docs/notebook).
_LEAST_SHIFT = -1.0
# k: tokens that are believed to have come as expected before the first is counted.
_PRIOR = 2.0


def of_vocabulary(numbers: Tensor, size: int) -> Tensor:
    """(R, V) numbers of each token as (R, size), 0 for new ones."""
    return pad(numbers, (0, size - numbers.shape[-1]))


@dataclass
class UnigramCounts:
    """The statistics of R rows; V is the vocabulary, or 0 where they are switched off (`unigram_weight`).

    Attributes:
        count: (R, V) how often each token was read. expected: (R, V) the base's probabilities of it, summed.
        shift: (R, V) what they add to the base's logits, as of the row's last segment end.
    """

    count: Tensor
    expected: Tensor
    shift: Tensor

    @classmethod
    def empty(cls, rows: int, config: HippoFormerConfig, device: torch.device | str) -> "UnigramCounts":
        """Of rows that have read nothing: the base's own predictions."""
        width = config.vocab_size if config.unigram_weight else 0
        return cls(*(torch.zeros(rows, width, device=device) for _ in range(3)))

    @property
    def are_kept(self) -> bool:
        """False where they are switched off."""
        return self.shift.shape[-1] > 0

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor."""
        return vars(self)

    def resized(self, size: int) -> "UnigramCounts":
        """Those of a vocabulary of another size: what is new was neither read nor expected."""
        return UnigramCounts(*(of_vocabulary(t, size) for t in vars(self).values())) if self.are_kept else self

    def read(self, tokens: Tensor, predicted: Tensor, expected: Tensor) -> "UnigramCounts":
        """After more tokens; predictions stay as they are until the segment ends.

        Args:
            tokens: (R, N). predicted: (R, N) bool, which of them the base had something to expect.
            expected: (R, V) its probabilities of every token at these places, summed.
        """
        count = self.count.scatter_add(1, tokens, predicted.to(self.count.dtype))
        return UnigramCounts(count, self.expected + expected, self.shift)

    def renewed(self, rows: Tensor, config: HippoFormerConfig) -> "UnigramCounts":
        """With what was read in the segment that the given rows, (J,), have come to the end of."""
        ratio = torch.log((self.count[rows] + _PRIOR) / (self.expected[rows] + _PRIOR))
        shift = (config.unigram_weight * ratio).clamp_min(_LEAST_SHIFT)
        return UnigramCounts(self.count, self.expected, self.shift.index_copy(0, rows, shift))
