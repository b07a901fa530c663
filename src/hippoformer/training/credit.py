"""What training minimises, and credit: what each episode turns out to be worth, the target that the gate learns.

    total = lm + sparsity + credit        (each with its weight)

lm is the next-token loss of the fused distribution. Sparsity keeps the mean salience at or below its target. Credit is
the gate's only teacher: the share of later predictions owed to an episode is known after the fact, and the gate learns
to predict it. Training through the memory is slow, but the gate's local pathway needs only the hidden states, which are
on disk, so it is first taught alone in a fraction of the time, and the joint phase begins with a selection that is
worth learning under. Its target is credit up to one whole prediction: the chance to be asked for, which ranks what is
stated once and asked for once, a name or a number, before the tenth best "of the".
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hippoformer.configuration import HippoFormerConfig
from hippoformer.hippocampus.hippocampus import Hippocampus
from hippoformer.training.arguments import TrainArguments
from hippoformer.training.readers import HiddenStateCache, ReadDocument, cut
from hippoformer.training.streams import whole_documents

_CHUNK, _BATCH = 512, 8  # tokens of a chunk that the gate is taught on, and chunks of a step
_GROUP = 16  # documents in memory at once; their chunks are mixed
_UNJUDGED = 8  # first tokens of a chunk: the smoothing lacks the tokens before them
_EVERY = 4  # every fourth transition decides the tagging threshold
_SCALAR_RATE = 10.0


class HippoFormerLoss(nn.Module):
    """The weighted sum of the terms; no parameters.

    Args:
        lm, credit, sparsity: weights of the terms.
        target_tagged_share: mean salience up to which sparsity is 0.
    """

    def __init__(
        self, lm: float = 1.0, credit: float = 1.0, sparsity: float = 0.1, target_tagged_share: float = 0.3
    ) -> None:
        super().__init__()
        self.weights = {"lm": lm, "credit": credit, "sparsity": sparsity}
        self.target_tagged_share = target_tagged_share

    def forward(
        self,
        target_log_prob: Tensor,
        counted: Tensor,
        salience: Tensor | None = None,
        forecast: Tensor | None = None,
        useful: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms before their weights are applied, and `total`; means over counted tokens, 0 where none is counted.

        Args:
            target_log_prob: (R, N) fused log p of each token.
            counted: (R, N) bool, False for padding and for tokens without a prediction.
            salience: (R, N) in [0, 1]. forecast: (R, N) log-odds of usefulness. None: the next-token loss alone.
            useful: (R, N) in [0, 1], measured usefulness, NaN where it is unknown; None for nowhere.
            learned: (R, N) bool, the counted tokens that are to be predicted; None for all of them.
        """
        # Nothing that is not counted may reach a sum, or a gradient: 0 * NaN is NaN.
        learned = counted if learned is None else counted & learned
        terms = {"lm": _mean(-target_log_prob, learned)}
        if salience is not None:
            terms["sparsity"] = (_mean(salience, counted) - self.target_tagged_share).clamp_min(0.0) ** 2
        if forecast is not None:
            useful = torch.full_like(forecast, torch.nan) if useful is None else useful.to(forecast.dtype)
            known = counted & ~useful.isnan()
            target, forecast = (torch.where(known, tensor, 0.0) for tensor in (useful, forecast))
            terms["credit"] = _mean(binary_cross_entropy_with_logits(forecast, target, reduction="none"), known)
        return terms | {"total": torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()}


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp_min(1)


