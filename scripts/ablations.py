"""Trains the hippocampus again without each of its parts, over several seeds, and measures what that costs.

    python scripts/ablations.py                            # what is missing: hours on two CPU cores
    python scripts/ablations.py --seeds 1 --only fifo      # these runs
    python scripts/ablations.py --list                     # every run

Every run is small, the same steps and texts for all, so that differences mean something and absolute figures less. A
run leaves `runs/ablations/NAME-SEED`, and three reports there; those that exist are not made again. The base reads
every text once, and planted facts are asked of all runs of a seed together, with marginals and without. Of these
reports come `results/retrained_novels.json`, `retrained_articles.json` and `retrained_recall.json`: each variant's
nats and answers are means over its seeds, paired with those of `shipped` over the same seeds: the shipped memory
without its marginals, which is what the other variants change.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from commands import ends_with_failure, flags, hippoformer, make
from hippoformer.evaluation.provenance import provenance
from hippoformer.evaluation.report import write_json
from hippoformer.evaluation.statistics import mean_interval, paired_ratio, token_perplexity

ROOT = Path(__file__).resolve().parents[1]
RUNS, RESULTS = Path("runs/ablations"), Path("results")
TEXT = ("data/public-domain-novels/train", "data/wikitext-2-raw/wiki.train.first-part.raw")
NOVELS, ARTICLES = "data/public-domain-novels/validation", "data/wikitext-2-raw/wiki.valid.raw"
SEEDS = (1, 2, 3)
# The same for every run; a text is longer than window and buffer, so that there is something to choose.
BUDGET = {
    "max_samples": 44,
    "max_document_tokens": 4096,
    "planted_documents": 16,
    "planted_facts": 16,
    "max_seq_length": 512,
    "max_steps": 100,
    "recall_share": 0.6,
    "learning_rate": 1e-3,
    "credit_documents": 16,
    "foresight_passes": 4,
    "save_steps": 1000,
}
OPTIONS: dict[str, Any] = {
    "buffer_size": 1024,
    "decay_rate": 0.998,
    "marginal_weight": 0.0,
}
# One base reads for all of them; their hidden states are found again.
LAYERS = [8, 16, 24, -1]


@dataclass(frozen=True)
class Variant:
    """A way to train: options of the config that differ from `OPTIONS`, and of the budget."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("shipped"),
    Variant("no-memory", {"buffer_size": 0}),
    Variant("fifo", {"selection": "fifo"}),
    Variant("no-gate", {"importance_weight_range": [1.0, 1.0]}),
    Variant("surprise", {"selection": "surprise"}),
    Variant("random", {"selection": "random"}),
    Variant("no-credit", budget={"credit_documents": 0}),
    Variant("replay", {"max_replay_rounds": 10}),
    Variant("layer-16", {"memory_layer": 16}),
    Variant("layer-24", {"memory_layer": 24}),
    Variant("layer-last", {"memory_layer": -1}),
    Variant("layer-8", {"memory_layer": 8}),
    Variant("last-residual-too", {"memory_layer": -1, "residual_readout": True}),
    Variant("last-residual-only", {"memory_layer": -1, "residual_readout": True, "distribution_readout": False}),
    Variant("marginals", {"marginal_weight": 0.75}),
    Variant("no-following", {"following": False}),
    Variant("all-matches-alike", {"match_power": 0.0, "match_characters": 0.0, "match_recency": 0.0}),
    Variant("buffer-512", {"buffer_size": 512}),
    Variant("buffer-4096", {"buffer_size": 4096}),
)


@dataclass(frozen=True)
class Run:
    """A variant trained with one seed."""

    variant: Variant
    seed: int

    @property
    def folder(self) -> Path:
        """Where its weights and reports lie."""
        return RUNS / f"{self.variant.name}-{self.seed}"

    def training(self) -> list[str]:
        """The command that trains it."""
        budget = BUDGET | self.variant.budget | {"seed": self.seed, "output_dir": self.folder}
        kept = ("--cache_dir", "hidden_states")
        return ["train", "--text", *TEXT, *flags(budget), *kept, *_set(OPTIONS | self.variant.options)]

    def reports(self) -> dict[str, list[str]]:
        """Name of a report -> the command that makes it, without where to."""
        model = ("--model", str(self.folder))
        trained, together = ("--variant", "trained"), ("--batch-size", "8")
        return {
            "novels": ["eval", "variants", *model, "--text", NOVELS, "--limit-tokens", "12288", *together, *trained],
            "articles": ["eval", "variants", *model, "--text", ARTICLES, "--documents", "16", *together, *trained],
        }

    def report(self, name: str) -> Path:
        """Where that report, or "recall", is."""
        return self.folder / f"{name}.json"

    def lacks(self, name: str) -> bool:
        """Whether that report is still to be made."""
        return not (ROOT / self.report(name)).is_file()

    def measured(self) -> bool:
        """Whether all its reports are there."""
        return not any(self.lacks(name) for name in (*self.reports(), "recall"))


