"""Does a model predict the future from the past alone? Whoever looks ahead is refused a perplexity.

A model that peeks at the token it is scored on can reach any perplexity, and nothing in the number shows it. So three
questions are put to a short piece of text, read after enough of it that windows and stores are full:

    future    logits up to t, when all tokens after t are replaced: the arithmetic is the same, so nothing may change
              (on a GPU no more than rounding, see `no_change`)
    chunks    logits of the piece read at once or a few tokens at a time, against reading it token by token, where
              nothing later has been given to the model yet
    scores    log p of each token as perplexity sums it up, against the logits

    check(model, input_ids)    # returns what was found, raises CausalityError on a leak
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hippoformer.errors import CausalityError, InputError

_PIECE = 40  # tokens that are looked at
_BEFORE_END = 24  # of them before a segment ends: which memories are merged then may hang on rounding
_CUTS = (0.1, 0.4, 0.7)
_NOTHING = 1e-6
# A GPU's libraries choose their kernels as they run: a step of float32 more or less (1.9e-6 was seen) is no leak.
_NOTHING_ON_A_GPU = 1e-4
# Total variation by which distributions may differ when the same text is read in pieces of other sizes: rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE_ROUNDING = 0.2
_SCORE_ROUNDING = 0.01  # nats a token; both come from the same arithmetic


class Predictor(Protocol):
    """Anything whose causality can be checked. `vocab_size` and `dtype` are those of its logits."""

    vocab_size: int
    dtype: torch.dtype

    def logits(self, ids: Tensor, chunk: int | None) -> Tensor:
        """(T, V) logits after each of the T tokens, handed to the model `chunk` at a time (None: at once)."""

    def scores(self, ids: Tensor) -> Tensor:
        """(T - 1,) log p of each token but the first, as perplexity counts them."""


@dataclass(frozen=True)
class CausalityResult:
    """What a check that found no leak has looked at.

    Attributes:
        tokens: of the piece. context: tokens read before it. cuts: tokens after which the text was changed.
        chunks: ways it was handed over; None is at once.
        future: largest change of a logit up to a cut.
        rounding: largest distance of distributions between the ways to read. tolerance: of it.
    """

    tokens: int
    context: int
    cuts: tuple[int, ...]
    chunks: tuple[int | None, ...]
    future: float
    rounding: float
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def check(
    model: Any, input_ids: Tensor | None = None, chunks: Sequence[int | None] = (None, 7), seed: int = 0
) -> CausalityResult:
    """Looks for a prediction that depends on what comes after it.

    Args:
        model: a HippoFormer in evaluation mode, or any `Predictor`.
        input_ids: (T,) a text; repeated where it is shorter than what fills window and store, random where None.
        chunks: ways to hand the piece over, beside token by token.
        seed: of the tokens that replace the future.

    Returns:
        What was looked at.

    Raises:
        CausalityError: a leak, with where it was seen and how large it is.
        InputError: fewer than two tokens.
    """
    draw = torch.Generator().manual_seed(seed)
    predictor = model if hasattr(model, "logits") and hasattr(model, "scores") else None
    vocabulary = predictor.vocab_size if predictor is not None else model.config.vocab_size
    if input_ids is None:
        input_ids = torch.randint(min(vocabulary, 100), (_PIECE,), generator=draw)
    if input_ids.dim() != 1 or len(input_ids) < 2:
        raise InputError(f"the causality check was given {tuple(input_ids.shape)} tokens; expected (T,) with T >= 2")
    context, comparable = 0, _PIECE
    if predictor is None:
        context, comparable = _context(model.config)
    wanted = context + _PIECE
    ids = input_ids.cpu().repeat(-(-wanted // len(input_ids)))[:wanted]
    if predictor is None:
        predictor = _AfterContext(model, ids[:context])
    piece = ids[context:]
    tolerance = _ROUNDING.get(predictor.dtype, _COARSE_ROUNDING)
    one_by_one = torch.softmax(predictor.logits(piece, 1).float(), -1)[:comparable]  # (t, V), the future not yet given
    cuts = tuple(int(share * _PIECE) for share in _CUTS)
    future = rounding = 0.0
    for chunk in chunks:
        way = "at once" if chunk is None else f"{chunk} tokens at a time"
        logits = predictor.logits(piece, chunk).float()
        for cut in cuts:
            changed = piece.clone()
            shift = torch.randint(1, vocabulary, (_PIECE - cut - 1,), generator=draw)
            changed[cut + 1 :] = (changed[cut + 1 :] + shift) % vocabulary
            found = float(_difference(predictor.logits(changed, chunk).float()[: cut + 1], logits[: cut + 1]).max())
            future = max(future, found)
            if found > no_change(logits.device):
                raise CausalityError(_leak(f"logits up to token {cut} change by {found:.3g} when later tokens do", way))
        read = torch.softmax(logits[:comparable], -1)
        found = 0.5 * float(_difference(read, one_by_one).sum(-1).max())
        rounding = max(rounding, found)
        if found > tolerance:
            raise CausalityError(_leak(f"distributions are {found:.3g} away from reading token by token", way))
    foretold = torch.log_softmax(predictor.logits(piece, None)[:-1].float(), -1)
    foretold = foretold.gather(-1, piece[1:, None].to(foretold.device)).squeeze(-1)  # (T - 1,)
    found = float(_difference(predictor.scores(piece), foretold).mean())
    if found > _SCORE_ROUNDING:
        raise CausalityError(_leak(f"scores differ by {found:.3g} nats a token from its logits", "at once"))
    return CausalityResult(_PIECE, context, cuts, tuple(chunks), future, rounding, tolerance)


class _AfterContext:
    """A HippoFormer that has read a context; every question starts from a copy of that state."""

    def __init__(self, model: Any, context: Tensor) -> None:
        self.model, self.dtype = model, model.dtype
        self.vocab_size: int = model.config.vocab_size
        self.cache = model.new_cache(1)
        model.score(context.unsqueeze(0).to(model.device), past_key_values=self.cache)

    def logits(self, ids: Tensor, chunk: int | None) -> Tensor:
        cache, parts = self.cache.copy(), ids.unsqueeze(0).to(self.model.device).split(chunk or len(ids), dim=1)
        return torch.cat([self.model(part, past_key_values=cache).logits[0] for part in parts])

    def scores(self, ids: Tensor) -> Tensor:
        return self.model.score(ids.unsqueeze(0).to(self.model.device), past_key_values=self.cache.copy())[0]


def no_change(device: torch.device) -> float:
    """By how much a logit may change with what follows and still be called the same."""
    return _NOTHING if device.type == "cpu" else _NOTHING_ON_A_GPU


def _context(config: Any) -> tuple[int, int]:
    """Tokens to read first, so that the window is full, the store is in use, and a segment ends within the piece; and
    how many tokens of the piece come before that end.
    """
    before_end = max(2, min(_BEFORE_END, config.segment_len))
    segments = -(-config.window // config.segment_len) + 3
    return segments * config.segment_len - before_end, before_end


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|, 0 for equal infinities; a NaN is for the scoring to find, which names the place."""
    differ = (one != other) & ~one.isnan() & ~other.isnan()
    return torch.where(differ, (one - other).abs(), 0.0)


def _leak(found: str, way: str) -> str:
    return (
        f"this model looks ahead: read {way}, its {found}. A perplexity of it would mean nothing; expected predictions "
        "that depend on earlier tokens alone. Check the attention mask and whatever pools over the text."
    )
