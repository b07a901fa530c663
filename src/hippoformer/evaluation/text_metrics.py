"""How close one text comes to another: BLEU, ROUGE, token F1, exact match, and how little it repeats itself.

BLEU is sacrebleu's (Post 2018) over the whole corpus, ROUGE is rouge-score's F measure with stemming (Lin 2004), F1 and
exact match are those of question answering (Rajpurkar et al. 2016): lower case, no punctuation, no articles.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from hippoformer.errors import InputError
from hippoformer.evaluation.packages import needed

# Metrics that each text has on its own, so that texts can be compared in pairs; shares between 0 and 1.
TEXT_METRICS = ("rouge_1", "rouge_2", "rouge_l", "f1", "exact_match", "distinct_2")
CORPUS_METRICS = ("bleu", "bleu_1", "bleu_2", "bleu_3", "bleu_4")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of all texts together, 0 to 100: `bleu` (up to 4-grams) and `bleu_1` … `bleu_4` (up to n-grams).

    Args:
        texts, references: the same number, one reference a text.

    Raises:
        InputError: none, or different numbers. MissingPackageError: sacrebleu is not installed.
    """
    if not texts or len(texts) != len(references):
        raise InputError(f"{len(texts)} texts and {len(references)} references; expected one reference for each text.")
    bleu = needed("sacrebleu.metrics").BLEU
    found = {f"bleu_{n}": bleu(max_ngram_order=n).corpus_score(list(texts), [list(references)]) for n in range(1, 5)}
    return {"bleu": found["bleu_4"].score} | {name: result.score for name, result in found.items()}


def text_scores(text: str, reference: str) -> dict[str, float]:
    """The `TEXT_METRICS` of one text, each in [0, 1].

    Raises:
        MissingPackageError: rouge-score is not installed.
    """
    scorer = needed("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE), use_stemmer=True)
    rouge = {ours: float(scorer.score(reference, text)[theirs].fmeasure) for theirs, ours in _ROUGE.items()}
    return rouge | {
        "f1": token_f1(text, reference),
        "exact_match": float(normalised(text) == normalised(reference)),
        "distinct_2": distinct(text, 2),
    }


def best_answer(text: str, answers: Sequence[str]) -> dict[str, float]:
    """The `TEXT_METRICS` of an answer against the accepted one that suits it best, metric by metric.

    Raises:
        InputError: no accepted answer.
    """
    if not answers:
        raise InputError("a question without an accepted answer cannot be scored")
    scores = [text_scores(text, answer) for answer in answers]
    return {name: max(score[name] for score in scores) for name in scores[0]}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles, and more than one blank."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalised texts; 1 where both are empty."""
    words, wanted = normalised(text).split(), normalised(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2.0 * common / (len(words) + len(wanted))


def distinct(text: str, n: int) -> float:
    """Share of different ones among a text's word n-grams (Li et al. 2016); 0 for a text without any."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 0.0
