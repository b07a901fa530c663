"""Invariant 1: logits at <= t are bit-identical whatever follows t."""

import pytest
import torch
from torch import Tensor

from tiny import ARCHITECTURES, VARIANTS, VOCAB, awake, text

LENGTH = 50
# First token, inside a segment, last of a segment, first of the next, late.
MOMENTS = (0, 4, 23, 24, 44)
INNER = ["gemma2", "gemma3", "gpt-neox", "cohere", "gpt2"]


def with_other_future(ids: Tensor, moment: int) -> Tensor:
    """The same text up to `moment`, and other tokens in every place after it."""
    step = torch.randint(1, VOCAB, ids.shape, generator=torch.Generator().manual_seed(moment))
    after = torch.arange(ids.shape[1]) > moment
    return torch.where(after, (ids + step) % VOCAB, ids)


@pytest.mark.supports(architecture="{name}", mode="causal")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_future_changes_nothing(name: str, training: bool) -> None:
    model, ids = awake(name).train(training), text(rows=2, length=LENGTH)

    def read(tokens: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)  # dropout
        with torch.set_grad_enabled(training):
            out = model(tokens, return_salience=True)
        return out.logits.detach(), out.salience_scores

    logits, salience = read(ids)
    for moment in MOMENTS:
        other_logits, other_salience = read(with_other_future(ids, moment))
        assert torch.equal(logits[:, : moment + 1], other_logits[:, : moment + 1]), f"token {moment} sees what follows"
        assert torch.equal(salience[:, : moment + 1], other_salience[:, : moment + 1])
        assert not torch.equal(logits[:, moment + 1], other_logits[:, moment + 1]), "the texts do not differ"


@pytest.mark.parametrize(
    ("name", "option"),
    [("llama", option) for option in VARIANTS]
    + [(name, option) for name in INNER for option in ("inner layer", "last layer")],
)
@torch.no_grad()
def test_no_option_looks_ahead(name: str, option: str) -> None:
    model, ids = awake(name, **VARIANTS[option]), text(rows=2, length=LENGTH)
    logits, scores = model(ids).logits, model.score(ids)
    for moment in MOMENTS[1:4]:
        other = with_other_future(ids, moment)
        assert torch.equal(logits[:, : moment + 1], model(other).logits[:, : moment + 1])
        assert torch.equal(scores[:, :moment], model.score(other)[:, :moment])  # entry t - 1 is for token t


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_the_future_changes_nothing_with_a_full_memory(name: str) -> None:
    model, ids = awake(name), text(rows=2, length=20, seed=1)
    start = model.new_cache(2)
    model(text(rows=2, length=67), past_key_values=start)  # ends within a segment
    assert (start.memory.episodes.position[:, : model.config.buffer_size] >= 0).all()
    logits = model(ids, past_key_values=start.copy()).logits
    for moment in (0, 4, 11, 18):
        other = model(with_other_future(ids, moment), past_key_values=start.copy()).logits
        assert torch.equal(logits[:, : moment + 1], other[:, : moment + 1])
