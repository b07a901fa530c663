"""The figures, each a function of all results: evaluation -> name of a file -> its content.

Where an evaluation has several files, the last by name is drawn, unless a figure says otherwise. Colours are those of
Okabe and Ito (2008), which colour-blind readers can tell apart: blue is the memory, grey the base alone.
"""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from hippoformer.configuration import HippoFormerConfig
from hippoformer.model.loading import shipped_hippocampus

Results = dict[str, dict[str, Any]]

INK, MUTED, BLUE, ORANGE, GREEN = "#1f2430", "#6a7283", "#0072b2", "#e69f00", "#009e73"
RED, PURPLE, GREY = "#d55e00", "#cc79a7", "#8d95a5"
# fmt: off
STYLE: dict[str, Any] = {
    "font.size": 10, "text.color": INK, "text.parse_math": False, "legend.frameon": False, "legend.fontsize": 9,
    "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.edgecolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#d9dde4", "savefig.dpi": 150, "pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "same",
}
# fmt: on
_SHOWN = 6  # rows of a panel
_COLUMNS = 110  # characters of a line in the figure of salience
_CONDITIONS = {"memory": BLUE, "off": GREY, "window-only": GREEN, "unigram": ORANGE}
_RULES = {"trained gate": BLUE, "untrained gate": GREY, "surprise": ORANGE, "shuffled": GREEN}


def summary(results: Results) -> Figure:
    """Perplexity of all files; of the last file of planted facts the six hardest; speed."""
    perplexity = [
        (f"{name.removesuffix('_test').replace('_', ' ')}, {row['condition']}", row)
        for name, content in results.get("perplexity", {}).items()
        for row in content["rows"]
        if row["metric"] == "against off, %" and row["condition"] in ("memory", "unigram")
    ]
    asked = _last(results["recall"])["rows"] if "recall" in results else []
    facts = [row for row in asked if row["condition"] == "memory" and row["metric"].endswith("right, %")]
    speed = _last(results["speed"])["rows"] if "speed" in results else []
    ratios = [row | {"value": 100 * row["value"]} for row in speed if row["condition"] == "memory / off"]
    panels = [
        ("Perplexity", "change against the base alone (%)", perplexity),
        ("Planted facts", "exact answers (%)", [(of["metric"].partition(":")[0], of) for of in facts]),
        ("Speed", "of the base alone (%)", [(of["metric"], of) for of in ratios]),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, (title, label, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = sorted(rows, key=lambda row: row[1]["value"])[:_SHOWN]
        _forest(axes, [name.partition(":")[0] for name, _ in rows], [row for _, row in rows], [BLUE] * len(rows))
        axes.set(title=title, xlabel=label)
        axes.set_xlim(*((None, 0) if title == "Perplexity" else (0, 105)))
    return figure


def architecture(results: Results) -> Figure:
    """The parts of the model with the numbers of the shipped configuration."""
    folder = shipped_hippocampus("smollm2-135m")
    config = HippoFormerConfig.from_pretrained(str(folder))
    low, high = config.importance_weight_range
    numbers = {
        "Base model": (2, 2, GREY, f"window {config.window} tokens + {config.sink_tokens} sinks\nfrozen"),
        "Salience gate": (2, 32, ORANGE, f"weight 1 below salience 0.5,\n{low:g} to {high:g} above"),
        "Episodes": (
            37,
            32,
            BLUE,
            f"{config.buffer_size:,} a row, kept by {config.selection}\nsegments of {config.segment_len}",
        ),
        "Recall": (
            37,
            17,
            BLUE,
            f"{config.recall_n_heads} heads of {config.recall_head_dim},\nfollows what matched before",
        ),
        "Passages": (72, 32, PURPLE, f"{config.passage_tokens:,} tokens of text,\nread again before a question"),
        "Unigram adaptation": (37, 2, GREEN, "counts against the\nbase's expectation"),
        "Fusion": (72, 2, RED, "next token:\n(1 - λ) base + λ recall"),
    }
    arrows = [
        ((9, 11), (9, 32), "hidden states"),
        ((28, 37), (37, 37), ""),
        ((50, 32), (50, 26), "keys, tokens"),
        ((28, 9), (37, 19), "queries"),
        ((63, 19), (74, 11), "votes"),
        ((28, 5), (37, 5), ""),
        ((63, 5), (72, 5), ""),
    ]
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 100), ylim=(0, 43))
    axes.set_axis_off()
    for name, (x, y, colour, lines) in numbers.items():
        axes.add_patch(FancyBboxPatch((x, y), 26, 9, "round,pad=0,rounding_size=1.2", fc="white", ec=colour, lw=2))
        axes.text(x + 1.5, y + 8, name, va="top", fontweight="bold")
        axes.text(x + 1.5, y + 5.2, lines, va="top", fontsize=9)
    for start, end, label in arrows:
        axes.annotate(
            "", end, start, arrowprops={"arrowstyle": "-|>", "color": MUTED, "lw": 1.5, "shrinkA": 2, "shrinkB": 2}
        )
        axes.text((start[0] + end[0]) / 2 + 1, (start[1] + end[1]) / 2, label, va="center", fontsize=9, color=MUTED)
    return figure


