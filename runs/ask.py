"""What is brought back for a question: LoCoMo conversations, SQuAD paragraphs in one stream, facts planted in novels.

    python runs/ask.py locomo --data ../shared/data --names 26 30
    python runs/ask.py squad  --data ../shared/data --names Normans
    python runs/ask.py facts  --data ../shared/data --names Forster_Howards_1910 Ford_Soldier_1915

Choose between designs on LoCoMo 26 and 30 and on Normans; LoCoMo 41 to 43, Southern_California and Victoria_Australia
are for the figures that are reported. The text is read with the tokenizer of SmolLM2-135M, cut and kept as a cache
keeps it, without a model.
"""

import argparse
import json
import random
import time
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from facts import FACTS

from hippoformer.hippocampus.passages import Passage, Passages
from hippoformer.hippocampus.retrieval import retrieve
from hippoformer.hippocampus.spelling import Spelling
from hippoformer.model.base_models import load_tokenizer

BUDGETS = (256, 1024)
FACT_TOKENS = 24_000


class Reader:
    """Texts read into passages, and questions put to them."""

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer("smollm2-135m")
        self.spelling = Spelling.of(self.tokenizer, len(self.tokenizer))
        self.seconds: list[float] = []

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def read(self, parts: list[str]) -> tuple[list[Passage], list[tuple[int, int]]]:
        """Passages of the joined parts, and the first token and the one after the last of each part."""
        ids = self.ids("".join(parts))
        ends = list(accumulate(len(self.spelling.pieces[number]) for number in ids))  # in bytes
        marks = [0, *(bisect_right(ends, end) for end in accumulate(len(part.encode()) for part in parts))]
        store = Passages(1, self.spelling, capacity=10**9)
        store.append(torch.tensor([ids]))
        return store.of_row(0), list(pairwise(marks))

    def ask(self, passages: list[Passage], question: str, n_tokens: int) -> list[Passage]:
        began = time.process_time()
        found = retrieve(passages, question, n_tokens, self.spelling)
        self.seconds.append(time.process_time() - began)
        return found

    def text(self, passages: list[Passage]) -> str:
        """As a person would read it, in the order of the text."""
        return "".join(self.spelling.text(p.token_ids) for p in sorted(passages, key=lambda passage: passage.start))


def conversation(path: Path) -> tuple[list[str], dict[str, int], list[dict[str, Any]], int]:
    """The lines of a conversation, the line of each turn, its questions with valid evidence, and how many have none."""
    record = json.loads(path.read_text(encoding="utf-8"))
    lines, turns = [], {}
    for session in record["sessions"]:
        lines.append(f"[{session['date']}]\n")
        for turn in session["turns"]:
            picture = f" [shares a picture of {turn['image_caption']}]" if turn.get("image_caption") else ""
            turns[turn["id"]] = len(lines)
            lines.append(f"{turn['speaker']}: {turn['text']}{picture}\n")
    asked = [question for question in record["questions"] if question["category"] != "adversarial"]
    valid = [q for q in asked if q["evidence"] and all(turn in turns for turn in q["evidence"])]
    return lines, turns, valid, len(asked) - len(valid)


def locomo(reader: Reader, paths: list[Path]) -> None:
    """Share of evidence turns of which half the tokens or more come back: over turns, and as a mean of questions."""
    shares: dict[str, dict[int, list[list[bool]]]] = {}
    for path in paths:
        lines, turns, questions, left_out = conversation(path)
        passages, spans = reader.read(lines)
        print(f"{path.stem}: {spans[-1][1]:,} tokens, {len(passages)} passages, {left_out} questions without evidence")
        for question in questions:
            for budget in BUDGETS:
                found = reader.ask(passages, question["question"], budget)
                hits = []
                for start, stop in (spans[turns[turn]] for turn in question["evidence"]):
                    shared = sum(max(0, min(stop, p.stop) - max(start, p.start)) for p in found)
                    hits.append(2 * shared >= stop - start)
                for kind in (path.stem, question["category"], "all"):
                    shares.setdefault(kind, {each: [] for each in BUDGETS})[budget].append(hits)
    for kind, of_kind in sorted(shares.items(), key=lambda item: item[0] == "all"):
        print(f"{kind:12} {len(of_kind[BUDGETS[0]]):4} questions", end="")
        for budget, each in of_kind.items():
            mean = sum(sum(hits) / len(hits) for hits in each) / len(each)
            turns_hit = [hit for hits in each for hit in hits]
            print(f"; in {budget}: {_percent(turns_hit)} of turns, {100 * mean:.1f} % a question", end="")
        print()


def squad(reader: Reader, paths: list[Path]) -> None:
    """Share of answerable questions with an accepted answer in what is brought back, and with the right paragraph."""
    for path in paths:
        paragraphs = json.loads(path.read_text(encoding="utf-8"))["paragraphs"]
        passages, spans = reader.read([paragraph["text"] + "\n\n" for paragraph in paragraphs])
        answers: dict[int, list[bool]] = {budget: [] for budget in BUDGETS}
        for paragraph in paragraphs:
            for question in paragraph["questions"]:
                for budget in BUDGETS:
                    text = reader.text(reader.ask(passages, question["question"], budget)).casefold()
                    answers[budget].append(any(answer.casefold() in text for answer in question["answers"]))
        shares = (f"{_percent(answers[budget])} in {budget}" for budget in BUDGETS)
        print(f"{path.stem}: {spans[-1][1]:,} tokens, {len(passages)} passages, {len(answers[256])} questions", *shares)


def facts(reader: Reader, paths: list[Path], seed: int = 0) -> None:
    """Rank of the passage that holds the fact, all facts of `FACTS` planted in each novel, one a paragraph."""
    for path in paths:
        ids = reader.ids(path.read_text(encoding="utf-8"))[: FACT_TOKENS - 1_200]
        parts = [reader.spelling.text(passage.token_ids) for passage in reader.read([reader.spelling.text(ids)])[0]]
        places = sorted(random.Random(seed).sample(range(1, len(parts)), len(FACTS)))
        for place, fact in reversed(list(zip(places, FACTS, strict=True))):
            line = parts[place - 1].endswith("\n")
            parts.insert(place, fact.statement + "\n" if line else " " + fact.statement)
        passages, spans = reader.read(parts)
        ranks = []
        for place, (number, fact) in zip(places, enumerate(FACTS), strict=True):
            start, stop = spans[place + number]
            found = reader.ask(passages, fact.question, 1024)
            shared = (min(stop, p.stop) - max(start, p.start) for p in found)
            ranks.append(next((r for r, n in enumerate(shared, start=1) if 2 * n >= stop - start), len(found) + 1))
        best = (f"{_percent([rank <= limit for rank in ranks])} among the first {limit}" for limit in (1, 2, 4, 8))
        print(f"{path.stem}: {spans[-1][1]:,} tokens, {len(passages)} passages, {len(FACTS)} facts:", ", ".join(best))


def _percent(hits: list[bool]) -> str:
    return f"{100 * sum(hits) / len(hits):.1f} %"


TASKS = {
    "locomo": (locomo, "locomo", ".json"),
    "squad": (squad, "squad-part", ".json"),
    "facts": (facts, "public-domain-novels/validation", ".txt"),
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--names", nargs="+", required=True)
    options = parser.parse_args()
    task, folder, suffix = TASKS[options.task]
    reader = Reader()
    task(reader, [options.data / folder / (name + suffix) for name in options.names])
    print(f"{1000 * sum(reader.seconds) / len(reader.seconds):.1f} ms of processor time a query")


if __name__ == "__main__":
    main()
