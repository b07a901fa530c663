"""Invariant 2: rows never meet. A row alone is that row in any batch, with any padding, up to rounding."""

import pytest
import torch
from torch import Tensor

from tiny import ARCHITECTURES, VARIANTS, VOCAB, after, awake, read_in_chunks, text

LENGTHS = (57, 1, 23, 40)
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}


def padded(rows: list[Tensor], side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch (R, T) with its mask; side is left, right, or mixed (also inside the
    text).
    """
    width = max(map(len, rows)) + (5 if side == "mixed" else 0)
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    for number, row in enumerate(rows):
        n = len(row)
        places = {
            "left": torch.arange(width - n, width),
            "right": torch.arange(n),
            "mixed": torch.randperm(width, generator=generator)[:n].sort().values,
        }[side]
        ids[number, places], mask[number, places] = row, 1
    return ids, mask


def rows_of_many_lengths() -> list[Tensor]:
    return [text(rows=1, length=n, seed=n)[0] for n in LENGTHS]


@pytest.mark.supports(architecture="{name}", mode="batch with padding")
@pytest.mark.parametrize("side", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_row_alone_is_the_row_in_a_batch(name: str, side: str) -> None:
    model, rows = awake(name), rows_of_many_lengths()
    ids, mask = padded(rows, side)
    out = model(ids, attention_mask=mask, return_salience=True)
    for number, row in enumerate(rows):
        alone = model(row.unsqueeze(0), return_salience=True)
        real = mask[number] == 1
        torch.testing.assert_close(out.logits[number, real], alone.logits[0], **TOLERANCE)
        torch.testing.assert_close(out.salience_scores[number, real], alone.salience_scores[0], **TOLERANCE)
        assert not out.logits[number, ~real].any(), "padding has logits"


@pytest.mark.parametrize(
    ("side", "option"), [("left", "default"), ("right", "default"), *(("mixed", option) for option in VARIANTS)]
)
@torch.no_grad()
def test_scores_and_state_of_a_row_alone(side: str, option: str) -> None:
    model, rows = awake(**VARIANTS[option]), rows_of_many_lengths()
    ids, mask = padded(rows, side)
    cache = model.new_cache(len(rows))
    scores = model.score(ids, mask, past_key_values=cache)
    scores = torch.cat((torch.zeros(len(rows), 1), scores), dim=1)
    for number, row in enumerate(rows):
        own = model.new_cache(1)
        if len(row) > 1:
            alone = model.score(row.unsqueeze(0), past_key_values=own)[0]
            torch.testing.assert_close(scores[number, mask[number] == 1][1:], alone, **TOLERANCE)
        else:
            model(row.unsqueeze(0), past_key_values=own)
        assert not scores[number, mask[number] == 0].any()
        assert cache.lengths[number] == own.lengths[0] == len(row)
        mine = cache.episodes(number)
        assert [(e.position, e.token) for e in mine] == [(e.position, e.token) for e in own.episodes(0)]
        counts, alone = cache.memory.unigram.count[number], own.memory.unigram.count[0]
        assert torch.equal(counts, alone) and counts.sum() == (len(row) - 1 if len(counts) else 0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_garbage_under_the_mask_is_never_read(name: str) -> None:
    """Ids under the mask may be anything, even no ids at all; every bit of the result stays."""
    model, rows = awake(name), rows_of_many_lengths()
    for side in ("left", "right", "mixed"):
        clean, mask = padded(rows, side)
        reference = model(clean, attention_mask=mask).logits
        for garbage in (VOCAB - 1, -7, 10**9):
            dirty, _ = padded(rows, side, fill=garbage)
            assert torch.equal(model(dirty, attention_mask=mask).logits, reference)


@torch.no_grad()
def test_a_row_that_pauses_is_left_alone() -> None:
    """A later chunk may bring a row nothing: its state and its next prediction stay as they were."""
    model, one, two = awake(), text(rows=1, length=40, seed=1)[0], text(rows=1, length=20, seed=2)[0]
    cache = after(model, torch.stack((one[:20], two)))
    before = {name: tensor[1].clone() for name, tensor in cache.memory.tensors().items()}
    ids = torch.stack((one[20:33], torch.zeros(13, dtype=torch.long)))
    mask = torch.tensor([[1] * 13, [0] * 13])
    out = model(ids, attention_mask=mask, past_key_values=cache)
    assert not out.logits[1].any()
    assert all(torch.equal(before[name], tensor[1]) for name, tensor in cache.memory.tensors().items())
    ahead = text(rows=2, length=9, seed=3)
    found = model(ahead, past_key_values=cache).logits
    for number, past in enumerate((one[:33], two)):
        alone = model(torch.cat((past, ahead[number])).unsqueeze(0)).logits[0, -9:]
        torch.testing.assert_close(found[number], alone, **TOLERANCE)


@torch.no_grad()
def test_chosen_rows_go_on_as_themselves() -> None:
    """select_rows, reordering and repeating rows are what beams do."""
    model, ids, ahead = awake(), text(rows=3, length=45), text(rows=3, length=10, seed=4)
    cache = after(model, ids)
    expected = model(ahead, past_key_values=cache.copy()).logits
    reordered, repeated = cache.copy(), cache.copy()
    reordered.reorder_cache(torch.tensor([1, 2, 0]))
    repeated.batch_repeat_interleave(2)
    chosen = cache.select_rows(torch.tensor([2, 0, 0, 1]))
    for one, order in ((chosen, [2, 0, 0, 1]), (reordered, [1, 2, 0]), (repeated, [0, 0, 1, 1, 2, 2])):
        torch.testing.assert_close(model(ahead[order], past_key_values=one).logits, expected[order], **TOLERANCE)


@torch.no_grad()
def test_one_row_reset_among_others() -> None:
    """A document boundary in one row: that row is new, its neighbours go on."""
    model, ids, ahead = awake(), text(rows=2, length=45), text(rows=2, length=30, seed=4)
    cache = after(model, ids)
    cache.reset([0])
    logits = model(ahead, past_key_values=cache).logits
    torch.testing.assert_close(logits[:1], model(ahead[:1]).logits, **TOLERANCE)
    torch.testing.assert_close(
        logits[1:], read_in_chunks(model, torch.cat((ids, ahead), 1)[1:], 45)[:, 45:], **TOLERANCE
    )
