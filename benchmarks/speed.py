"""How fast and how large: a HippoFormer against its own base with the same window and sinks.

    python benchmarks/speed.py                                # all parts
    python benchmarks/speed.py --parts scoring generate       # some
    python benchmarks/speed.py --parts memory --long          # 10k against 200k tokens

Texts are random token ids: no branch of the model looks at what a token says. Memory on and memory off take turns, so
that a slow minute of the machine meets both; medians are reported, and every single timing stands in the JSON file.
What each part times is said at its function.
"""

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import hippoformer
from hippoformer.files import provenance, write_json
from hippoformer.hippocampus.circuit import Hippocampus, working_fill
from hippoformer.hippocampus.episodes import Episodes, admit, importance
from hippoformer.hippocampus.replay import consolidate
from hippoformer.model.cache import HippoCache
from hippoformer.model.modeling import HippoFormer

FORMAT = "hippoformer.speed/1"
PARTS = ("scoring", "generate", "write", "memory")

Result = dict[str, Any]


def random_ids(model: HippoFormer, rows: int, tokens: int, seed: int) -> Tensor:
    """(rows, tokens) token ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), generator=generator)


def in_turns(repeats: int, **runs: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each run, `repeats` times after a turn that is not counted; who goes first changes every turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            began = time.perf_counter()
            runs[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def compared(part: str, measure: str, unit: str, value: float, reference: float, **more: Any) -> Result:
    """One line of the table."""
    return {
        "part": part,
        "measure": measure,
        "unit": unit,
        "value": value,
        "reference": reference,
        "ratio": value / reference,
        **more,
    }


def speed(tokens: int, seconds: list[float]) -> float:
    """Tokens per second, by the median."""
    return tokens / statistics.median(seconds)


def read_before(model: HippoFormer, ids: Tensor) -> dict[str, HippoCache]:
    """Two caches that have read the same ids, one with memory on, one with memory off."""
    caches = {"on": model.new_cache(ids.shape[0]), "off": model.new_cache(ids.shape[0])}
    model.score(ids, past_key_values=caches["on"])
    with model.memory_off():
        model.score(ids, past_key_values=caches["off"])
    return caches


# ---------------------------------------------------------------- parts


def scoring(model: HippoFormer, rows: int, tokens: int, repeats: int, seed: int) -> list[Result]:
    """`model.score` of `tokens` further tokens of each row, from a copy of a cache whose window and store are full.

    Making the copy is timed too, some milliseconds on both sides. With memory off the cache never held a memory: it is
    the bare base behind its window.
    """
    before = read_before(model, random_ids(model, rows, past_the_store(model), seed))
    ids = random_ids(model, rows, tokens, seed + 1)

    def on() -> float:
        return float(model.score(ids, past_key_values=before["on"].copy()).sum())  # the float waits for the device

    def off() -> float:
        with model.memory_off():
            return float(model.score(ids, past_key_values=before["off"].copy()).sum())

    seconds = in_turns(repeats, on=on, off=off)
    measure = f"streamed scoring, {rows} row{'s' * (rows > 1)} of {tokens} tokens: memory on against off"
    n = rows * tokens
    fast, base = speed(n, seconds["on"]), speed(n, seconds["off"])
    return [compared("scoring", measure, "tokens/s", fast, base, tokens=n, seconds=seconds)]


def generate(model: HippoFormer, near: int, far: int, tokens: int, repeats: int, seed: int) -> list[Result]:
    """`model.generate`, greedy, `tokens` tokens, of a row that has read `near` or `far` tokens.

    The prompt has been read into the cache by `score`, which leaves the same state as reading it token by token; all
    its ids are handed to `generate`, as transformers wants it. So the clock sees what tokens `near` and `far` of one
    long generation cost, with everything that `generate` does around a token, and a copy of the cache once. A segment
    of tokens holds one consolidation.
    """
    prompts = {place: random_ids(model, 1, place, seed).to(model.device) for place in (near, far)}
    # All but the last token, which is the first that generate reads.
    caches = {place: read_before(model, prompt[:, :-1]) for place, prompt in prompts.items()}

    def run(place: int, memory: str) -> None:
        prompt = prompts[place]
        with contextlib.nullcontext() if memory == "on" else model.memory_off():
            generated = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=caches[place][memory].copy(),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
        if generated.shape[1] != place + tokens:
            raise RuntimeError(f"generate returned {generated.shape[1] - place} tokens instead of {tokens}")

    settings = [(place, memory) for place in prompts for memory in ("on", "off")]
    runs = {f"{memory}, token {place}": partial(run, place, memory) for place, memory in settings}
    seconds = in_turns(repeats, **runs)
    speeds = {name: speed(tokens, spent) for name, spent in seconds.items()}
    return [
        *(
            compared(
                "generate",
                f"generate, {tokens} tokens from token {place}: memory on against off",
                "tokens/s",
                speeds[f"on, token {place}"],
                speeds[f"off, token {place}"],
                tokens=tokens,
                seconds={memory: seconds[f"{memory}, token {place}"] for memory in ("on", "off")},
            )
            for place in prompts
        ),
        *(
            compared(
                "generate",
                f"generate, memory {memory}: token {far} against token {near}",
                "tokens/s",
                speeds[f"{memory}, token {far}"],
                speeds[f"{memory}, token {near}"],
                tokens=tokens,
            )
            for memory in ("on", "off")
        ),
    ]


def write(model: HippoFormer, rows: int, segments: int, seed: int) -> list[Result]:
    """Microseconds a token of writing and replay, without recall, gate and base: whole segments into a full store.

    Timed, each by itself, on random hidden states of the model's width:
      encode       `Recall.encode_key` and `encode_value` of a segment's hidden states;
      write        making the `Episodes` of a segment and `Episodes.write` of them into the working slots;
      admit        `admit`: the competition of store and leavers, and moving up the working slots;
      consolidate  `consolidate`: all replay rounds, merging, ageing, forgetting.
    Saliences are drawn above 0.5, so that the store stays full (`stored` says how full). Medians over segments, divided
    by the tokens of all rows.
    """
    config, hippocampus = model.config, model.hippocampus
    episodes = Episodes.empty(rows, config, model.dtype, model.device)
    generator = torch.Generator().manual_seed(seed)
    seconds: dict[str, list[float]] = {name: [] for name in ("encode", "write", "admit", "consolidate")}
    stored: list[float] = []
    fill = 2 + (config.buffer_size * 2 + config.window) // config.segment_len
    with torch.no_grad():
        for segment in range(fill + segments):
            episodes, took = one_segment(hippocampus, episodes, segment, generator)
            if segment >= fill:
                for name, spent in took.items():
                    seconds[name].append(spent)
                stored.append(float(episodes.valid[:, : config.buffer_size].sum()) / rows)
    tokens = rows * config.segment_len
    each = {name: statistics.median(spent) * 1e6 / tokens for name, spent in seconds.items()}
    whole = statistics.median(map(sum, zip(*seconds.values(), strict=True))) * 1e6 / tokens
    return [
        {
            "part": "write",
            "measure": f"write + replay, {rows} row{'s' * (rows > 1)}, buffer {config.buffer_size}",
            "unit": "µs/token",
            "value": whole,
            "reference": None,
            "ratio": None,
            "tokens": tokens * segments,
            "pieces": each,
            "stored": statistics.mean(stored),
            "seconds": seconds,
        }
    ]


def one_segment(
    hippocampus: Hippocampus, episodes: Episodes, number: int, generator: torch.Generator
) -> tuple[Episodes, dict[str, float]]:
    """One segment of every row written and consolidated; the new memory, and seconds of each piece."""
    config, key_proj = hippocampus.config, hippocampus.recall.key_proj.weight
    device, n_rows, n_new = key_proj.device, episodes.position.shape[0], config.segment_len
    shape = (n_rows, n_new)
    hidden = torch.randn(*shape, key_proj.shape[1], generator=generator).to(device, episodes.key.dtype)
    tokens = torch.randint(0, config.vocab_size, shape, generator=generator, dtype=torch.int32).to(device)
    salience = (0.5 + 0.5 * torch.rand(shape, generator=generator)).to(device)
    done = number * n_new
    column = torch.arange(n_new, device=device).expand(shape)
    leaving = working_fill(done + n_new - 1, config) + 1 - working_fill(done + n_new, config)
    leave, ended = torch.full((2, n_rows), leaving, device=device), torch.full((n_rows,), number + 1, device=device)
    took: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took[name] = time.perf_counter() - began
        return result

    def written(key: Tensor, value: Tensor) -> Episodes:
        none = torch.zeros(shape, device=device)
        new = Episodes(
            key=key,
            value=value,
            token=tokens,
            position=(column + done).to(torch.int32),
            salience=salience,
            surprise=episodes.surprise[:, :n_new],
            priority=importance(salience, config),
            age=none,
            strength=torch.ones_like(none),
            credit=none,
            matched=none,
        )
        return episodes.write(column + config.buffer_size + working_fill(done, config), new)

    recall = hippocampus.recall
    key, value = timed("encode", lambda: (recall.encode_key(hidden), recall.encode_value(hidden)))
    episodes = timed("write", lambda: written(key, value))
    episodes = timed("admit", lambda: admit(episodes, leave[0], config))
    episodes, _ = timed("consolidate", lambda: consolidate(episodes, ended, config))
    return episodes, took


def memory(model: HippoFormer, first: int, second: int, seed: int) -> list[Result]:
    """Bytes of the cache, and resident memory of the whole process, after `first` and after `second` tokens of one row.

    Read by `model.score` in pieces of one cache; what the process itself needs (weights, libraries) is in both numbers.
    """
    cache = model.new_cache(1)
    sizes: dict[int, dict[str, float]] = {}
    piece = 4 * model.config.segment_len
    done = 0
    while done < second:
        until = min(done + piece, first if done < first else second)
        model.score(random_ids(model, 1, until - done, seed + done), past_key_values=cache)
        done = until
        if done in (first, second):
            sizes[done] = {"state": cache.nbytes / 1e6, "resident memory": psutil.Process().memory_info().rss / 1e6}
    return [
        compared(
            "memory",
            f"{name} of one row: after {second:,} tokens against after {first:,}",
            "MB",
            sizes[second][name],
            sizes[first][name],
            tokens=second,
        )
        for name in ("state", "resident memory")
    ]


def past_the_store(model: HippoFormer) -> int:
    """Tokens after which window and store can be full, a whole number of segments."""
    config = model.config
    segments = -(-(config.buffer_size + config.window) // config.segment_len)
    return (segments + 1) * config.segment_len


# ---------------------------------------------------------------- report


def to_table(results: list[Result], title: str) -> Table:
    """All results, one line each."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    for heading in ("unit", "value", "reference", "ratio"):
        table.add_column(heading, justify="right")
    for result in results:
        digits = ".2f" if result["unit"] == "µs/token" else ".1f"
        cells = ["-" if result[name] is None else format(result[name], digits) for name in ("value", "reference")]
        ratio = "-" if result["ratio"] is None else f"{result['ratio']:.3f}"
        table.add_row(result["measure"], result["unit"], *cells, ratio)
        for name, spent in result.get("pieces", {}).items():
            table.add_row(f"  of which {name}", "", f"{spent:.2f}", "", "")
    return table


