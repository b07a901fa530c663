"""One result file of every format: measured on a tiny model where that is quick, laid out by hand otherwise."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hippoformer import HippoFormer
from hippoformer.data import Document
from hippoformer.evaluation import evaluate_perplexity, write_json
from hippoformer.evaluation.recall import evaluate_recall
from hippoformer.evaluation.trace import evaluate_trace
from hippoformer.evaluation.variants import evaluate_variants
from hippoformer.figures import Result
from hippoformer.figures.results import TRAINING
from tiny_texts import text, tiny_load

Content = dict[str, Any]

PROVENANCE: Content = {
    "date": "2030-01-02T03:04:05+00:00",
    "command": "hippoformer eval something --output results/something.json",
    "seed": 7,
    "commit": "0123456789abcdef0123",
    "dirty": True,
    "cpu": "Some CPU",
    "cpus": 2,
    "torch_threads": 1,
    "gpu": None,
    "data": {"sha256": "feedbeef" * 8, "documents": 2},
}
# Of the traced document: what HTML would take for markup, and paragraphs.
PASSAGE = "He said <b>no</b> & left;\nit rained.\n\nThe \"end\" of 'it' {{ 7 * 7 }} </script> came. "


def loud_model() -> tuple[HippoFormer, Any]:
    """A tiny model that recalls at nearly every token, and whose recollections change its predictions."""
    model, tokenizer = tiny_load(buffer_size=40, window=24, segment_len=16)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(2.5)
        model.hippocampus.salience_gate.local_out.weight.mul_(20.0)
        model.hippocampus.fusion.gate_out.bias.fill_(2.0)
    return model, tokenizer


@cache
def _measured() -> dict[str, Content]:
    model, tokenizer = loud_model()
    documents = [Document(f"text {i}", text(i, 200) + PASSAGE * 4, "made up") for i in range(2)]
    own: dict[str, Any] = {"command": "hippoformer eval made-up"}
    with TemporaryDirectory() as folder:
        options: dict[str, Content] = {"shipped": {}, "fifo": {"selection": "fifo"}, "still": {"max_replay_rounds": 0}}
        variants = evaluate_variants(model, tokenizer, documents, options, Path(folder), resamples=50, **own)
    return {
        "wiki": evaluate_perplexity(model, tokenizer, documents, resamples=50, **own).to_dict(),
        "recall": evaluate_recall(model, tokenizer, documents, distances=(60, 120), facts=2, **own).to_dict(),
        "variants_tiny": variants.to_dict(),
        "trace": evaluate_trace(model, tokenizer, Document("<i>Title</i>", PASSAGE * 3, "made up"), **own).to_dict(),
    }


def contents() -> dict[str, Content]:
    """Name of a file -> what it holds; a fresh copy, one file of every format."""
    made = copy.deepcopy(_measured())
    model = made["wiki"]["model"]
    shared = {"model": model, "provenance": PROVENANCE}
    return made | {
        "training_log": {"arguments": {}, "history": _history(), "run": PROVENANCE},
        "speed": {"format": "hippoformer.speed/1", "settings": {}, "results": [_speed()], "provenance": PROVENANCE},
        "dynamics": {"format": "hippoformer.dynamics/1", "segments": _segments(), "retained": _retained()} | shared,
        "long_range": {"format": "hippoformer.long_range/1"} | _long_range() | shared,
        "brain": {"format": "hippoformer.brain/1", "measures": _measures()} | shared,
        "bytes": {"format": "hippoformer.comparison/1", "contestants": _contestants()} | shared,
        "babilong": {"format": "hippoformer.babilong/1", "cells": [_cell("memory", 0.4321), _cell("off", 0.1234)]}
        | shared,
        "salience": {"format": "hippoformer.salience/1", "rules": [_rule()]} | shared,
        "quality": {"format": "hippoformer.quality/1"} | _quality() | shared,
        "overall": {"format": "hippoformer.evaluation/1", "headline": [_headline()]} | shared,
    }


def results() -> list[Result]:
    """The same as they are read from a folder."""
    return [
        Result(name, f"{name}.json", content.get("format", TRAINING), content)
        for name, content in sorted(contents().items())
    ]


def write_results(folder: Path) -> Path:
    """Writes them as files."""
    folder.mkdir(exist_ok=True)
    for name, content in contents().items():
        write_json(folder / f"{name}.json", content)
    return folder


def interval(estimate: float, low: float | None = None, high: float | None = None) -> Content:
    return {"estimate": estimate, "low": low, "high": high, "level": 0.95, "resamples": 10, "seed": 0}


def _history() -> list[Content]:
    shared = {"grad_norm": 0.5, "salience_mean": 0.4, "tagged_share": 0.3, "recall_use": 0.1}
    losses = {"loss_total": 5.0, "loss_lm": 3.0, "loss_credit": 0.7}
    entries: list[Content] = [
        {"step": 20.0 * i, "perplexity": 30.0 - i, "base_perplexity": 31.0, "learning_rate": 0.001 / i}
        | shared
        | losses
        for i in (1, 2, 3)
    ]
    return [*entries, {"step": 60.0, "eval_base_perplexity": 29.0, "eval_perplexity": 27.25, "eval_gain": 0.06}]


def _speed() -> Content:
    return {"measure": "scoring: on against off", "unit": "tokens/s", "value": 90.0, "reference": 100.0, "ratio": 0.9}


def _segments() -> list[Content]:
    counts = {"written": 14, "reactivated": 9, "merged": 2, "forgotten": 1}
    means = {"mean_priority": 2.5, "mean_effective_priority": 2.25, "mean_age": 1.5}
    return [
        {"end": end, "stored": 10 * i, "utilisation": 0.25 * i} | counts | means
        for i, end in enumerate((16, 32, 48, 6400))
    ]


def _retained() -> list[Content]:
    return [
        {"position": 3 * i + 1, "salience": i / 10, "priority": 1.0 + i / 3, "age": i % 4, "credit": i / 20}
        for i in range(10)
    ]


def _long_range() -> Content:
    def bin_of(label: str, gain: float, low: int | None = 1) -> Content:
        return {
            "label": label,
            "low": low,
            "perplexity": {"memory": 20.0 - gain, "off": 20.5},
            "gain": {"memory": interval(gain, gain - 0.01, gain + 0.02)},
        }

    bins = [bin_of("1–512", 0.031), bin_of("512–2,048", 0.075)]
    distances = {"2": [bin_of("new", 0.011, None), bin_of("1 to 24", 0.052), bin_of("25 and more", 0.061, 25)]}
    return {"conditions": ["memory", "off"], "window": 24, "by_position": bins, "by_distance": distances}


def _measures() -> list[Content]:
    values: dict[str, Content | None] = {
        "trained gate": interval(2.345, 2.1, 2.6),
        "untrained gate": interval(1.05, 0.9, 1.2),
        "surprise": None,  # undefined: a share of nothing
    }
    first = {"name": "content_function_ratio", "label": "Content over function", "target": 2.11, "unit": "ratio"}
    other = {"name": "replay_benefit", "label": "Replay benefit", "target": None, "unit": "nats"}
    return [
        first | {"values": values, "chance": 1.0},
        other | {"values": {"trained gate": interval(0.02)}, "chance": None},
    ]


def _contestants() -> list[Content]:
    against = {"bits_ratio": interval(0.96, 0.95, 0.97), "documents": 2, "documents_better": 2}
    shared = {"options": {}, "token_perplexity": interval(20.0)}
    return [
        shared
        | {
            "name": "window 24 + memory",
            "kind": "hippoformer",
            "bits_per_byte": interval(0.9876, 0.97, 1.01),
            "state_nbytes": 2_500_000,
            "against": None,
        },
        shared
        | {
            "name": "window 512",
            "kind": "window",
            "bits_per_byte": interval(1.0123, 1.0, 1.03),
            "state_nbytes": 33_000_000,
            "against": against,
        },
    ]


def _cell(condition: str, right: float) -> Content:
    cell = {"task": "qa1", "length": 4000, "condition": condition, "cases": 25, "tokens_read": 4010.5}
    return cell | {"right": right, "low": right / 2, "high": 2 * right, "nats": 1.2345}


def _rule() -> Content:
    return {
        "rule": "salience",
        "spearman": interval(0.4912),
        "pearson": interval(0.2236),
        "held": interval(0.2617, 0.2, 0.3),
    }


def _quality() -> Content:
    scores = {"bleu": interval(12.25, 11.0, 13.0), "f1": interval(0.158, 0.1, 0.2)}
    test = {"test": "Wilcoxon signed rank", "p": 0.01, "p_corrected": 0.0312}
    difference = {"difference": interval(0.024, 0.01, 0.06), "test": test}
    return {"conditions": {"memory": scores, "off": scores}, "differences": {"f1": difference}}


def _headline() -> Content:
    return {
        "name": "perplexity, memory against off",
        "value": -17.0,
        "low": -18.1,
        "high": -15.8,
        "unit": "%",
        "target": None,
        "control": -8.9,
        "control_name": "window-only",
        "part": "perplexity",
    }
