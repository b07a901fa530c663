"""The gate's first lessons in foresight: several passes over what each episode turned out to be worth.

Reading with the memory is what training costs; the gate's local pathway needs none of it, only the hidden states that
are on disk. So before the joint phase it is taught alone, in a fraction of the time, and the joint phase begins with a
selection that is already worth learning under.
"""

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from hippoformer.hippocampus.circuit import Hippocampus
from hippoformer.training.hidden_states import HiddenStateCache, ReadDocument
from hippoformer.training.learning_rates import parameter_groups

_CHUNK, _BATCH, _TOGETHER = 512, 8, 16
# A chunk's first tokens are judged without what the smoothing would bring over from the chunk before.
_UNJUDGED = 8
# For the tagging threshold every so many transitions are looked at.
_EVERY = 4


def teach_foresight(
    hippocampus: Hippocampus,
    documents: HiddenStateCache,
    useful: dict[int, torch.Tensor],
    passes: int,
    rate: float,
    seed: int,
) -> float:
    """Trains the local pathway to foresee usefulness; a function of weights, documents and seed alone.

    Args:
        useful: (T,) per document, in [0, 1], NaN where it is not known.
        passes: over all documents. rate: of AdamW, falling linearly to zero.

    Returns:
        The mean loss of the last pass, NaN if nothing was known. The gate then tags `target_tagged_share` of the
        measured transitions.
    """
    gate, width = hippocampus.salience_gate, max(_UNJUDGED, hippocampus.config.salience_min_duration)
    lengths = {number: len(target) for number, target in useful.items() if number >= 0}
    draws = torch.Generator().manual_seed(seed)
    batches = [
        batch
        for _ in range(passes)
        for group in _groups(sorted(lengths), draws)
        for batch in _batches(group, lengths, draws)
    ]
    optimizer = torch.optim.AdamW(parameter_groups(gate, rate, hippocampus.config.weight_decay))
    rates = [options["lr"] for options in optimizer.param_groups]
    device, held, losses = next(gate.parameters()).device, dict[int, ReadDocument](), list[float]()
    for place, (group, batch) in enumerate(batches):
        if held.keys() != set(group):
            held = {number: documents[number] for number in group}
        for options, start in zip(optimizer.param_groups, rates, strict=True):
            options["lr"] = start * (1.0 - place / len(batches))
        errors = []
        for number, start in batch:
            forecast = _forecast(hippocampus, held[number], slice(start, start + _CHUNK))[width:]
            target = useful[number][start : start + _CHUNK].to(device)[width:]
            known = ~target.isnan()
            errors.append(binary_cross_entropy_with_logits(forecast[known], target[known], reduction="none"))
        error = torch.cat(errors)
        if error.numel():
            error.mean().backward()
            torch.nn.utils.clip_grad_norm_(gate.parameters(), hippocampus.config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(error.detach().mean()))
    if losses:
        share = hippocampus.config.target_tagged_share
        with torch.no_grad():
            made = [_forecast(hippocampus, documents[number], slice(1, None))[::_EVERY] for number in sorted(lengths)]
            gate.tagging_threshold.copy_(torch.quantile(torch.cat(made).float(), 1.0 - share))
    last = losses[-max(1, len(losses) // max(passes, 1)) :]
    return sum(last) / len(last) if last else float("nan")


def _forecast(hippocampus: Hippocampus, read: ReadDocument, part: slice) -> torch.Tensor:
    """(n,) forecasts for the transitions into the tokens of a part, which begins at 1 or later."""
    gate = hippocampus.salience_gate
    device = next(gate.parameters()).device
    hidden = hippocampus.normed(read.hidden[part.start - 1 : part.stop].to(device).float()).unsqueeze(0)
    return gate.at_a_glance(hidden[:, :-1], hidden[:, 1:], -read.log_prob[part].to(device).unsqueeze(0))[0]


def _groups(numbers: list[int], draws: torch.Generator) -> list[list[int]]:
    """The documents in a new order, so many together as may be in memory at once."""
    order = torch.randperm(len(numbers), generator=draws).tolist()
    return [[numbers[place] for place in order[low : low + _TOGETHER]] for low in range(0, len(order), _TOGETHER)]


def _batches(
    group: list[int], lengths: dict[int, int], draws: torch.Generator
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Batches of chunks (document, start) of a group of documents, mixed."""
    chunks = [(number, start) for number in group for start in range(1, lengths[number] - 2 * _UNJUDGED, _CHUNK)]
    order = torch.randperm(len(chunks), generator=draws).tolist()
    return [(group, [chunks[place] for place in order[low : low + _BATCH]]) for low in range(0, len(order), _BATCH)]
