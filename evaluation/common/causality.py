"""Leak check: does a prediction depend on tokens that come after it? A perplexity of such a model means nothing.

Three questions about a short piece of text, read after enough of it that window and store are full:

    future    logits up to t when all tokens after t are replaced: nothing may change
    chunks    distributions of the piece read at once or a few tokens at a time, against token by token
    scores    log p of each token as perplexity sums it up, against the logits
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from hippoformer.errors import CausalityError, InputError
from hippoformer.evaluation import reading

_PIECE = 40  # tokens
_BEFORE_END = 24  # of them before a segment ends: which episodes replay merges then may depend on rounding
_CUTS = (4, 16, 28)
_CHUNKS = (None, 7)
# Largest change of a logit that is still none: a GPU's kernels differ by a step of float32 (1.9e-6 was seen).
_NO_CHANGE, _NO_CHANGE_ON_A_GPU = 1e-6, 1e-4
# Total variation between readings in pieces of other sizes that is still rounding.
_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 0.2
_SCORE_ROUNDING = 0.01  # nats a token


class Predictor(Protocol):
    """Anything that can be checked; `vocab_size` and `dtype` are those of its logits."""

    vocab_size: int
    dtype: torch.dtype

    def logits(self, ids: Tensor, chunk: int | None) -> Tensor:
        """(T, V) logits after each of T tokens, handed over `chunk` at a time (None: at once)."""

    def scores(self, ids: Tensor) -> Tensor:
        """(T - 1,) log p of each token but the first."""


class _AfterContext:
    """A HippoFormer that has read a context; every question starts from a copy of that state."""

    def __init__(self, model: Any, context: Tensor) -> None:
        self.model, self.dtype = model, model.dtype
        self.vocab_size: int = model.config.vocab_size
        self.cache = model.new_cache(1)
        model.score(context[None].to(model.device), past_key_values=self.cache)

    def logits(self, ids: Tensor, chunk: int | None) -> Tensor:
        cache, parts = self.cache.copy(), ids[None].to(self.model.device).split(chunk or len(ids), dim=1)
        return torch.cat([self.model(part, past_key_values=cache).logits[0] for part in parts])

    def scores(self, ids: Tensor) -> Tensor:
        return self.model.score(ids[None].to(self.model.device), past_key_values=self.cache.copy())[0]


def check_model(model: Any, input_ids: Tensor) -> dict[str, float]:
    """`check` of a HippoFormer, after a context that fills window and store; a short text is repeated.

    Raises:
        CausalityError: a leak. InputError: fewer than two tokens.
    """
    config = model.config
    before_end = max(2, min(_BEFORE_END, config.segment_len))
    context = (-(-config.window // config.segment_len) + 3) * config.segment_len - before_end
    ids = _repeated(input_ids, context + _PIECE)
    with reading(model):
        return check(_AfterContext(model, ids[:context]), ids[context:], before_end)


@torch.no_grad()
def check(predictor: Predictor, input_ids: Tensor, comparable: int = _PIECE) -> dict[str, float]:
    """Looks for predictions that depend on later tokens.

    Args:
        input_ids: (T,) a text; repeated where it is short. comparable: tokens of it over which chunks are compared.

    Returns:
        future, rounding: the largest change that later tokens made, and the largest distance between chunks.

    Raises:
        CausalityError: a leak, with where it was seen and how large it is. InputError: fewer than two tokens.
    """
    piece, draw = _repeated(input_ids, _PIECE), torch.Generator().manual_seed(0)
    tolerance = _ROUNDING if predictor.dtype in (torch.float32, torch.float64) else _ROUNDING_OF_HALF
    one_by_one = torch.softmax(predictor.logits(piece, 1).float(), -1)[:comparable]
    future = rounding = 0.0
    for chunk in _CHUNKS:
        way = "at once" if chunk is None else f"{chunk} tokens at a time"
        logits = predictor.logits(piece, chunk).float()
        for cut in _CUTS:
            changed = piece.clone()
            shift = torch.randint(1, predictor.vocab_size, (_PIECE - cut - 1,), generator=draw)
            changed[cut + 1 :] = (changed[cut + 1 :] + shift) % predictor.vocab_size
            found = _largest(predictor.logits(changed, chunk).float()[: cut + 1], logits[: cut + 1])
            future = max(future, found)
            if found > (_NO_CHANGE if logits.device.type == "cpu" else _NO_CHANGE_ON_A_GPU):
                raise _leak(f"logits up to token {cut} change by {found:.3g} when later tokens do", way)
        distance = 0.5 * _differences(torch.softmax(logits[:comparable], -1), one_by_one).sum(-1)
        rounding = max(rounding, float(distance.max()))
        if rounding > tolerance:
            raise _leak(f"distributions are {rounding:.3g} away from reading token by token", way)
    expected = torch.log_softmax(predictor.logits(piece, None)[:-1].float(), -1)
    expected = expected.gather(-1, piece[1:, None].to(expected.device)).squeeze(-1)
    found = float(_differences(predictor.scores(piece).to(expected.device), expected).mean())
    if found > _SCORE_ROUNDING:
        raise _leak(f"scores differ by {found:.3g} nats a token from its logits", "at once")
    return {"future": future, "rounding": rounding}


def _repeated(ids: Tensor, length: int) -> Tensor:
    if ids.dim() != 1 or len(ids) < 2:
        raise InputError(f"the leak check was given {tuple(ids.shape)} tokens; expected (T,) with T >= 2")
    return ids.cpu().repeat(-(-length // len(ids)))[:length]


def _differences(one: Tensor, other: Tensor) -> Tensor:
    """|one - other|, 0 for equal infinities and for NaN, which scoring reports with its place."""
    differ = (one != other) & ~one.isnan() & ~other.isnan()
    return torch.where(differ, (one - other).abs(), 0.0)


def _largest(one: Tensor, other: Tensor) -> float:
    return float(_differences(one, other).max())


def _leak(found: str, way: str) -> CausalityError:
    return CausalityError(
        f"this model looks ahead: read {way}, its {found}. A perplexity of it would mean nothing; expected predictions "
        "that depend on earlier tokens alone. Check the attention mask and whatever pools over the text."
    )
