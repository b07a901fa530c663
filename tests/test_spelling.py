"""The bytes of every token, and which places between tokens are places between characters."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hippoformer.errors import InputError
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.model.base_models import load_tokenizer
from tiny_texts import byte_tokenizer

TEXTS = [
    "Mr. Smith paid ½ of £3.50 at the café — naïvely.\n\n\tDone.",
    "今天天气很好。我们去公园吧！",
    "😀 👩‍👩‍👧 🎉🎉 emoji",
    "Привет, мир. Как дела?",
    "مرحبا بالعالم. كيف حالك؟",
    "ภาษาไทยไม่มีช่องว่าง",
]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_are_their_bytes(text: str) -> None:
    tokenizer = byte_tokenizer()
    spelling = Spelling.of(tokenizer, len(tokenizer))
    assert spelling.text(tokenizer(text).input_ids) == text
    assert [spelling.pieces[number] for number in tokenizer(text).input_ids] == [bytes([b]) for b in text.encode()]


def test_sentencepiece_tokens_have_spaces_and_bytes() -> None:
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "cat", "猫", "##s"]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    ids = [257, 258, 259, 260, 0xE4 + 1, 0xBD + 1, 0xA0 + 1, 261]
    assert Spelling.of(tokenizer, 300).text(ids) == tokenizer.decode(ids) == " the cat猫你##s"


def test_words_and_word_pieces_are_joined_by_spaces() -> None:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2, "now": 3}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert Spelling.of(tokenizer, 4).text([1, 2, 3]) == " playing now"
    assert tokenizer.decode([1, 2, 3]) == "playing now"
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "red": 1, "fox": 2}, unk_token="[UNK]"))  # without a decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    assert Spelling.of(tokenizer, 3).text([1, 2]) == " " + tokenizer.decode([1, 2])


def test_tokens_that_are_bytes() -> None:
    """Remote code around tiktoken gives bytes where others give strings."""
    tokens = [b"a", b"\xe4\xbd", b"\xa0", "<|end|>"]
    end = AddedToken("<|end|>", special=True)

    class Remote(SimpleNamespace):
        def __len__(self) -> int:
            return len(tokens)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[bytes | str]:
            return [tokens[number] for number in ids]

    spelling = Spelling.of(Remote(added_tokens_decoder={3: end}, all_special_ids=[3]), 6)
    assert spelling.text([0, 1, 2, 3, 0]) == "a你a" and spelling.text([0, 3, 0], mark=True) == "a\na"


def test_added_tokens_are_spelled_and_control_tokens_are_not() -> None:
    tokenizer = byte_tokenizer(last=["<|end|>"], eos_token="<|end|>")
    tokenizer.add_tokens(["Größe", AddedToken("<tool>", special=False)])
    spelling = Spelling.of(tokenizer, len(tokenizer) + 5)
    ids = tokenizer("a Größe<tool>b<|end|>").input_ids
    assert spelling.text(ids) == "a Größe<tool>b"  # the tokenizer's own decoder takes "ö" for a byte
    assert spelling.pieces[tokenizer.eos_token_id] == b"" and spelling.pieces[-5:] == [b""] * 5
    with pytest.raises(InputError, match="not below"):
        spelling.text([len(tokenizer) + 5])


@pytest.mark.real
@pytest.mark.parametrize("text", [*TEXTS, "<|im_start|>user\nhi<|im_end|>\n"])
def test_the_shipped_base_is_spelled_as_it_decodes(text: str) -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    spelling, ids = Spelling.of(tokenizer, 49_152), tokenizer(text).input_ids
    assert spelling.text(ids) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
