"""The bytes of every token of a vocabulary, and which tokens are the same word.

Byte-level vocabularies (GPT-2, Llama 3, Qwen) spell a byte as one of 256 letters, SentencePiece spells a space as
U+2581 and a byte it has no piece for as <0xE4>, WordPiece marks the pieces that continue a word, and tokens of tiktoken
are bytes. What a row has read is the bytes of its tokens one after the other; one character may take several tokens.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hippoformer.errors import InputError

# Bytes of a token's end that `Spelling.endings` gives, each in a byte of an int64; the eighth would be its sign.
CHARACTERS = 7

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = re.compile(rb"\s")


@dataclass(frozen=True)
class Spelling:
    """How a vocabulary of V tokens is spelled.

    Attributes:
        pieces: V, the bytes of each token; none for control tokens, and for ids that no token has.
    """

    pieces: Sequence[bytes]

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> "Spelling":
        """Spelling of a Hugging Face tokenizer.

        Args:
            tokenizer: fast or slow, or remote code whose tokens are bytes.
            vocab_size: V, rows of the model's embedding.
        """
        known = min(vocab_size, len(tokenizer))
        tokens = tokenizer.convert_ids_to_tokens(list(range(known)))
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        control |= set(tokenizer.all_special_ids)
        spell = _speller(tokenizer, [token for i, token in enumerate(tokens) if i not in added])
        pieces = []
        for number, token in enumerate(tokens):
            if token is None or number in control:
                pieces.append(b"")
            elif number in added:
                pieces.append(added[number].encode())
            else:
                pieces.append(token if isinstance(token, bytes) else spell(token))
        return cls(pieces).resized(vocab_size)

    def resized(self, vocab_size: int) -> "Spelling":
        """The same for a vocabulary of another size; new tokens are spelled as nothing."""
        return Spelling([*self.pieces, *[b""] * vocab_size][:vocab_size])

    @cached_property
    def marked_pieces(self) -> list[bytes]:
        """As `pieces`, with a line end for tokens that have no bytes: control tokens part what stands around them."""
        return [piece or b"\n" for piece in self.pieces]

    def text(self, token_ids: Iterable[int], mark: bool = False) -> str:
        """The text of tokens that begin and end between characters; U+FFFD for bytes that are no character.

        Args:
            token_ids: ids below V. mark: True writes a line end for each control token.

        Raises:
            InputError: an id outside the vocabulary.
        """
        pieces = self.marked_pieces if mark else self.pieces
        try:
            return b"".join([pieces[number] for number in token_ids]).decode(errors="replace")
        except IndexError:
            raise InputError(
                f"a token id is not below {len(pieces)}, the size of the vocabulary spelled here"
            ) from None

    def words(self) -> Tensor:
        """(V,) int32, for each token the first id that is the same word: with a space in front of it or without.

        Tokenizers give a word two ids; `hippocampus.continuation` compares words. Runs of spaces are their own words.
        """
        first: dict[bytes, int] = {}
        words = torch.arange(len(self.pieces), dtype=torch.int32)
        for number, piece in enumerate(self.pieces):
            bare = piece.removeprefix(b" ")
            if bare and not bare.startswith(b" "):
                words[number] = first.setdefault(bare, number)
        return words

    def endings(self) -> Tensor:
        """(V,) int64, the last `CHARACTERS` bytes of each token plus one, the last in the lowest byte.

        All white space is a space. 0 where nothing is known of how a token is spelled.
        """
        spelled = (_BLANK.sub(b" ", piece)[-CHARACTERS:] for piece in self.pieces)
        return torch.tensor([int.from_bytes(bytes(min(b + 1, 255) for b in end), "big") for end in spelled])


def byte_alphabet() -> dict[str, int]:
    """The letter of each byte in byte-level vocabularies (GPT-2): printable ones are themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _speller(tokenizer: Any, tokens: list[Any]) -> Callable[[str], bytes]:
    """From a token to its bytes, by what the tokenizer's own decoder does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = repr(None if backend is None else backend.decoder)
    alphabet = byte_alphabet()
    letters = {letter for token in tokens if isinstance(token, str) for letter in token}
    slow_bytes = backend is None and "Ġ" in letters and letters <= alphabet.keys()
    if "ByteLevel" in decoder or slow_bytes:
        return lambda token: bytes(alphabet[c] for c in token) if alphabet.keys() >= set(token) else token.encode()
    if "WordPiece" in decoder:
        return lambda token: (token[2:] if token.startswith("##") else " " + token).encode()
    if backend is not None and backend.decoder is None and "▁" not in letters:
        return lambda token: b" " + token.encode()  # such a tokenizer joins its tokens with spaces

    def sentencepiece(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return sentencepiece
