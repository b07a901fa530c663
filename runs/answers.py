"""Answers to facts planted in a novel and asked in other words, by the model itself.

    python runs/answers.py --data ../shared/data --novel validation/Lawrence_Peacock_1911 --tokens 8000 --facts 24
    python runs/answers.py --data ../shared/data --novel test/Galsworthy_Saints_1919 --tokens 8000

Every fact of `facts.py` is planted in a text of `--tokens` tokens, which is read once; each question is
asked of a copy of the state, greedily. Four conditions: passages as a `Conversation` retrieves them; plain BM25 over
the same sentences, as many tokens, put before the question in the same way; the right passage alone (oracle); the
window alone. An answer is right if it contains the fact's. Choose between designs on validation novels.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from facts import FACTS

import hippoformer
from hippoformer.chat import CLEAR, REREAD_TOKENS, Conversation
from hippoformer.hippocampus.passages import Passage
from hippoformer.text import encode, token_ids

SECTION = 4096  # tokens read at a time


def planted(model: Any, tokenizer: Any, novel: Path, n_tokens: int, seed: int) -> torch.Tensor:
    """(1, T) ids of a novel's beginning with all facts in it, one behind the end of a sentence each."""
    ids = token_ids(tokenizer, novel.read_text(encoding="utf-8"))[:n_tokens]
    text = model.spelling.text(ids)
    ends = [
        at + 2 for at in range(3, len(text)) if text[at : at + 2] == ". " and text[at - 3 : at] not in (" Mr", " Dr")
    ]
    last = int(len(ends) * (1 - 1.5 * model.config.window / n_tokens))  # none is still in the window when it is asked
    places = sorted(random.Random(seed).sample(ends[:last], len(FACTS)), reverse=True)
    for place, fact in zip(places, FACTS, strict=True):
        text = f"{text[:place]}{fact.statement} {text[place:]}"
    return encode(tokenizer, text, bos=True)


def bm25(kept: list[Passage], texts: list[str], question: str, n_tokens: int) -> list[Passage]:
    """Ten lines of BM25 over the same passages: words as they stand, nothing lent, nothing left out."""
    bags = [Counter(_words(text)) for text in texts]
    mean = sum(bag.total() for bag in bags) / len(bags)
    holders = Counter(word for bag in bags for word in bag)

    def fit(bag: Counter[str]) -> float:
        norm = 1.2 * (0.25 + 0.75 * bag.total() / mean)
        rarity = {word: math.log(1 + (len(bags) - holders[word] + 0.5) / (holders[word] + 0.5)) for word in bag}
        return sum(rarity[w] * 2.2 * bag[w] / (bag[w] + norm) for w in set(_words(question)) if w in bag)

    scores = [fit(bag) for bag in bags]
    found, left = [], n_tokens
    for place in sorted(range(len(kept)), key=lambda place: -scores[place]):
        if scores[place] > 0 and len(kept[place]) <= left:
            found.append(Passage(kept[place].start, kept[place].token_ids, score=scores[place]))
            left -= len(kept[place])
    return found


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


class Given(Conversation):
    """A conversation whose passages are handed to it."""

    given: list[Passage] = []  # noqa: RUF012, set on each conversation

    def _retrieve(self, text: str, turn_tokens: int) -> list[Passage]:
        return self.given


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--novel", required=True, help="split and name, as validation/Forster_Howards_1910")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--facts", type=int, default=len(FACTS), help="ask the first so many")
    parser.add_argument("--reread-tokens", type=int, default=REREAD_TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model, tokenizer = hippoformer.load(options.model)
    novel = options.data / "public-domain-novels" / f"{options.novel}.txt"
    ids, cache, began = planted(model, tokenizer, novel, options.tokens, options.seed), model.new_cache(), time.time()
    for piece in ids.split(SECTION, dim=1):
        model.score(piece, past_key_values=cache)
        print(f"read {cache.lengths[0]:,} tokens in {time.time() - began:.0f} s", flush=True)
    kept = [p for p in cache.passages.of_row(0) if p.stop <= cache.lengths[0] - model.config.window]
    texts = [model.spelling.text(passage.token_ids) for passage in kept]
    rows, right = [], Counter[str]()
    for fact in FACTS[: options.facts]:
        words = torch.tensor([token_ids(tokenizer, fact.question)])
        holder = [p for p, text in zip(kept, texts, strict=True) if fact.statement[:30] in " ".join(text.split())]
        ours = cache.retrieve(words, n_tokens=options.reread_tokens, beyond_window=True)[0]
        shown = {
            "retrieved": [passage for passage in ours if passage.score >= CLEAR * ours[0].score],
            "retrieved, all": ours,
            "bm25": bm25(kept, texts, fact.question, options.reread_tokens),
            "oracle": holder[:1],
            "window": [],
        }
        row: dict[str, Any] = {"question": fact.question, "answer": fact.answer}
        row["found"] = bool(holder) and holder[0].start in {p.start for p in ours}
        for condition, passages in shown.items():
            talk = Given(model, tokenizer, cache=cache.copy(), do_sample=False, max_new_tokens=32)
            talk.given = passages
            with model.memory_off():
                row[condition] = talk.say(fact.question).strip()
            right[condition] += fact.answer.lower() in row[condition].lower()
        right["found"] += row["found"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    print(f"{len(rows)} facts, {cache.lengths[0]:,} tokens read:", ", ".join(f"{k} {v}" for k, v in right.items()))
    if options.output:
        options.output.write_text(json.dumps({"right": right, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
