"""Which tokens are the same word, and that a match goes on across them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hippoformer import HippoFormer, load
from hippoformer.errors import InputError
from hippoformer.hippocampus.continuation import LONGEST
from hippoformer.hippocampus.spelling import Spelling
from tiny import VOCAB, awake, text
from tiny_texts import LETTERS, byte_tokenizer, tiny_load

# A space and "a" are one token, and so are two spaces, and a space before an accented letter's first byte.
MERGES = [("Ġ", "a"), ("Ġ", "Ġ"), ("Ġ", "Ã")]


def test_a_word_is_the_same_with_a_space_before_it_and_without() -> None:
    tokenizer = byte_tokenizer(merges=MERGES)
    spelling = Spelling.of(tokenizer, len(tokenizer) + 3)
    words, endings = spelling.words(), spelling.endings()
    bare, spaced, spaces = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "Ġa", "ĠĠ"))
    assert words[bare] == words[spaced] == bare
    assert words[spaces] == spaces and words[tokenizer.convert_tokens_to_ids("Ġ")] != spaces
    others = [number for number in range(len(words)) if number not in (spaced, tokenizer.convert_tokens_to_ids("ĠÃ"))]
    assert words[others].tolist() == others  # also the rows of the embedding that no token has
    assert endings[[bare, spaced, spaces]].tolist() == [98, (33 << 8) + 98, (33 << 8) + 33] and not endings[-3:].any()
    assert not endings[tokenizer.all_special_ids].any()


def test_endings_are_bytes_and_all_white_space_is_a_space() -> None:
    spelling = Spelling([b" the", b"the", b"\xe4", b"A", b"\n", b"", b"abcdefghij"])
    words, endings = spelling.words().tolist(), spelling.endings().tolist()
    assert words == [0, 0, 2, 3, 4, 5, 6]
    assert endings[2:6] == [0xE4 + 1, ord("A") + 1, ord(" ") + 1, 0]
    assert endings[6] == int.from_bytes(bytes(letter + 1 for letter in b"defghij"), "big")


def twin_passages() -> torch.Tensor:
    """A passage of ten tokens, and later the same in other tokens of the same words."""
    ids = text(rows=1, length=50)
    ids[:, 34:44] = VOCAB - 1 - ids[:, 4:14]
    return ids


def followed(model: HippoFormer, ids: torch.Tensor) -> torch.Tensor:
    """(1, N) the longest match at each token, in tokens."""
    found: list[torch.Tensor] = []
    hook = model.hippocampus.recall.register_forward_hook(lambda *call: found.append(call[-1].matched.amax(-1)))
    with hook, torch.no_grad():
        model(ids)
    return torch.cat(found, dim=-1)


def test_a_match_goes_on_in_other_tokens_of_the_same_words() -> None:
    model, ids = awake(buffer_size=64, max_replay_rounds=0), twin_passages()
    plain = followed(model, ids)
    mirrored = torch.minimum(torch.arange(VOCAB), VOCAB - 1 - torch.arange(VOCAB))
    model.hippocampus.recall.set_words(mirrored, torch.zeros(VOCAB, dtype=torch.int64))
    assert followed(model, ids)[0, 43] >= 10 > plain[0, 43]


def test_a_name_cut_into_other_tokens_is_recognised_by_its_characters() -> None:
    """Two sentences go on alike; the one about the name that was just read counts for more, in whatever pieces."""
    model = awake(buffer_size=64, max_replay_rounds=0)
    model.hippocampus.recall.follow_gate.bias.detach().fill_(8.0)
    spelled = {1: " ann", 2: "a", 3: " an", 4: "na", 5: " eva", 6: " lives", 7: " in", 8: ".", 9: " rome", 10: " oslo"}
    endings = torch.zeros(VOCAB, dtype=torch.int64)
    for token, letters in spelled.items():
        endings[token] = int.from_bytes(letters[-7:].encode())
    model.hippocampus.recall.set_words(torch.arange(VOCAB), endings)
    told = [8, 1, 2, 6, 7, 9, 8, 5, 6, 7, 10, 8, 8]
    cache = model.new_cache(1)
    with torch.no_grad():
        model(torch.tensor([told]), past_key_values=cache)
        for token in (3, 4, 6, 7):
            model(torch.tensor([[token]]), past_key_values=cache)
    episodes, weights = cache.memory.episodes, cache.memory.vote.weights
    assert all(episodes.matched[0, episodes.token[0] == token].max() == 2 for token in (9, 10))
    rome, oslo = (float(weights[0, episodes.token[0] == token].sum()) for token in (9, 10))
    assert rome > 5 * oslo, "2 + 5 / 3 tokens against 2 + 1 / 3, to the power of 8"


@pytest.mark.parametrize("values", [(9, 10), (10, 9)])
def test_what_was_told_last_is_recalled(values: tuple[int, int]) -> None:
    """The same sentence twice, with another end; but a longer match is still the better one, however old."""
    model = awake(buffer_size=64, max_replay_rounds=0)
    sentence = [1, 2, 3, 4, 5, 6]

    def recalled(told: list[int], asked: list[int]) -> list[float]:
        """Of each value, how much of the weights its episode has when the question has been read."""
        cache = model.new_cache(1)
        with torch.no_grad():
            model(torch.tensor([told]), past_key_values=cache)
            model(torch.tensor([asked]), past_key_values=cache)
        token, weights = cache.memory.episodes.token[0], cache.memory.vote.weights[0]
        return [float(weights[token == value].sum()) for value in values]

    with torch.no_grad():  # follow any match, by its length alone
        model.hippocampus.recall.follow_gate.bias.fill_(8.0)
        model.hippocampus.recall.log_scale.fill_(-9.0)
        model.hippocampus.recall.priority_weight.zero_()
    first, last = recalled([0, 8, *sentence, values[0], 7, 8, *sentence, values[1], 11], [8, *sentence])
    assert last > 0.85 and first < 0.15
    longer, shorter = recalled([0, 8, *sentence, values[0], 7, 11, *sentence, values[1], 7], [8, *sentence])
    assert longer > 0.6 > shorter, "one token more"


def test_words_of_another_vocabulary_are_refused() -> None:
    told = torch.arange(VOCAB)
    for wrong in ((told[1:], told), (told, told[1:])):
        with pytest.raises(InputError, match="words of shape"):
            awake().hippocampus.recall.set_words(*wrong)


def test_words_are_saved_with_the_weights(tmp_path: Path) -> None:
    model, _ = tiny_load()
    words = torch.arange(len(LETTERS) + 1) // 2
    model.hippocampus.recall.set_words(words, words.flip(0))
    model.save_pretrained(tmp_path)
    loaded = HippoFormer.from_pretrained(tmp_path, base_model=model.base).hippocampus.recall
    assert torch.equal(loaded.word_of_token.long(), words) and torch.equal(loaded.ending_of_token, words.flip(0))
    file = tmp_path / "model.safetensors"  # as saved before tokens were spelled
    save_file({name: t for name, t in load_file(file).items() if not name.endswith("ending_of_token")}, file)
    assert not HippoFormer.from_pretrained(tmp_path, base_model=model.base).hippocampus.recall.ending_of_token.any()


def test_the_longest_match_stays_finite_in_a_text_of_one_token() -> None:
    """Every episode matches, and a memory file of an earlier version has counted for ever."""
    model, ids = awake(), torch.full((1, 40), 5)
    cache = model.new_cache(1)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        assert cache.memory.episodes.matched.max() > 10
        cache.memory.episodes.matched.mul_(1e6)
        assert model(ids, past_key_values=cache).logits.isfinite().all()
    assert cache.memory.episodes.matched.max() == LONGEST


@pytest.mark.real
def test_the_shipped_words_are_those_of_its_tokenizer() -> None:
    model, tokenizer = load("smollm2-135m")
    recall = model.hippocampus.recall
    spelling = Spelling.of(tokenizer, len(recall.word_of_token))
    words, endings = spelling.words(), spelling.endings()
    assert torch.equal(recall.word_of_token.cpu(), words)
    # Other bytes were numbered in another way when the weights were made, and control tokens were spelled.
    plain = torch.tensor(
        [bool(piece) and piece.isascii() and piece.decode().isprintable() for piece in spelling.pieces]
    )
    assert plain.sum() > 45_000 and torch.equal(recall.ending_of_token.cpu()[plain], endings[plain])
    name, spaced = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in ("London", " London"))
    assert name != spaced and words[name] == words[spaced]
