"""Does salience predict what an episode will be worth?

Credit of an episode: its share of the predictions made of later tokens beyond the window, measured with room for every
episode. The salience that the gate gave when the episode was written is compared with it, token by token: Spearman's
and Pearson's correlation (the latter is the original's consolidation R), and the share of all credit that the tenth of
the transitions with the highest salience holds. Controls: the surprise 1 - p of a token, and the gate before training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.common.results import Result, Row
from evaluation.common.statistics import bootstrap
from hippoformer.data.documents import Document
from hippoformer.errors import TextError
from hippoformer.evaluation import encode, reading
from hippoformer.hippocampus.salience import SalienceGate
from hippoformer.training.credit import measure_credit
from hippoformer.training.readers import ReadDocument

TRAINED, UNTRAINED, SURPRISE = RULES = ("trained gate", "untrained gate", "surprise")
METRICS = ("Spearman with credit", "Pearson with credit", "credit held by the best tenth")


@dataclass
class Options:
    """Which part of the texts is read."""

    limit_tokens: int | None = field(default=None, metadata={"help": "read the first N tokens of each document"})
    documents: int | None = field(default=None, metadata={"help": "read the first N documents"})
    seed: int = field(default=0, metadata={"help": "of the untrained gate and of the bootstrap over documents"})


@dataclass(frozen=True)
class Gated:
    """One document read from an empty memory.

    Attributes:
        salience, surprise: (T,) of each transition, the latter 1 - p of its token. nats: -log p a token.
        priority: mean of what is stored at the end. states: what the hippocampus read.
    """

    salience: np.ndarray
    surprise: np.ndarray
    nats: float
    priority: float
    states: ReadDocument


@contextmanager
def gate(model: Any, kind: str, seed: int = 0) -> Iterator[None]:
    """Within it the gate is "untrained", "unsmoothed" (each transition is judged by itself), or the model's own."""
    hippocampus = model.hippocampus
    own = hippocampus.salience_gate
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        other = SalienceGate(hippocampus.width, hippocampus.config).to(model.device).eval()
        if kind == "untrained":
            other.surprise_weight.zero_()
        else:
            other.load_state_dict(own.state_dict())
        if kind == "unsmoothed":
            other.smoothing.zero_()
            other.smoothing[-1] = 1.0
    hippocampus.salience_gate = other
    try:
        yield
    finally:
        hippocampus.salience_gate = own


def read(model: Any, input_ids: Tensor) -> Gated:
    """Reads (T,) tokens with the memory on."""
    cache = model.new_cache(1)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("hidden", "salience", "base", "prior", "target")}
    for step in model.stream(input_ids.unsqueeze(0).to(model.device), [len(input_ids)], cache):
        found = (step.hidden, step.found.salience, step.base_log_prob, step.prior_log_prob, step.target_log_prob)
        for of, tensor in zip(parts.values(), found, strict=True):
            of.append(tensor[0, : step.new[0]].cpu())
    hidden, salience, base, prior, target = (torch.cat(of) for of in parts.values())
    priorities = [episode.priority for episode in cache.episodes(0, stored_only=True)]
    return Gated(
        salience.double().numpy(),
        (1.0 - prior.exp()).double().numpy(),
        -float(target.double().sum()) / (len(input_ids) - 1),
        float(np.mean(priorities)) if priorities else 0.0,
        ReadDocument(input_ids, hidden, base, prior),
    )


def run(model: Any, tokenizer: Any, documents: Sequence[Document], options: Options) -> Result:
    """Salience, surprise and an untrained gate against credit; means over documents.

    Raises:
        TextError: no transition of any document earned credit.
    """
    figures: dict[str, list[tuple[float, ...]]] = {rule: [] for rule in RULES}
    perfect, titles = [], []
    for document in documents[: options.documents]:
        ids = encode(tokenizer, document, limit_tokens=options.limit_tokens).input_ids
        if len(ids) < 2:
            continue
        with reading(model):
            own = read(model, ids)
            with gate(model, "untrained", options.seed):
                untrained = read(model, ids)
            credit = measure_credit(model.hippocampus, [own.states])[0].double().numpy()  # (T,)
        known = ~np.isnan(credit)
        credit = credit[known]
        if len(credit) < 2 or credit.max() <= 0:
            continue
        for rule, values in zip(RULES, (own.salience, untrained.salience, own.surprise), strict=True):
            figures[rule].append(compare(values[known], credit))
        perfect.append(held(credit, credit))
        titles.append(document.title)
    if not titles:
        raise TextError(
            f"no transition of {len(documents)} documents earned credit: none outlived the window of "
            f"{model.config.window} tokens and was of use; name longer texts"
        )
    columns = [
        *((rule, metric, [one[i] for one in figures[rule]]) for rule in RULES for i, metric in enumerate(METRICS)),
        ("perfect forecast", METRICS[2], perfect),
    ]
    rows = [
        Row(condition, metric, *bootstrap(np.mean, values, seed=options.seed), n=len(values))
        for condition, metric, values in columns
    ]
    rows.append(Row("original", METRICS[1], 0.86))  # its target, which it never measured
    return Result(rows, {"documents": titles, "figures": figures})


def compare(values: np.ndarray, credit: np.ndarray) -> tuple[float, float, float]:
    """Spearman, Pearson, and the share of credit held by the best tenth; (N,) each."""
    from scipy import stats

    spearman, pearson = stats.spearmanr(values, credit).statistic, stats.pearsonr(values, credit).statistic
    return float(spearman), float(pearson), held(values, credit)


def held(values: np.ndarray, credit: np.ndarray) -> float:
    """Share of all credit held by the tenth of the transitions with the highest values."""
    best = np.argsort(-values, kind="stable")[: max(1, round(0.1 * len(values)))]
    return float(credit[best].sum() / credit.sum())
