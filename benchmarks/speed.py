"""Speed of a HippoFormer against its base: with memory, with memory off (the same window), and as transformers runs it.

    python -m benchmarks.speed --model smollm2-135m --dtype bfloat16 --output results/speed.json

Texts are random token ids, since no branch of the model depends on what a token says. Conditions alternate, so that a
slow minute of the machine meets all of them. Figures are medians; the file has every timing. `transformers` is the base
with its own cache and full attention to everything read.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, HfArgumentParser

from evaluation.common.results import Result, Row
from hippoformer.cli.arguments import ModelArguments, check_output
from hippoformer.files import write_json
from hippoformer.hippocampus import hippocampus
from hippoformer.hippocampus.episodes import Episodes
from hippoformer.hippocampus.recall import Recall
from hippoformer.model.modeling import HippoFormer

CONDITIONS = ("memory", "off", "transformers")
PLACES = (100, 4000)  # tokens read before generation begins
BATCHES = (1, 8)  # rows whose stages are timed
# What is timed inside the hippocampus: where each function is looked up while a text is read.
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "encode": ((Recall, "encode_key"), (Recall, "encode_value")),
    "write": ((Episodes, "write"),),
    "capture": ((hippocampus, "admit"),),
    "consolidate": ((hippocampus, "consolidate"),),
}


@dataclass
class Options:
    """How much is measured."""

    repeats: int = field(default=5, metadata={"help": "timed runs of each condition, after one that is not counted"})
    score_tokens: int = field(default=2048, metadata={"help": "tokens of one scoring run"})
    new_tokens: int = field(default=64, metadata={"help": "tokens of one generation"})
    output: Path | None = field(default=None, metadata={"help": "JSON file"})


def alternate(repeats: int, runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times after one uncounted turn; the order is reversed every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            began = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def rates(metric: str, tokens: int, seconds: dict[str, list[float]]) -> list[Row]:
    """Tokens per second of each condition, and the ratios of memory to the others."""
    speed = {name: tokens / statistics.median(spent) for name, spent in seconds.items()}
    ratios = {f"memory / {name}": speed["memory"] / speed[name] for name in CONDITIONS[1:]}
    return [Row(name, f"{metric}, tokens/s", value, n=tokens) for name, value in (speed | ratios).items()]


def random_ids(model: HippoFormer, tokens: int, seed: int) -> Tensor:
    """(1, tokens) ids on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (1, tokens), generator=generator).to(model.device)


def full_store(model: HippoFormer) -> int:
    """Tokens after which window and store are full."""
    return model.config.buffer_size + model.config.window + model.config.segment_len


def score(model: HippoFormer, condition: str, ids: Tensor, cache: Any) -> float:
    """Sum of log p over (R, T) ids, read after what the cache has read."""
    with model.memory_off() if condition == "off" else contextlib.nullcontext(), torch.no_grad():
        if condition != "transformers":
            return float(model.score(ids, past_key_values=cache).sum())
        total, size = 0.0, model.config.segment_len
        for piece, target in zip(ids.split(size, 1), ids.roll(-1, 1).split(size, 1), strict=True):
            log_p = model.base(piece, past_key_values=cache).logits.float().log_softmax(-1)
            total += float(log_p.gather(-1, target.unsqueeze(-1)).sum())
        return total


def generate(model: HippoFormer, condition: str, prompt: Tensor, cache: Any, tokens: int) -> None:
    """Generates exactly `tokens` tokens, greedily, from a cache that has read all of the prompt but its last token."""
    generator = model.base if condition == "transformers" else model
    options = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    with model.memory_off() if condition == "off" else contextlib.nullcontext():
        generator.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **options)


def compare(
    model: HippoFormer, options: Options, read: Tensor, run: Callable[..., Any], metric: str, tokens: int
) -> Result:
    """Times `run(condition, cache=...)` on copies of caches that have read (1, T) ids; making the copy is timed too."""
    caches = {"memory": model.new_cache(1), "off": model.new_cache(1), "transformers": DynamicCache()}
    for name, cache in caches.items():
        score(model, name, read, cache)
    runs = {name: partial(lambda name: run(name, cache=copy.deepcopy(caches[name])), name) for name in CONDITIONS}
    seconds = alternate(options.repeats, runs)
    return Result(rates(metric, tokens, seconds), {metric: seconds})


def time_stages(model: HippoFormer, options: Options, n_rows: int) -> Result:
    """Microseconds a token of the STAGES, while each row reads two segments after a full window and store."""

    def timed(stage: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        result = function(*arguments, **keywords)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[stage] += time.perf_counter() - began
        return result

    cache, length = model.new_cache(1), 2 * model.config.segment_len
    score(model, "memory", random_ids(model, full_store(model), 0), cache)
    cache.batch_repeat_interleave(n_rows)
    ids = random_ids(model, length, 1).repeat(n_rows, 1)
    each: dict[str, list[float]] = {stage: [] for stage in STAGES}
    for turn in range(options.repeats + 1):
        seconds = dict.fromkeys(STAGES, 0.0)  # of this turn; `timed` adds to it
        with contextlib.ExitStack() as stack:
            for stage, functions in STAGES.items():
                for owner, name in functions:
                    measure = partial(timed, stage, getattr(owner, name))
                    stack.enter_context(patch.object(owner, name, autospec=True, side_effect=measure))
            score(model, "memory", ids, cache.copy())
        for stage, spent in seconds.items():
            each[stage] += [spent * 1e6 / ids.numel()] * (turn > 0)
    metric = f"memory without recall, rows: {n_rows}, µs/token"
    figures = {"memory": statistics.median(map(sum, zip(*each.values(), strict=True)))}
    figures |= {f"of which {stage}": statistics.median(spent) for stage, spent in each.items()}
    return Result([Row(name, metric, value, n=ids.numel()) for name, value in figures.items()], {metric: each})


def main(words: list[str] | None = None) -> None:
    """Measures, prints one table, writes the file."""
    arguments, options = HfArgumentParser((ModelArguments, Options)).parse_args_into_dataclasses(words)
    check_output(options.output)
    model, _ = arguments.load()
    new = random_ids(model, options.score_tokens, 1)
    before = random_ids(model, full_store(model), 0)
    results = [compare(model, options, before, partial(score, model, ids=new), "scoring", options.score_tokens)]
    for place in PLACES:
        prompt = random_ids(model, place, 0)
        run = partial(generate, model, prompt=prompt, tokens=options.new_tokens)
        name = f"generating from token {place}"
        results += [compare(model, options, prompt[:, :-1], run, name, options.new_tokens)]
    results += [time_stages(model, options, n_rows) for n_rows in BATCHES]
    details = {name: value for result in results for name, value in result.details.items()}
    whole = Result([row for result in results for row in result.rows], details)
    record = whole.record("speed", model, options)
    where = f"{model.dtype}, {torch.get_num_threads()} threads, {record['provenance']['cpu']}"
    print(f"{arguments.model}, {where}\n\n{whole.table()}")
    if options.output is not None:
        write_json(options.output, record)


if __name__ == "__main__":
    main()
