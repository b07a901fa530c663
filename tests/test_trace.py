"""A trace says what the model itself says, token by token."""

import numpy as np
import pytest
import torch

from evaluation.trace import run as trace
from hippoformer import HippoFormer
from hippoformer.data import Document
from hippoformer.errors import TextError
from tiny_texts import byte_tokenizer, text, tiny_load, tiny_tokenizer

PASSAGE = text(1, 60)
DOCUMENT = Document("again", PASSAGE + text(2, 60) + PASSAGE, "made up")


@pytest.fixture(scope="module")
def model() -> HippoFormer:
    """Recall is loud: most tokens are recalled, from the window and from the store."""
    model, _ = tiny_load(buffer_size=40, window=24, segment_len=16)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(2.5)
        model.hippocampus.salience_gate.local_out.weight.mul_(20.0)
    return model


@torch.no_grad()
def test_columns_are_what_the_model_says(model: HippoFormer) -> None:
    result = trace.run(model, tiny_tokenizer(), [DOCUMENT], trace.Options())
    tokens = result.details["tokens"]
    assert "".join(tokens["text"]) == DOCUMENT.text and {len(column) for column in tokens.values()} == {180}
    ids = torch.tensor([tiny_tokenizer()(DOCUMENT.text).input_ids])
    on = model(ids, return_salience=True)
    with model.memory_off():
        off = model(ids).logits
    for column, logits in (("log_p", on.logits), ("log_p_off", off)):
        expected = torch.log_softmax(logits, -1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
        assert tokens[column][1:] == pytest.approx(expected.tolist(), abs=2e-4)
    assert tokens["salience"] == pytest.approx(on.salience_scores[0].tolist(), abs=1e-3)
    assert all(
        0 <= weight <= 1 and 0 <= share <= 1 for weight, share in zip(tokens["weight"], tokens["share"], strict=True)
    )
    rows = {(row.condition, row.metric): row.value for row in result.rows}
    ratio = rows["memory", "perplexity"] / rows["off", "perplexity"]
    assert rows["memory", "against off, %"] == pytest.approx(100 * (ratio - 1))


def test_what_was_recalled_is_what_followed_before() -> None:
    """Recall by content alone, no token yet followed: where a passage comes again, its tokens are recalled."""
    model, _ = tiny_load(buffer_size=256, window=24, segment_len=16)
    with torch.no_grad():
        model.hippocampus.recall.log_scale.fill_(4.0)
        model.hippocampus.recall.query_proj.weight.copy_(model.hippocampus.recall.key_proj.weight)
    tokens = trace.run(model, tiny_tokenizer(), [DOCUMENT], trace.Options()).details["tokens"]
    again = list(zip(tokens["text"], tokens["recalled"], strict=True))[130:]
    assert np.mean([one == other for one, other in again]) > 0.5


def test_letters_of_several_tokens_belong_to_the_first(model: HippoFormer) -> None:
    started = byte_tokenizer(["<s>"], start="<s>", bos_token="<s>")
    assert trace.token_texts(started, Document("wide", "naïve café", "made up"), 5) == ["", "n", "a", "ï", ""]
    with pytest.raises(TextError, match="two tokens"):
        trace.run(model, tiny_tokenizer(), [Document("short", "a", "made up")], trace.Options())