def salience(results: Results) -> Figure:
    """The end of a traced text, the ground by salience, a line where recall changed log p by half a nat or more (blue:
    likelier); below, the tagged share along the whole text.
    """
    tokens = _last(results["trace"])["details"]["tokens"]
    texts = [text.replace("\n", " ") for text in tokens["text"]]
    first = max(0, len(texts) - 260)
    rows = -(-sum(map(len, texts[first:])) // _COLUMNS)
    ground = np.zeros(rows * _COLUMNS)
    figure = Figure(figsize=(11, 0.28 * rows + 2.4), layout="constrained")
    words, share = figure.subplots(2, 1, height_ratios=[0.28 * rows, 1.6])
    at = 0
    for number, text in enumerate(texts[first:], start=first):
        ground[at : at + len(text)] = tokens["salience"][number]
        gain = tokens["log_p"][number] - tokens["log_p_off"][number]
        while text:  # a token at the end of a line goes on in the next
            row, column = divmod(at, _COLUMNS)
            part, text = text[: _COLUMNS - column], text[_COLUMNS - column :]
            words.text(
                column + len(part) / 2, row + 0.5, part, ha="center", va="center", fontsize=9, family="monospace"
            )
            if abs(gain) >= 0.5:
                words.hlines(row + 0.93, column, column + len(part), color=BLUE if gain > 0 else RED, linewidth=2)
            at += len(part)
    grid = ground.reshape(rows, _COLUMNS)
    words.imshow(grid, cmap="YlOrBr", vmin=0, vmax=1.6, aspect="auto", extent=(0, _COLUMNS, rows, 0))
    words.set_axis_off()
    words.set_title("Salience of each token (dark: high); lines: recall made it likelier (blue) or less likely (red)")
    width = max(1, len(texts) // 60)
    tagged = np.convolve(np.array(tokens["salience"]) > 0.5, np.ones(width) / width, mode="valid")
    share.plot(np.arange(len(tagged)) + width / 2, 100 * tagged, color=ORANGE)
    share.set(xlabel="position in the text (tokens)", ylabel=f"tagged (%),\nmean of {width}", ylim=(0, 100))
    return figure


def memory_dynamics(results: Results) -> Figure:
    """Utilisation, priority, age and work at each segment end of a stream."""
    segments = _last(results["dynamics"])["details"]["segments"]
    panels = [
        ("Utilisation", "share of the store", ["utilisation"]),
        ("Priority", "mean", ["mean_priority", "mean_effective_priority"]),
        ("Age", "segments, mean", ["mean_age"]),
        ("Work", "episodes a segment", ["written", "reactivated", "merged", "forgotten"]),
    ]
    return _curves(panels, segments, "tokens", "tokens read")


def training(results: Results) -> Figure:
    """Perplexity, parts of the loss, gate and recall, and learning rate over optimizer steps."""
    history = _last(results["training"])["history"]
    losses = [name for name in history[0] if name.startswith("loss_") and name != "loss_total"]
    panels = [
        ("Perplexity", "of the text being read", ["perplexity", "base_perplexity"]),
        ("Parts of the loss", "nats, unweighted", losses),
        ("Gate and recall", "share", ["salience_mean", "tagged_share", "recall_use", "consolidation_r"]),
        ("Learning rate", "", ["learning_rate"]),
    ]
    return _curves(panels, history, "step", "optimizer step")


def ablations(results: Results) -> Figure:
    """What a change costs against the reference: of up to two files, the six variants that change most."""
    files = list(results["variants"].items())[-2:]
    figure = Figure(figsize=(5.4 * len(files), 3.2), layout="constrained")
    for axes, (name, content) in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        reference = content["rows"][0]["condition"]
        rows = [row for row in content["rows"] if row["metric"] == f"against {reference}, %"]
        rows = sorted(sorted(rows, key=lambda row: -abs(row["value"]))[:_SHOWN], key=lambda row: -row["value"])
        _forest(axes, [row["condition"] for row in rows], rows, [RED if row["value"] > 0 else BLUE for row in rows])
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(title=name.replace("_", " "), xlabel=f"perplexity against {reference} (%)")
    return figure


def perplexity_by_position(results: Results) -> Figure:
    """Perplexity along documents, and the gain over memory off, with intervals."""
    rows = [row for row in _last(results["position"])["rows"] if row["metric"].startswith("position ")]
    bins = list(dict.fromkeys(row["metric"].partition(":")[0] for row in rows))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    level, gains = figure.subplots(1, 2)
    for axes, unit in ((level, "perplexity"), (gains, "gain, nats/token")):
        for condition in dict.fromkeys(row["condition"] for row in rows):
            of = [row for row in rows if row["condition"] == condition and row["metric"].endswith(f": {unit}")]
            at, values = [bins.index(row["metric"].partition(":")[0]) for row in of], [row["value"] for row in of]
            if of:
                colour = _CONDITIONS.get(condition, PURPLE)
                axes.errorbar(at, values, yerr=_ends(of), fmt="o-", color=colour, capsize=3, label=condition)
    gains.axhline(0, color=MUTED, linewidth=1)
    for axes, title, label in ((level, "Perplexity", "a token"), (gains, "Gain over memory off", "nats a token")):
        axes.set_xticks(
            range(len(bins)), [name.removeprefix("position ") for name in bins], rotation=40, ha="right", fontsize=8
        )
        axes.set(title=title, ylabel=label, xlabel="position in the document (tokens)")
        axes.legend()
    return figure


def consolidation(results: Results) -> Figure:
    """Salience against credit: correlations, and the credit held by the best tenth, beside the controls."""
    rows = _last(results["salience"])["rows"]
    return _panels(rows, list(dict.fromkeys(row["metric"] for row in rows)), 3)


def brain(results: Results) -> Figure:
    """The signs of a hippocampus with their controls, chance (dotted) and the original's figure (dashed)."""
    rows = _last(results["brain"])["rows"]
    signs = dict.fromkeys(row["metric"] for row in rows if row["condition"] in ("chance", "original"))
    return _panels(rows, [sign for sign in signs if "before smoothing" not in sign], 3)


FIGURES = {
    "summary": (summary, ("perplexity", "recall", "speed")),
    "architecture": (architecture, ()),
    "salience": (salience, ("trace",)),
    "memory_dynamics": (memory_dynamics, ("dynamics",)),
    "training": (training, ("training",)),
    "ablations": (ablations, ("variants",)),
    "perplexity_by_position": (perplexity_by_position, ("position",)),
    "consolidation": (consolidation, ("salience",)),
    "brain": (brain, ("brain",)),
}


def _last(files: dict[str, Any]) -> Any:
    return files[max(files)]


def _curves(
    panels: Sequence[tuple[str, str, list[str]]], entries: Sequence[dict[str, float]], x: str, label: str
) -> Figure:
    """Four panels over `x`, each with the series that are not 0 everywhere."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axes, (title, unit, names) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for name, colour in zip(names, (BLUE, GREY, ORANGE, GREEN, PURPLE, RED), strict=False):
            known = [(entry[x], entry[name]) for entry in entries if name in entry]
            if any(value for _, value in known):
                axes.plot(*zip(*known, strict=True), color=colour, label=name.removeprefix("loss_").replace("_", " "))
        axes.set(title=title, ylabel=unit, ylim=(0, None))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.supxlabel(label, fontsize=10)
    return figure


def _panels(rows: Sequence[dict[str, Any]], metrics: Sequence[str], columns: int) -> Figure:
    """A panel a metric: a dot and interval a condition; rows of `chance` and `original` are lines."""
    height = -(-len(metrics) // columns)
    figure = Figure(figsize=(3.6 * min(columns, len(metrics)), 2.4 * height), layout="constrained")
    grid = figure.subplots(height, min(columns, len(metrics)), squeeze=False).flat
    for axes, metric in zip(grid, metrics, strict=False):
        of = {row["condition"]: row for row in rows if row["metric"] == metric and row["value"] is not None}
        for name, style in (("chance", ":"), ("original", "--")):
            if name in of:
                axes.axvline(of.pop(name)["value"], color=RED if name == "original" else MUTED, linestyle=style)
        _forest(axes, list(of), list(of.values()), [_RULES.get(name, PURPLE) for name in of])
        axes.set_title(textwrap.fill(metric, 30), fontsize=10)
        axes.margins(x=0.15)
    for axes in figure.axes[len(metrics) :]:
        axes.remove()
    figure.supxlabel("dotted: chance; dashed: figure of the original research code", fontsize=9, color=MUTED)
    return figure


def _forest(axes: Axes, labels: Sequence[str], rows: Sequence[dict[str, Any]], colours: Sequence[str]) -> None:
    """A dot and its interval a line, from top to bottom, six lines at most."""
    labels, rows = [textwrap.fill(label, 26) for label in labels[:_SHOWN]], rows[:_SHOWN]
    for place, (row, colour) in enumerate(zip(rows, colours, strict=False)):
        axes.errorbar([row["value"]], [place], xerr=_ends([row]), fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def _ends(rows: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Distances from the values to the ends of their intervals, below and above; 0 without an interval."""
    return [[0.0 if row[end] is None else abs(row["value"] - row[end]) for row in rows] for end in ("low", "high")]
