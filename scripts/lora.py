"""Adapts the base to books and articles, then asks what the memory is still worth beside what LoRA has learned.

    python scripts/lora.py                 # three seeds: an hour and a quarter each on one core of an AMD EPYC
    python scripts/lora.py --seeds 1       # these seeds

LoRA learns by the base's own loss and never sees the memory; the shipped hippocampus was trained on the base as it was.
Test novels and articles are then read with and without memory on the adapted base: `results/lora_SEED_*_test.json`, in
which `off` is base + LoRA of the same steps and data. What is already there is not made again.
"""

import argparse
import sys
from pathlib import Path

from commands import ends_with_failure, flags, make, write_tables

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = Path("runs"), Path("results")
SEEDS = (1, 2, 3)
TEXT = ("data/public-domain-novels/train", "data/wikitext-2-raw/wiki.train.first-part.raw")
BUDGET = {
    "max_samples": 44,
    "max_document_tokens": 4096,
    "lora_r": 16,
    # The base's parameters learn at a tenth of it.
    "learning_rate": 5e-3,
    "max_steps": 80,
    "batch_size": 2,
    "max_seq_length": 512,
    "save_steps": 1000,
    "dtype": "float32",
}
# Novels as far as `novels_test` reads them, and the first articles.
READ = {
    "novels": ("data/public-domain-novels/test", "--limit-tokens", "30000", "--batch-size", "6"),
    "articles": ("data/wikitext-2-raw/wiki.test.raw", "--documents", "16", "--batch-size", "4"),
}


def adapted(seed: int) -> Path:
    """Where the base that was adapted with a seed lies, with the shipped hippocampus."""
    return RUNS / f"lora-{seed}"


def training(seed: int) -> list[str]:
    """The command that trains LoRA."""
    budget = BUDGET | {"seed": seed, "output_dir": adapted(seed)}
    return ["train", "--text", *TEXT, "--memory_off", "--hippocampus", "smollm2-135m", *flags(budget)]


def reading(seed: int, name: str) -> list[str]:
    """The command that reads test text."""
    text = ("--text", *READ[name], "--conditions", "memory,off,marginals")
    return ["eval", "perplexity", "--model", str(adapted(seed)), *text, "--output", report(seed, name).as_posix()]


def report(seed: int, name: str) -> Path:
    """What that command leaves."""
    return RESULTS / f"lora_{seed}_{name}_test.json"


@ends_with_failure
def main(argv: list[str] | None = None) -> int:
    """Makes what is missing; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of training")
    seeds = parser.parse_args(argv).seeds
    for seed in seeds:
        reports = {report(seed, name): reading(seed, name) for name in READ}
        make(ROOT, {adapted(seed) / "config.json": training(seed)} | reports)
    write_tables(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
