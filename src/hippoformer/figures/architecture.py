"""The picture of the model, with the numbers of the configuration that was measured."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from hippoformer.configuration import HippoFormerConfig
from hippoformer.figures.results import Result
from hippoformer.figures.style import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PAPER, PURPLE, VERMILLION, canvas

Point = tuple[float, float]


def draw(results: Sequence[Result]) -> Figure:
    """Boxes and arrows; the configuration is that of most results that have one, the newest of those as frequent."""
    configured = [(result.provenance.get("date", ""), _texts(result.config)) for result in results if result.config]
    times = Counter(str(texts) for _, texts in configured)
    _, shown = max(configured, key=lambda found: (times[str(found[1])], found[0]))
    figure = canvas(10.5, 5.3)
    axes = figure.subplots()
    axes.set(xlim=(0, 105), ylim=(0, 53))
    axes.set_axis_off()
    for name, (x, y, width, height, colour) in _PLACES.items():
        _box(axes, (x, y), width, height, colour, *shown[name])
    for start, end, label, at in _ARROWS:
        _arrow(axes, start, end)
        axes.text(*at, label, ha="left", va="center" if start[0] == end[0] else "bottom", fontsize=8.5, color=MUTED)
    return figure


def _texts(config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Heading and lines of each box."""
    layers = config["memory_layer"] if isinstance(config["memory_layer"], list) else [config["memory_layer"]]
    if layers == [-1]:
        read = "the last layer"
    else:
        read = f"layer{'s' if len(layers) > 1 else ''} {' and '.join(map(str, layers))}"
    low, high = config["importance_weight_range"]
    depth = config.get("num_hidden_layers")
    decay = HippoFormerConfig(buffer_size=config["buffer_size"], decay_rate=config["decay_rate"]).decay
    return {
        "base": (
            f"Base model: {config['base_model_name']}",
            f"{'frozen' if config['freeze_base'] and not config['use_lora'] else 'trained along'}"
            + (f", {depth} layers" if depth else "")
            + f"\nwindow {config['window']:,} tokens + {config['sink_tokens']} sinks\n"
            f"segments of {config['segment_len']} tokens",
        ),
        "gate": (
            "Salience gate",
            f"two pathways, {config['salience_n_heads']} heads\nbelow 0.5: weight {config['untagged_weight']:g}\n"
            f"above: {low:g} to {high:g}",
        ),
        "memory": (
            "Episodic memory",
            f"{config['buffer_size']:,} episodes a row\nselection by {config['selection']}\n"
            f"keys {config['recall_n_heads']} × {config['recall_head_dim']}",
        ),
        "replay": (
            "Replay",
            f"{config['max_replay_rounds']} rounds × {config['replay_batch']} a segment\n"
            f"decay {decay:g} a segment\nmerge above {config['merge_threshold']:g}",
        ),
        "drift": (
            "Drift calibrator",
            f"{config['n_anchors']} anchors × {config['anchor_len']} tokens\nmaps above {config['drift_threshold']:g}",
        ),
        "recall": ("Recall", f"{config['recall_n_heads']} heads and nothing\nqueries from {read}\nfollows the text"),
        "marginals": (
            "Marginals",
            f"of every token:\ncame / expected\nfollowed {config['marginal_weight']:.0%}"
            if config.get("marginal_weight")
            else "not kept",
        ),
        "fusion": (
            "Fusion",
            " + ".join(
                name
                for name, on in (
                    ("votes for tokens", config["distribution_readout"]),
                    ("residual", config["residual_readout"]),
                )
                if on
            )
            + "\n(1 − λ) base + λ recall",
        ),
    }


_PLACES: dict[str, tuple[float, float, float, float, str]] = {
    "base": (1, 1, 30, 12, GREY),
    "gate": (1, 40, 27, 12, ORANGE),
    "memory": (40, 40, 27, 12, BLUE),
    "replay": (78, 40, 26, 12, GREEN),
    "drift": (78, 21, 26, 10, PURPLE),
    "recall": (40, 20, 27, 12, BLUE),
    "marginals": (41, 1, 17, 12, PURPLE),
    "fusion": (66, 1.5, 27, 10, VERMILLION),
}
# From, to, label, where its left end stands.
_ARROWS: tuple[tuple[Point, Point, str, Point], ...] = (
    ((10, 13), (10, 40), "hidden states", (11, 27)),
    ((28, 46), (40, 46), "how salient", (29.5, 47)),
    ((67, 48), (78, 48), "segment", (68.6, 49)),
    ((78, 44), (67, 44), "end", (70.6, 45)),
    ((78, 29), (67, 40.5), "new code", (74, 35)),
    ((53.5, 40), (53.5, 32), "episodes", (54.5, 36)),
    ((26, 13), (40, 24), "queries", (26, 20)),
    ((59, 20), (72, 11.5), "what came next then", (67.5, 15.5)),
    ((31, 6.5), (41, 6.5), "foretold", (32, 7.5)),
    ((58, 6.5), (66, 6.5), "moved", (58.6, 7.5)),
    ((93, 6.5), (104.5, 6.5), "next token", (93.8, 7.5)),
)


def _box(axes: Axes, at: Point, width: float, height: float, colour: str, heading: str, lines: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            at, width, height, boxstyle="round,pad=0,rounding_size=1.2", facecolor=PAPER, edgecolor=colour, linewidth=2
        )
    )
    axes.text(at[0] + 1.6, at[1] + height - 1.6, heading, va="top", fontweight="bold", fontsize=11, color=INK)
    axes.text(at[0] + 1.6, at[1] + height - 4.6, lines, va="top", fontsize=9, color=INK, linespacing=1.3)


def _arrow(axes: Axes, start: Point, end: Point) -> None:
    look: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 13, "color": MUTED, "linewidth": 1.5}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=2, shrinkB=2, **look))
