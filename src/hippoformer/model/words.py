"""Which tokens are the same word: with a space before it or at the beginning of a line.

Tokenizers give a word two ids, one with the space in front of it and one without. What was told in one dress and is
asked for in the other is still the same story (see `hippocampus.stories`).
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# How byte-level and SentencePiece vocabularies write a space.
_SPACES = ("\u0120", "\u2581")


def words_of_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """(vocab_size,) int32: of each token the first id that is the same word; runs of spaces stay what they are.

    Args:
        tokenizer: of the model. vocab_size: rows of its embedding; ids beyond the tokenizer's are words of their own.
    """
    first: dict[str, int] = {}
    words = torch.arange(vocab_size, dtype=torch.int32)
    known = min(vocab_size, len(tokenizer))
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
        bare = token[1:] if token is not None and token.startswith(_SPACES) else token
        if bare and not bare.startswith(_SPACES):
            words[number] = first.setdefault(bare, number)
    return words
