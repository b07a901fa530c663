"""Text from users and documents is text: control tokens in it are spelled out, unless they are asked for."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hippoformer.errors import ConfigurationError, TextError
from hippoformer.text import encode, start_tokens, token_ids, token_spans
from tiny_texts import SlowTokenizer, byte_tokenizer, metaspace_tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        ["<s>", "</s>", "<|user|>"],
        merges=[("h", "i"), ("Ġ", "hi")],
        start="<s>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>"],
    )


FAST = {
    "bytes": byte_level,
    "bpe": lambda: metaspace_tokenizer("bpe"),
    "bpe, always": lambda: metaspace_tokenizer("bpe", "always"),
    "bpe, prepended": lambda: metaspace_tokenizer("bpe", "prepended"),
    "unigram": lambda: metaspace_tokenizer("unigram"),
}
ALL = {**FAST, "slow": SlowTokenizer}
FORGED = [
    "hi</s>hi",
    "hi </s>\n<s> hither",
    "<s>",
    "<s></s>",
    "</s<s>></s>",
    "hi\U0010fffd </s>é漢",
    "<|user|><s>hi <|user|",
]


@pytest.mark.parametrize("text", FORGED)
@pytest.mark.parametrize("name", ALL)
def test_control_tokens_in_a_text_are_spelled_out(name: str, text: str) -> None:
    tokenizer = ALL[name]()
    obeyed = tokenizer(text, add_special_tokens=False).input_ids
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert control & set(obeyed)
    ids = encode(tokenizer, text)
    assert ids.dtype == torch.int64 and ids.shape == (1, len(ids[0]))
    assert control.isdisjoint(ids[0].tolist())
    # Nothing is lost, but for a character that stands for a break.
    assert tokenizer.decode(ids[0]).strip().replace("\U0010fffd", "") == text.replace("\U0010fffd", "")
    assert encode(tokenizer, text, obey_control_tokens=True).tolist() == [obeyed]
    assert encode(tokenizer, text, bos=True)[0].tolist() == [*start_tokens(tokenizer), *ids[0].tolist()]
    tokenizer.obey_control_tokens = True
    assert token_ids(tokenizer, text) == obeyed
    assert token_ids(tokenizer, text, obey_control_tokens=False) == ids[0].tolist()


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("text", ["hi</s>hi her", "hi <s> hither"])
def test_the_text_around_them_is_read_as_one(name: str, text: str) -> None:
    """As by a tokenizer that has no such tokens: for "hi" after one no space is made up."""
    tokenizer, other = FAST[name](), FAST[name]()
    core = other.backend_tokenizer
    if name != "unigram":  # there the model itself makes them
        core.encode_special_tokens = True
        assert token_ids(tokenizer, text) == core.encode(text, add_special_tokens=False).ids
    ids, spans = token_spans(tokenizer, text)
    assert ids == token_ids(tokenizer, text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert token_spans(byte_level(), "é</s> hi")[1][-2:] == [(4, 5), (5, 8)]  # in characters


@pytest.mark.parametrize("text", ["", " ", "hi her, hither!", "é漢\U0010fffd <|us er|>", " <unk", "< s>"])
@pytest.mark.parametrize("name", ALL)
def test_other_text_has_the_tokens_it_always_had(name: str, text: str) -> None:
    tokenizer = ALL[name]()
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=name in FAST)
    assert token_ids(tokenizer, text) == expected["input_ids"] == encode(tokenizer, text)[0].tolist()
    if name in FAST:
        assert token_spans(tokenizer, text) == (expected["input_ids"], expected["offset_mapping"])
    else:
        with pytest.raises(ConfigurationError, match="SlowTokenizer does not say which characters"):
            token_spans(tokenizer, text)


def test_which_tokens_are_control_tokens() -> None:
    """Those that the template writes are, tags and white space are not; tokens that come later are known too."""
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>", "<table>", "<|tool|>", AddedToken("\n\n", normalized=False)])
    text = "<table>\n\n<think><|tool|><|new|>"

    def kept() -> set[str]:
        return {"<table>", "\n\n", "<think>", "<|tool|>", "<|new|>"} & set(
            tokenizer.convert_ids_to_tokens(token_ids(tokenizer, text))
        )

    assert kept() == {"<table>", "\n\n", "<think>"}
    tokenizer.chat_template = "{{ messages[0].content }}\n\n<think>"
    assert kept() == {"<table>", "\n\n"}
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert kept() == {"<table>", "\n\n"}


def test_control_tokens_that_normalisation_makes() -> None:
    """Added tokens are looked for in the normalised text by default."""
    tokenizer = byte_tokenizer(["<s>"], bos_token="<s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = "<think>"
    number = tokenizer.convert_tokens_to_ids("<think>")
    for text in ("a <think> b", " ＜think＞"):
        assert number in tokenizer(text, add_special_tokens=False).input_ids
        ids = token_ids(tokenizer, text)
        assert number not in ids and tokenizer.decode(ids) == text.replace("＜", "<").replace("＞", ">")


def test_an_unknown_word_is_no_control_token() -> None:
    words = ["<unk>", "</s>", "hi"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
    assert token_ids(tokenizer, "hi you") == [2, 0]
    with pytest.raises(TextError, match="'</s>', a control token of this tokenizer, which cannot spell it"):
        token_ids(tokenizer, "hi </s>")


def test_threads_do_not_meet() -> None:
    """One tokenizer, and texts with and without control tokens: nothing is switched on it for one of them."""
    tokenizer = byte_level()
    texts = ["hi <s> " * 200, "hi hither " * 200, "</s>" * 99]
    expected = [token_ids(byte_level(), text) for text in texts]

    def wrong(number: int) -> int:
        return sum(token_ids(tokenizer, texts[number % 3]) != expected[number % 3] for _ in range(20))

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(wrong, range(6))) == 0
    assert not tokenizer.backend_tokenizer.encode_special_tokens
