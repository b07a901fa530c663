"""Training curves, from the training log."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from hippoformer.figures.results import Result
from hippoformer.figures.style import BLUE, GREEN, GREY, MUTED, ORANGE, PURPLE, SERIES, canvas

Series = tuple[list[float], list[float]]


def draw(results: Sequence[Result]) -> Figure:
    """Perplexity, losses, salience and use of recall, and the learning rate of the last training log."""
    history = results[-1].content["history"]

    def series(name: str) -> Series:
        known = [entry for entry in history if name in entry]
        return [entry["step"] for entry in known], [entry[name] for entry in known]

    figure = canvas(10.5, 6.2)
    (perplexity, losses), (shares, rate) = figure.subplots(2, 2, sharex=True)
    perplexity.plot(*series("base_perplexity"), color=GREY, label="base alone")
    perplexity.plot(*series("perplexity"), color=BLUE, label="with the memory")
    if series("eval_perplexity")[0]:
        perplexity.plot(*series("eval_base_perplexity"), "s--", color=GREY, label="base alone, held out")
        perplexity.plot(*series("eval_perplexity"), "o--", color=BLUE, label="with the memory, held out")
    perplexity.set(title="Perplexity while training", ylabel="token perplexity")
    perplexity.legend()
    names = [name for name in history[0] if name.startswith("loss_") and name != "loss_total"]
    for name, colour in zip(names, SERIES, strict=False):
        losses.plot(*series(name), color=colour, label=name.removeprefix("loss_").replace("_", " "))
    losses.set(title="Parts of the loss, unweighted", ylabel="nats")
    losses.legend(ncols=2)
    for name, colour, label in (
        ("salience_mean", ORANGE, "mean salience"),
        ("tagged_share", PURPLE, "tagged share"),
        ("recall_use", BLUE, "share of prediction left to recall"),
        ("consolidation_r", GREEN, "consolidation R"),
    ):
        if series(name)[0]:
            shares.plot(*series(name), color=colour, label=label)
    shares.set(title="Gate and recall", xlabel="optimizer step", ylabel="share")
    shares.legend()
    rate.plot(*series("learning_rate"), color=MUTED, label="learning rate")
    rate.set(title="Learning rate and gradient", xlabel="optimizer step", ylabel="learning rate")
    norm = rate.twinx()
    norm.plot(*series("grad_norm"), color=ORANGE, linewidth=1.2, label="gradient norm")
    norm.set_ylabel("gradient norm before clipping")
    norm.grid(visible=False)
    norm.spines["right"].set_visible(True)
    rate.legend(handles=[*rate.get_lines(), *norm.get_lines()], loc=(0.05, 0.25))
    return figure
