"""What a run tells of itself, on the terminal, in its log, and to trackers: tensorboard, trackio, wandb.

loss_*            each term of the loss
perplexity        of the tokens read, fused; base_perplexity without recall
salience_mean     and tagged_share, the share of tokens the gate tags
recall_use        mean of lambda (1 - null): how much of a prediction comes from recall
buffer_use        share of the store that holds an episode
drift             how far the code of the anchors has moved from its slowly following reference
consolidation_r   correlation of salience and credit
"""

import json
import math
from collections.abc import Sequence

from accelerate import Accelerator

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError


def start(accelerator: Accelerator, project: str, run_name: str | None, config: HippoFormerConfig) -> None:
    """Opens the run's trackers with its options.

    Raises:
        ConfigurationError: a tracker that does not start.
    """
    # Trackers keep tables of scalars; what is a list or nothing goes in as its JSON.
    options = {
        name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
        for name, value in config.to_dict().items()
    }
    named = {"wandb": {"name": run_name}, "trackio": {"name": run_name}} if run_name else {}
    try:
        accelerator.init_trackers(project, options, init_kwargs=named)
    except Exception as error:  # the trackers' own errors share no base class
        raise ConfigurationError(
            f"a tracker of --report_to did not start ({error}): log in to it, use its offline mode "
            "(WANDB_MODE=offline), or leave it out"
        ) from error


def means(window: Sequence[dict[str, float]]) -> dict[str, float]:
    """The numbers of several optimizer steps in one: means over their tokens, losses over their pieces.

    The perplexities are those of the tokens that were to be learned, 1 where there was none.

    Args:
        window: sums of each step, as the trainer counts them.
    """
    total = {name: sum(step.get(name, 0.0) for step in window) for name in window[-1]}
    tokens, learned = (max(total[name], 1.0) for name in ("tokens", "learned"))
    numbers = {name: total[name] / total["pieces"] for name in total if name.startswith("loss_")}
    of_memory = {"salience_mean": "salience", "tagged_share": "tagged", "recall_use": "mixture"}
    numbers |= {shown: total[name] / tokens for shown, name in of_memory.items() if name in total}
    return numbers | {
        "perplexity": math.exp(total["nll"] / learned),
        "base_perplexity": math.exp(total["base_nll"] / learned),
        "grad_norm": total["grad_norm"] / max(len(window) - total["skipped"], 1.0),
        "skipped_steps": total["skipped"],
    }
