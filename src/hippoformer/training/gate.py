"""Pre-trains the gate on measured credit.

Training through the memory is slow. The gate's local pathway needs only the hidden states, which are on disk, so it is
trained alone in a fraction of the time, and the joint phase begins with a selection that is worth learning under. The
target is credit up to one whole prediction: predicting it is predicting the chance to be asked for, which ranks what is
stated once and asked for once, a name or a number, before the tenth best "of the".
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hippoformer.hippocampus.circuit import Hippocampus
from hippoformer.training.arguments import TrainArguments
from hippoformer.training.hidden_states import HiddenStateCache, ReadDocument

_CHUNK, _BATCH = 512, 8
# Documents in memory at once; their chunks are mixed.
_GROUP = 16
# The first tokens of a chunk are not judged: the smoothing lacks the tokens before them.
_UNJUDGED = 8
# Every fourth transition decides the tagging threshold.
_EVERY = 4
_SCALAR_RATE = 10.0


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
    """Trains the local pathway to predict usefulness; a function of weights, documents and seed alone.

    Args:
        useful: (T,) per document, in [0, 1], NaN where it is not known.
        arguments: `foresight_passes` over all documents at `rate`, which falls linearly to 0.

    Returns:
        The mean loss of the last pass, NaN if nothing was known. The gate then tags `target_tagged_share` of the
        measured transitions.
    """
    gate, passes = hippocampus.salience_gate, arguments.foresight_passes
    optimizer = torch.optim.AdamW(parameter_groups(gate, arguments.rate, arguments.weight_decay))
    batches = _batches({number: len(target) for number, target in useful.items()}, passes, arguments.seed)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / max(len(batches), 1))
    device, held, losses = next(gate.parameters()).device, dict[int, ReadDocument](), list[float]()
    for group, batch in batches:
        if held.keys() != set(group):
            held = {number: documents[number] for number in group}
        errors = []
        for number, start in batch:
            forecast = _forecast(hippocampus, held[number], slice(start, start + _CHUNK))[_UNJUDGED:]
            target = useful[number][start : start + _CHUNK].to(device)[_UNJUDGED:]
            known = ~target.isnan()
            errors.append(binary_cross_entropy_with_logits(forecast[known], target[known], reduction="none"))
        error = torch.cat(errors)
        if error.numel():
            error.mean().backward()
            nn.utils.clip_grad_norm_(gate.parameters(), arguments.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            falling.step()
            losses.append(float(error.detach().mean()))
    if not losses:
        return float("nan")
    with torch.no_grad():
        made = [_forecast(hippocampus, documents[number], slice(1, None))[::_EVERY] for number in sorted(useful)]
        gate.tagging_threshold.copy_(torch.quantile(torch.cat(made).float(), 1.0 - arguments.target_tagged_share))
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