def _set(options: dict[str, Any]) -> list[str]:
    return ["--set", *(f"{name}={json.dumps(value, separators=(',', ':'))}" for name, value in options.items())]


def recall(runs: Sequence[Run]) -> list[str]:
    """The command that asks all these runs for planted facts, in one reading of the base; without where to."""
    first, *others = runs
    planted = ("--text", NOVELS, "--streams", "3", "--facts", "9", "--distances", "2000,8000")
    trained = [part for run in others for part in ("--trained", f"{run.folder.name}={run.folder}")]
    command = ("eval", "recall-variants", "--model", str(first.folder), *planted)
    return [*command, "--variant", first.folder.name, *trained]


def measure(run: Run) -> None:
    """Trains and measures what is missing of a run, but for recall.

    Raises:
        CalledProcessError: a command failed.
    """
    reports = {run.report(name): [*c, "--output", run.report(name).as_posix()] for name, c in run.reports().items()}
    make(ROOT, {run.folder / "config.json": run.training()} | reports)


def read_alike(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs in groups that one reading of the base can serve: it has marginals or not."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.variant.options.get("marginal_weight"), []).append(run)
    return list(groups.values())


def ask(runs: Sequence[Run]) -> None:
    """Asks all runs that were not yet asked, and gives each its own report.

    Raises:
        CalledProcessError: the command failed.
    """
    runs = [run for run in runs if run.lacks("recall")]
    if not runs:
        return
    together = runs[0].folder / "recall_of_all.json"
    hippoformer(ROOT, *recall(runs), "--output", together.as_posix())
    report = json.loads((ROOT / together).read_text(encoding="utf-8"))
    for run, variant in zip(runs, report["variants"], strict=True):
        write_json(ROOT / run.report("recall"), report | {"reference": run.folder.name, "variants": [variant]})


def read_all_layers() -> None:
    """One reading of all texts for every `memory_layer`: the fewest steps that a training can have, and its reports.

    Raises:
        CalledProcessError: a command failed.
    """
    measure(Run(Variant("reading", {"memory_layer": LAYERS}, {"max_steps": 1, "credit_documents": 0}), SEEDS[0]))


def collect(runs: Sequence[Run]) -> None:
    """Writes each of the three files of results from the runs that have its report, if `shipped` is among them."""
    for name, combined in (("novels", perplexities), ("articles", perplexities), ("recall", answers)):
        loaded: dict[str, list[dict[str, Any]]] = {}
        for run in runs:
            if not run.lacks(name):
                loaded.setdefault(run.variant.name, []).append(_load(run, name))
        if "shipped" in loaded:
            write_json(ROOT / RESULTS / f"retrained_{name}.json", combined(loaded, _shared(loaded)))


def _load(run: Run, name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((ROOT / run.report(name)).read_text(encoding="utf-8"))
    return report | {"seed": run.seed}


def _shared(loaded: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the combined report takes over, and where it comes from: the first run's commit, and which run was made by
    which commit on what.
    """
    first, where = loaded["shipped"][0], ("commit", "cpu", "gpu")
    runs = {
        f"{name}-{report['seed']}": {key: report["provenance"].get(key) for key in where}
        for name, reports in loaded.items()
        for report in reports
    }
    own = provenance(seed=0, command="python scripts/ablations.py")
    return {
        "format": first["format"],
        "model": first["model"],
        "reference": "shipped",
        "provenance": own | {key: first["provenance"][key] for key in ("commit", "dirty")} | {"runs": runs},
    }


def perplexities(loaded: dict[str, list[dict[str, Any]]], shared: dict[str, Any]) -> dict[str, Any]:
    """A report like that of `eval variants`, of nats that are means over seeds."""
    first = loaded["shipped"][0]
    tokens, base = first["tokens"], first["base_nll"]
    nll = {name: {r["seed"]: np.array(r["variants"][0]["nll"]) for r in of} for name, of in loaded.items()}
    variants = []
    for name, common, own, reference in _over_seeds(nll):
        ratios = [float(np.exp((nll[name][s] - nll["shipped"][s]).sum() / sum(tokens))) for s in common]
        variants.append(
            {
                "name": _named(name, common),
                "options": loaded[name][0]["variants"][0]["options"],
                "nll": own.tolist(),
                "perplexity": token_perplexity(own, tokens),
                "memory_nbytes": loaded[name][0]["variants"][0]["memory_nbytes"],
                "against_base": _plain(paired_ratio(own, base, tokens)),
                "against": None if name == "shipped" else _plain(paired_ratio(own, reference, tokens)),
                "ratio_of_each_seed": ratios,
            }
        )
    return shared | {
        "base_perplexity": first["base_perplexity"],
        "documents": first["documents"],
        "tokens": tokens,
        "base_nll": base,
        "variants": variants,
    }


def answers(loaded: dict[str, list[dict[str, Any]]], shared: dict[str, Any]) -> dict[str, Any]:
    """A report like that of `eval recall-variants`, of answers right in so many of the seeds."""
    right = {
        name: {r["seed"]: np.array([q["right"] for q in r["variants"][0]["asked"]], dtype=float) for r in of}
        for name, of in loaded.items()
    }
    at = np.array([q["asked_distance"] for q in loaded["shipped"][0]["variants"][0]["asked"]])
    variants = []
    for name, common, own, reference in _over_seeds(right):
        variants.append(
            {
                "name": _named(name, common),
                "cells": [
                    {"distance": int(distance), "cases": int((at == distance).sum())} for distance in sorted(set(at))
                ],
                "right": {str(d): vars(mean_interval(own[at == d])) for d in sorted(set(at))},
                "against": None
                if name == "shipped"
                else {str(d): vars(mean_interval((own - reference)[at == d])) for d in sorted(set(at))},
                "right_of_each_seed": {str(seed): float(right[name][seed].mean()) for seed in common},
            }
        )
    return shared | {"settings": loaded["shipped"][0]["settings"], "variants": variants}


def _over_seeds(
    values: dict[str, dict[int, np.ndarray]],
) -> Iterator[tuple[str, list[int], np.ndarray, np.ndarray]]:
    """Each variant, the seeds it shares with `shipped`, and the means of both over these."""
    for name, by_seed in values.items():
        if common := sorted(by_seed.keys() & values["shipped"].keys()):
            own, reference = (np.mean([of[seed] for seed in common], axis=0) for of in (by_seed, values["shipped"]))
            yield name, common, own, reference


def _named(name: str, seeds: list[int]) -> str:
    return f"{name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def _plain(compared: Any) -> dict[str, Any]:
    return vars(compared) | {"ratio": vars(compared.ratio)}


@ends_with_failure
def main(argv: list[str] | None = None) -> int:
    """Makes what is asked for; the exit status of the first command that fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="seeds of training")
    parser.add_argument("--only", nargs="+", choices=[v.name for v in VARIANTS], help="variants; default: all")
    parser.add_argument("--list", action="store_true", help="print the runs and whether they are measured")
    arguments = parser.parse_args(argv)
    # Seed by seed, so that an interrupted run has one whole table rather than parts of three.
    runs = [Run(v, s) for s in arguments.seeds for v in VARIANTS if not arguments.only or v.name in arguments.only]
    if arguments.list:
        for run in runs:
            print(f"{'measured' if run.measured() else 'missing':8} {run.folder}")
        return 0
    missing = [run for run in runs if not run.measured()]
    print(f"{len(missing)} runs are missing", flush=True)
    if missing:
        read_all_layers()
    every = [Run(v, s) for s in SEEDS for v in VARIANTS]
    for seed in arguments.seeds:
        of_seed = [run for run in missing if run.seed == seed]
        for number, run in enumerate(of_seed, start=1):
            began = time.monotonic()
            measure(run)
            took = (time.monotonic() - began) / 60
            print(f"seed {seed}, {number}/{len(of_seed)}: {run.variant.name} took {took:.1f} min", flush=True)
            collect(every)
        for together in read_alike(of_seed):
            ask(together)
        collect(every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
