"""Text metrics against formulas worked out here, and word classes under every kind of tokenizer."""

import math
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hippoformer.errors import ConfigurationError, InputError, MissingPackageError
from hippoformer.evaluation.text_metrics import best_answer, corpus_bleu, distinct, text_scores, token_f1
from hippoformer.evaluation.word_classes import by_list, find_words, tagger, token_classes
from tiny_texts import byte_tokenizer

TEXTS = ["the cat sat on the mat today", "we saw a dog run home"]
REFERENCES = ["the cat lay on the mat", "we saw a dog run home again and again"]


def bleu(n: int) -> float:
    """The definition: geometric mean of clipped precisions, times the penalty for brevity."""
    logs, length, wanted = 0.0, sum(len(t.split()) for t in TEXTS), sum(len(r.split()) for r in REFERENCES)
    for size in range(1, n + 1):
        right = total = 0
        for text, reference in zip(TEXTS, REFERENCES, strict=True):
            grams, allowed = (
                Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
                for words in (text.split(), reference.split())
            )
            right, total = right + sum((grams & allowed).values()), total + sum(grams.values())
        logs += math.log(right / total) / n
    return 100 * math.exp(logs + min(0.0, 1 - wanted / length))


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest_common_subsequence(a[:-1], b[:-1])
    return max(longest_common_subsequence(a[:-1], b), longest_common_subsequence(a, b[:-1]))


def test_bleu_is_its_definition() -> None:
    found = corpus_bleu(TEXTS, REFERENCES)
    for n in range(1, 5):
        assert found[f"bleu_{n}"] == pytest.approx(bleu(n), rel=1e-6)
    assert found["bleu"] == found["bleu_4"]
    assert corpus_bleu(TEXTS, TEXTS)["bleu"] == pytest.approx(100)
    with pytest.raises(InputError, match="one reference for each"):
        corpus_bleu(TEXTS, REFERENCES[:1])


def test_rouge_f1_and_the_rest_of_one_text() -> None:
    text, reference = (t.split() for t in (TEXTS[0], REFERENCES[0]))
    found = text_scores(TEXTS[0], REFERENCES[0])
    common = sum((Counter(text) & Counter(reference)).values())
    assert found["rouge_1"] == pytest.approx(2 * common / (len(text) + len(reference)))
    longest = longest_common_subsequence(text, reference)
    assert found["rouge_l"] == pytest.approx(2 * longest / (len(text) + len(reference)))
    # Without the articles: cat sat on mat today / cat lay on mat.
    assert found["f1"] == pytest.approx(2 * 3 / (5 + 4)) == pytest.approx(token_f1(TEXTS[0], REFERENCES[0]))
    assert found["exact_match"] == 0.0 and text_scores("The  Cat!", "a cat")["exact_match"] == 1.0
    assert distinct("a b a b a", 2) == pytest.approx(2 / 4) and distinct("a", 2) == 0.0
    assert token_f1("", "the") == 1.0 and token_f1("", "cat") == 0.0


def test_the_best_of_several_answers() -> None:
    assert best_answer("in the garden", ["kitchen", "garden"])["f1"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="accepted answer"):
        best_answer("x", [])


SENTENCE = "The café owners didn’t sell 25 cats, and they're happily swimming (Zürich 日本)."
CLASSES = {
    "The": "function",
    "café": "content",
    "owners": "content",
    "didn’t": "function",
    "sell": "content",
    "25": "other",
    "cats": "content",
    "and": "function",
    "they're": "function",
    "happily": "content",
    "swimming": "content",
    "Zürich": "content",
    "日本": "content",
}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Pieces with the mark ▁ in front of words, as Llama's and Gemma's vocabularies have."""
    pieces = sorted({"▁", *SENTENCE, "▁The", "▁c", "af", "ow", "ners", "▁and", "▁happ", "ily", "swim", "ming"} - {" "})
    core = Tokenizer(models.Unigram([(piece, -float(len(pieces) - len(piece))) for piece in pieces], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def wordpiece() -> PreTrainedTokenizerFast:
    """Pieces with ## inside words, lower case and without accents: the text itself no longer holds them."""
    vocabulary = {
        "[UNK]": 0,
        "the": 1,
        "own": 2,
        "##ers": 3,
        "cat": 4,
        "##s": 5,
        "and": 6,
        "zurich": 7,
        "(": 8,
        "25": 9,
    }
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_level() -> PreTrainedTokenizerFast:
    """Letters as bytes, words with the mark Ġ."""
    return byte_tokenizer(merges=[("Ġ", "c"), ("Ġ", "o"), ("Ġo", "w"), ("i", "n")])


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, wordpiece])
def test_tokens_have_the_class_of_their_word(make) -> None:  # type: ignore[no-untyped-def]
    offsets = make()(SENTENCE, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    found = token_classes(SENTENCE, offsets)
    assert len(found) == len(offsets) > 10
    for (start, end), label in zip(offsets, found, strict=True):
        covered = SENTENCE[start:end].strip()
        words = [w for a, b in find_words(SENTENCE) if a < end and start < b for w in [SENTENCE[a:b]]]
        assert len(words) <= 1, "no token of these spans two words"
        assert label == (CLASSES[words[0]] if words else "other"), (covered, words, label)
    assert {"content", "function", "other"} == set(found)


def test_special_tokens_have_no_class_and_a_token_of_two_words_goes_with_the_longer() -> None:
    assert token_classes("of cats", [(0, 0), (0, 7), (2, 3)]) == [None, "content", "other"]


def test_the_list_knows_closed_classes() -> None:
    assert by_list(["Of", "THEIR", "won't", "it's", "shouldn’t"]) == ["function"] * 5
    assert by_list(["house", "o'clock", "x9", "1984"]) == ["content", "content", "content", "other"]


def test_a_tagger_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"The": "DT", "saw": "NN", "is": "VBZ", "sharp": "JJ", "7": "CD", "runs": "VBZ"}
    stand_in = ModuleType("nltk")
    stand_in.data = SimpleNamespace(find=lambda name: name)  # type: ignore[attr-defined]
    stand_in.pos_tag = lambda words: [(word, tags[word]) for word in words]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nltk", stand_in)
    monkeypatch.setitem(sys.modules, "spacy", None)
    name, tag = tagger()
    assert name == "nltk"
    assert tag(list(tags)) == ["function", "content", "function", "content", "other", "content"]

    def no_model(*_: object, **__: object) -> None:
        raise LookupError

    stand_in.data = SimpleNamespace(find=no_model)  # type: ignore[attr-defined]
    assert tagger() == ("word list", by_list)
    with pytest.raises(MissingPackageError, match="without its English tagger"):
        tagger("nltk")
    with pytest.raises(MissingPackageError, match="spacy"):
        tagger("spacy")
    with pytest.raises(ConfigurationError, match="word list"):
        tagger("flair")  # type: ignore[arg-type]


def test_spacy_is_given_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"The": "DET", "saw": "NOUN", "is": "AUX", "7": "NUM"}

    class Language:
        vocab = None

        def __call__(self, words: list[str]) -> list[SimpleNamespace]:
            return [SimpleNamespace(pos_=tags[word]) for word in words]

    stand_in = ModuleType("spacy")
    stand_in.load = lambda name, exclude: Language()  # type: ignore[attr-defined]
    stand_in.tokens = SimpleNamespace(Doc=lambda vocab, words: words)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "spacy", stand_in)
    name, tag = tagger()
    assert name == "spacy" and tag(list(tags)) == ["function", "content", "function", "other"]
