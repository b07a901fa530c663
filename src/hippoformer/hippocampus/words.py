"""Which tokens are the same word, and how each is spelled at its end.

Tokenizers give a word two ids, one with the space in front of it and one without, and cut a rare name into other pieces
at the beginning of a line than within one. `hippocampus.continuation` compares words, and the characters before them.
"""

import re
from typing import Any

import torch
from torch import Tensor

# So many characters of a token's end are known, a byte each in an int64; the eighth would be its sign.
CHARACTERS = 7

# How byte-level and SentencePiece vocabularies write a space, and the former the other white space.
_SPACES = ("\u0120", "\u2581", " ")
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_BLANKS = frozenset((*_SPACES, "\u0109", "\u010a", "\u010d", "\t", "\n", "\r"))


def words_of_tokens(tokenizer: Any, vocab_size: int) -> tuple[Tensor, Tensor]:
    """What `Recall.set_words` takes.

    Args:
        tokenizer: of transformers.
        vocab_size: rows of the model's embedding; ids beyond the tokenizer's are words of their own.

    Returns:
        (vocab_size,) int32, of each token the first id that is the same word; runs of spaces stay what they are.
        (vocab_size,) int64, the last `CHARACTERS` characters of each, the last in the lowest byte; all white space is
        one character. 0 for special tokens, and for ids that no token has: nothing is known of how they are spelled.
    """
    first: dict[str, int] = {}
    words = torch.arange(vocab_size, dtype=torch.int32)
    endings = torch.zeros(vocab_size, dtype=torch.int64)
    known = min(vocab_size, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
        if token is None:
            continue
        token = _spelled(token)
        bare = token[1:] if token.startswith(_SPACES) else token
        if bare and not bare.startswith(_SPACES):
            words[number] = first.setdefault(bare, number)
        if number not in special:
            endings[number] = _ending(token)
    return words, endings


def _spelled(token: str | bytes) -> str:
    """A token in characters: those of tokenizers on tiktoken are bytes, and SentencePiece has some of one byte each."""
    if isinstance(token, bytes):
        return token.decode("latin-1")
    if _BYTE.fullmatch(token):
        byte = int(token[3:5], 16)
        return chr(byte if byte < 0x80 else 0xE000 + byte)  # not the character of that number, but a part of one
    return token


def _ending(token: str) -> int:
    """A byte from 1 to 255 for each of the last characters; of other alphabets some share one."""
    codes = (ord(" " if character in _BLANKS else character) % 255 + 1 for character in reversed(token[-CHARACTERS:]))
    return sum(code << 8 * place for place, code in enumerate(codes))
