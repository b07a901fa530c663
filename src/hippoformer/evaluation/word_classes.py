"""Content words and function words, and which tokens belong to them, whatever the tokenizer.

Words are found in the text, not in the tokens: a tokenizer's marks (Ġ, ▁, ##, bytes of one letter) never matter. A
token belongs to the word whose characters it covers, by the offsets of the fast tokenizer; blanks do not count.

Content words are nouns, verbs, adjectives and adverbs; function words are the closed classes: determiners, pronouns,
prepositions, conjunctions, auxiliaries, particles. Everything else (numbers, punctuation, symbols) is neither. Tags
come from spaCy or nltk where one is installed with its English model; otherwise a list of the closed classes decides.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from hippoformer.errors import ConfigurationError, MissingPackageError
from hippoformer.evaluation.packages import needed

WordClass = Literal["content", "function", "other"]
TaggerName = Literal["auto", "spacy", "nltk", "word list"]
Tagger = Callable[[Sequence[str]], list[WordClass]]

# Letters of any script, with apostrophes inside; digits make a number.
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_BLOCK = 2_000  # words a tagger is given at once

# fmt: off
_CLOSED_CLASSES = {
    "determiners": """a an the this that these those each every either neither some any no all both half several few
        many much more most less least enough such another other what which whose""",
    "pronouns": """i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its
        itself we us our ours ourselves they them their theirs themselves one oneself who whom whoever whomever whatever
        whichever someone somebody something anyone anybody anything everyone everybody everything nobody nothing none
        thou thee thy thine ye""",
    "prepositions": """of in to for with on at by from up about into over after beneath under above across against along
        among amongst around as before behind below beside besides between beyond despite down during except inside like
        near off onto opposite out outside past per round since than through throughout till toward towards underneath
        unlike until unto upon via within without amid amidst notwithstanding""",
    "conjunctions": "and but or nor so yet for if because although though while whereas unless lest whether once",
    "auxiliaries": """am is are was were be been being have has had having do does did doing done can could may might
        must shall should will would ought cannot need dare""",
    "particles and negation": "not n't 't 's 've 're 'll 'd 'm s t ll ve re d m",
    "wh-words and pro-adverbs": """when where why how whenever wherever here there then thus hence therefore however
        whence thence whither""",
}
# fmt: on
FUNCTION_WORDS = frozenset(word for words in _CLOSED_CLASSES.values() for word in words.split())

# Parts of speech, as Penn Treebank tags (nltk) and universal ones (spaCy).
_PENN_CONTENT = ("NN", "VB", "JJ", "RB")
_PENN_FUNCTION = frozenset(
    ("DT", "PDT", "WDT", "PRP", "PRP$", "WP", "WP$", "EX", "IN", "TO", "CC", "MD", "POS", "RP", "WRB")
)
_UNIVERSAL_CONTENT = frozenset(("NOUN", "PROPN", "VERB", "ADJ", "ADV"))
_UNIVERSAL_FUNCTION = frozenset(("DET", "PRON", "ADP", "CCONJ", "SCONJ", "AUX", "PART"))
# A tagger calls these verbs; they are auxiliaries most of the time.
_AUXILIARIES = frozenset(_CLOSED_CLASSES["auxiliaries"].split())


def find_words(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of a text."""
    return [match.span() for match in _WORD.finditer(text)]


def by_list(words: Sequence[str]) -> list[WordClass]:
    """Function words by the list of closed classes; words of letters alone are content otherwise."""
    return [_listed(word.lower().replace("’", "'")) for word in words]


def _listed(word: str) -> WordClass:
    if word in FUNCTION_WORDS:
        return "function"
    stem, mark, _ = word.partition("'")
    if mark and (stem in FUNCTION_WORDS or word.endswith("n't")):
        return "function"  # it's, they've, don't
    return "content" if any(letter.isalpha() for letter in word) else "other"


def tagger(name: TaggerName = "auto") -> tuple[str, Tagger]:
    """A way to tell word classes, and its name.

    Args:
        name: "spacy" (with en_core_web_sm), "nltk" (with its English perceptron tagger), "word list", or "auto": the
            first of these that is there.

    Raises:
        MissingPackageError: the tagger asked for, or its model, is not installed.
        ConfigurationError: an unknown name.
    """
    makers: dict[str, Callable[[], Tagger]] = {"spacy": _spacy, "nltk": _nltk, "word list": lambda: by_list}
    if name == "auto":
        for candidate, make in makers.items():
            try:
                return candidate, make()
            except MissingPackageError:  # the next one; the word list is always there
                continue
    if name not in makers:
        raise ConfigurationError(f"tagger={name!r}; choose one of auto, {', '.join(makers)}.")
    return name, makers[name]()


def token_classes(text: str, offsets: Sequence[tuple[int, int]], tag: Tagger = by_list) -> list[WordClass | None]:
    """The word class of each token of a text.

    Args:
        text: what was tokenised.
        offsets: character span of each token, as fast tokenizers give them; (0, 0) for special tokens.
        tag: from `tagger`.

    Returns:
        One class a token; None for tokens that cover no character (special tokens).
    """
    spans = find_words(text)
    words = [text[start:end] for start, end in spans]
    classes = [label for low in range(0, len(words), _BLOCK) for label in tag(words[low : low + _BLOCK])]
    found: list[WordClass | None] = []
    number = 0
    for start, end in offsets:
        if end <= start:
            found.append(None)
            continue
        while number and spans[number - 1][1] > start:  # pieces of one letter, and overlapping spans, come back
            number -= 1
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        best, covered, at = -1, 0, number
        while at < len(spans) and spans[at][0] < end:
            shared = min(end, spans[at][1]) - max(start, spans[at][0])
            if shared > covered:
                best, covered = at, shared
            at += 1
        found.append("other" if best < 0 else classes[best])
    return found


def _nltk() -> Tagger:
    nltk = needed("nltk")
    try:
        nltk.data.find("taggers/averaged_perceptron_tagger_eng")
    except LookupError as error:
        raise MissingPackageError(
            "nltk is installed without its English tagger; get averaged_perceptron_tagger_eng with nltk.download, or "
            "choose the word list."
        ) from error

    def tag(words: Sequence[str]) -> list[WordClass]:
        return [_penn(word, pos) for word, pos in nltk.pos_tag(list(words))]

    return tag


def _penn(word: str, pos: str) -> WordClass:
    if pos in _PENN_FUNCTION or (pos.startswith("VB") and word.lower() in _AUXILIARIES):
        return "function"
    return "content" if pos.startswith(_PENN_CONTENT) else "other"


def _spacy() -> Tagger:
    spacy = needed("spacy")
    try:
        language: Any = spacy.load("en_core_web_sm", exclude=["parser", "ner", "lemmatizer"])
    except OSError as error:
        raise MissingPackageError(
            "spaCy is installed without its English model; get it with `python -m spacy download en_core_web_sm`, or "
            "choose the word list."
        ) from error

    def tag(words: Sequence[str]) -> list[WordClass]:
        # Ready-made words, so that spaCy's own tokenisation cannot disagree with ours.
        return [_universal(token.pos_) for token in language(spacy.tokens.Doc(language.vocab, words=list(words)))]

    return tag


def _universal(pos: str) -> WordClass:
    if pos in _UNIVERSAL_FUNCTION:
        return "function"
    return "content" if pos in _UNIVERSAL_CONTENT else "other"