def measure(model: HippoFormer, arguments: argparse.Namespace) -> list[Result]:
    """The parts asked for, one after the other."""
    results: list[Result] = []
    repeats, seed = arguments.repeats, arguments.seed
    if "scoring" in arguments.parts:
        results += scoring(model, arguments.rows, arguments.score_tokens, repeats, seed)
    if "generate" in arguments.parts:
        results += generate(model, 100, 4000, arguments.new_tokens, repeats, seed)
    if "write" in arguments.parts:
        for rows in (1, 8):
            results += write(model, rows, 10 * repeats, seed)
    if "memory" in arguments.parts:
        results += memory(model, *((10_000, 200_000) if arguments.long else (2_000, 20_000)), seed)
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", default="smollm2-135m", help="as for hippoformer.load")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument(
        "--repeats", type=int, default=5, help="turns that are timed; writing takes ten segments a turn"
    )
    parser.add_argument("--rows", type=int, default=1, help="texts scored side by side")
    parser.add_argument("--score-tokens", type=int, default=2048, help="tokens scored in a turn, of each row")
    parser.add_argument("--new-tokens", type=int, default=256, help="tokens generated in a turn")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--buffer-size", type=int, default=2048)
    parser.add_argument("--long", action="store_true", help="memory: 10k and 200k tokens instead of 2k and 20k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"))
    arguments = parser.parse_args(argv)
    if min(arguments.repeats, arguments.rows, arguments.score_tokens, arguments.new_tokens) < 1:
        parser.error("--repeats, --rows, --score-tokens and --new-tokens must be at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Measures, prints the table, writes the JSON file."""
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    model, _ = hippoformer.load(
        arguments.model,
        dtype=getattr(torch, arguments.dtype),
        window=arguments.window,
        buffer_size=arguments.buffer_size,
    )
    results = measure(model, arguments)
    origin = provenance(seed=arguments.seed)
    title = f"{arguments.model}, {arguments.dtype}, {origin['torch_threads']} threads, {origin['cpu']}"
    Console(width=None if sys.stdout.isatty() else 120).print(to_table(results, title))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    settings["trained"] = bool(model.hippocampus.fusion.strength != 0)
    write_json(arguments.output, {"format": FORMAT, "settings": settings, "results": results, "provenance": origin})


if __name__ == "__main__":
    main()
