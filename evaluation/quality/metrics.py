"""How close one text comes to another: BLEU, ROUGE, token F1, exact match, and how little it repeats itself.

BLEU is sacrebleu's over the whole corpus (Post 2018), ROUGE is rouge-score's F measure with stemming (Lin 2004), F1 and
exact match are those of question answering (Rajpurkar et al. 2016): lower case, no punctuation, no articles.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from hippoformer.errors import InputError

TEXT_METRICS = ("rouge_1", "rouge_2", "rouge_l", "f1", "exact_match", "distinct_2")  # of each text, in [0, 1]


def corpus_bleu(texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of all texts together, 0 to 100: `bleu_N` counts up to N-grams, `bleu` is `bleu_4`.

    Raises:
        InputError: no text, or not one reference for each.
    """
    from sacrebleu.metrics.bleu import BLEU

    if not texts or len(texts) != len(references):
        raise InputError(f"{len(texts)} texts and {len(references)} references; expected one reference for each text")
    orders = {n: BLEU(max_ngram_order=n).corpus_score(list(texts), [list(references)]).score for n in range(1, 5)}
    return {"bleu": orders[4]} | {f"bleu_{n}": score for n, score in orders.items()}


def text_scores(text: str, references: Sequence[str]) -> dict[str, float]:
    """The `TEXT_METRICS` of one text against the reference that suits it best, metric by metric.

    Raises:
        InputError: no reference.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if not references:
        raise InputError("a text without a reference cannot be scored; expected at least one")
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = []
    for reference in references:
        scores = [float(score.fmeasure) for score in rouge.score(reference, text).values()]
        same = float(normalised(text) == normalised(reference))
        rows.append([*scores, token_f1(text, reference), same, distinct(text, 2)])
    return dict(zip(TEXT_METRICS, map(max, zip(*rows, strict=True)), strict=True))


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles, and more than one blank."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalised texts; 1 where both are empty."""
    words, wanted = normalised(text).split(), normalised(reference).split()
    if not words or not wanted:
        return float(words == wanted)
    return 2.0 * sum((Counter(words) & Counter(wanted)).values()) / (len(words) + len(wanted))


def distinct(text: str, n: int) -> float:
    """Share of different ones among a text's word n-grams (Li et al. 2016); 0 for a text without any."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 0.0