class ConsolidationRScore:
    """Pearson correlation of salience and retrieval quality (the original's consolidation R), streamed.

    Retrieval quality of an episode is the credit it earned. Sums are kept in float64; `update` any number of times.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(6, dtype=torch.float64)

    def update(self, salience: Tensor, quality: Tensor, counted: Tensor) -> None:
        """Adds episodes: three tensors of one shape, the last one bool."""
        x, y = salience.detach()[counted].double().cpu(), quality.detach()[counted].double().cpu()
        self._sums += torch.stack([v.sum() for v in (torch.ones_like(x), x, y, x * x, y * y, x * y)])

    def compute(self) -> float:
        """The correlation in [-1, 1]; NaN while fewer than two episodes, or only equal ones, were added."""
        n, x, y, xx, yy, xy = self._sums.tolist()
        spread = (n * xx - x * x) * (n * yy - y * y)
        return (n * xy - x * y) / spread**0.5 if spread > 0 else float("nan")


@contextmanager
def reconfigured(hippocampus: Hippocampus, **options: object) -> Iterator[None]:
    """Runs the hippocampus under other options; those that shape parameters must stay as they are."""
    before = hippocampus.config
    hippocampus.configure(HippoFormerConfig(**(before.to_dict() | options)))
    try:
        yield
    finally:
        hippocampus.configure(before)


@torch.no_grad()
def measure_credit(hippocampus: Hippocampus, documents: Sequence[ReadDocument]) -> list[Tensor]:
    """Credit of each token's episode: the share of later predictions, beyond the window, that is owed to it.

    The documents are read with a store that keeps every episode, all of equal priority: with the working capacity, an
    episode that the present gate drops could never prove its worth.

    Args:
        documents: as the base read them, side by side in rows; best of like length.

    Returns:
        (T,) float32 for each document of T tokens; NaN where there is no episode: for the first token, and for those
        that never left the window.
    """
    lengths, device = [len(document) for document in documents], hippocampus.recall.key_proj.weight.device
    everything = {"buffer_size": max(lengths), "selection": "fifo", "decay_rate": 1.0, "max_replay_rounds": 0}
    with reconfigured(hippocampus, **everything, importance_weight_range=(1.0, 1.0)):
        state = hippocampus.empty_state(len(documents), documents[0].hidden.dtype, device)
        for piece in whole_documents(range(len(documents)), lengths, hippocampus.config.segment_len):
            _, state = hippocampus.read(state, cut(documents, piece, device)[0], credit=True)
    stored = state.episodes.slots(0, max(lengths))
    credits = [torch.full((length,), torch.nan) for length in lengths]
    for credit, kept, position, earned in zip(credits, stored.valid, stored.position, stored.credit, strict=True):
        credit[position[kept].long().cpu()] = earned[kept].cpu()
    return credits


def parameter_groups(module: nn.Module, rate: float, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups of AdamW for a part of the memory.

    Scales, biases and thresholds must travel far and are few: they learn ten times as fast as matrices, without decay.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "lr": rate, "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "lr": _SCALAR_RATE * rate, "weight_decay": 0.0},
    ]


def teach_gate(
    hippocampus: Hippocampus, documents: HiddenStateCache, useful: dict[int, Tensor], arguments: TrainArguments
) -> float:
    """Trains the local pathway to predict usefulness, and tags `target_tagged_share` of the measured transitions.

    Args:
        useful: (T,) per document, in [0, 1], NaN where it is not known.
        arguments: `foresight_passes` over all documents at `rate`, which falls linearly to 0. The seed decides alone.

    Returns:
        The mean loss of the last pass, NaN if nothing was known.
    """
    gate, passes = hippocampus.salience_gate, arguments.foresight_passes
    optimizer = torch.optim.AdamW(parameter_groups(gate, arguments.rate, arguments.weight_decay))
    batches = _batches({number: len(target) for number, target in useful.items()}, passes, arguments.seed)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / max(len(batches), 1))
    device, held, losses = next(gate.parameters()).device, dict[int, ReadDocument](), list[float]()
    for group, batch in batches:
        held = {number: held.get(number) or documents[number] for number in group}
        spans = [(number, slice(start, start + _CHUNK)) for number, start in batch]
        target = torch.cat([useful[number][span][_UNJUDGED:] for number, span in spans]).to(device)
        known = ~target.isnan()
        if known.any():
            made = torch.cat([_forecast(hippocampus, held[number], span)[_UNJUDGED:] for number, span in spans])
            loss = binary_cross_entropy_with_logits(made[known], target[known])
            loss.backward()
            nn.utils.clip_grad_norm_(gate.parameters(), arguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            falling.step()
            losses.append(float(loss.detach()))
    if not losses:
        return float("nan")
    with torch.no_grad():
        all_of = [_forecast(hippocampus, documents[number], slice(1, None))[::_EVERY] for number in sorted(useful)]
        gate.tagging_threshold.copy_(torch.quantile(torch.cat(all_of).float(), 1.0 - arguments.target_tagged_share))
    last = losses[-max(1, len(losses) // passes) :]
    return sum(last) / len(last)


def _forecast(hippocampus: Hippocampus, read: ReadDocument, part: slice) -> Tensor:
    """(n,) forecasts for the transitions into the tokens of a part, which begins at 1 or later."""
    gate = hippocampus.salience_gate
    device = next(gate.parameters()).device
    hidden = hippocampus.normed(read.hidden[part.start - 1 : part.stop].to(device).float()).unsqueeze(0)
    return gate.at_a_glance(hidden[:, :-1], hidden[:, 1:], -read.log_prob[part].to(device).unsqueeze(0))[0]


def _batches(lengths: dict[int, int], passes: int, seed: int) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """For each optimizer step, a group of documents and a batch of chunks (document, start) of them."""
    draws = torch.Generator().manual_seed(seed)

    def shuffled(items: list) -> list:
        return [items[place] for place in torch.randperm(len(items), generator=draws).tolist()]

    batches = []
    for _ in range(passes):
        order = shuffled(sorted(lengths))
        for group in (order[low : low + _GROUP] for low in range(0, len(order), _GROUP)):
            chunks = shuffled([(n, start) for n in group for start in range(1, lengths[n] - 2 * _UNJUDGED, _CHUNK)])
            batches += [(group, chunks[low : low + _BATCH]) for low in range(0, len(chunks), _BATCH)]
    return batches
