"""Every figure by name: which results it needs, and the function that draws it.

`draw` makes one figure or says which result it lacks; `draw_all` makes all that can be made and lists the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from hippoformer.errors import ResultError
from hippoformer.figures import architecture, brain, document, memory, perplexity, recall, summary, training, variants
from hippoformer.figures.results import TRAINING, Result
from hippoformer.figures.style import FORMATS, save_figure, styled


@dataclass(frozen=True)
class Drawing:
    """One kind of figure.

    Attributes:
        title, caption: what it shows.
        needs: the result it is drawn from, in words, with the command that makes it.
        usable: whether a result is one that it can be drawn from.
        draw: the figure of at least one usable result.
        also: whether a result, useless by itself, adds something.
    """

    title: str
    caption: str
    needs: str
    usable: Callable[[Result], bool]
    draw: Callable[[Sequence[Result]], Figure]
    also: Callable[[Result], bool] = lambda result: False

    def sources(self, results: Sequence[Result]) -> list[Result]:
        """The results it would be drawn from; empty where the needed one is missing."""
        if not any(self.usable(result) for result in results):
            return []
        return [result for result in results if self.usable(result) or self.also(result)]


def _laid_out_as(*formats: str) -> Callable[[Result], bool]:
    return lambda result: result.format in formats


_TRACED = ("hippoformer.trace/1",)
_STREAMED = ("hippoformer.trace/1", "hippoformer.dynamics/1")
_PERPLEXITY = "hippoformer.perplexity/1"

FIGURES: dict[str, Drawing] = {
    "summary": Drawing(
        "Results at a glance",
        "What the memory does to perplexity, to facts told once, to speed and to size. Dots with 95 % intervals.",
        "a report of `hippoformer eval perplexity --output`",
        lambda result: (
            result.format == _PERPLEXITY
            and any(c["against_off"] is not None for c in result.content["conditions"].values())
        ),
        summary.draw,
        _laid_out_as("hippoformer.recall/1", "hippoformer.speed/1"),
    ),
    "architecture": Drawing(
        "Architecture",
        "The boxes of the model with the numbers of the configuration that most results were measured with.",
        "any report of `hippoformer eval … --output`",
        lambda result: result.config is not None and "memory_layer" in result.config,
        architecture.draw,
    ),
    "salience": Drawing(
        "Salience over real text",
        "The end of the traced text: the ground is salience, a line says that recall made the token likelier (blue) or "
        "less likely (red) by half a nat or more. Below, the whole text and the share of its tokens that are tagged.",
        "a trace (`hippoformer eval trace --output`)",
        _laid_out_as(*_TRACED),
        document.draw,
    ),
    "memory_dynamics": Drawing(
        "Memory along a stream",
        "The store at every segment end: how full it is, how strongly its episodes are held, how long ago they were "
        "replayed, and what each segment end did.",
        "a trace or dynamics (`hippoformer eval trace --output`, `hippoformer eval dynamics --output`)",
        lambda result: result.format in _STREAMED and bool(result.content["segments"]),
        memory.draw_dynamics,
    ),
    "replay": Drawing(
        "Replay at work",
        "Replay keeps memories young and raises those that have earned credit. Where variants with other rounds of "
        "replay were measured: their perplexity against the reference, with 95 % intervals.",
        "a trace or dynamics (`hippoformer eval trace --output`, `hippoformer eval dynamics --output`)",
        lambda result: result.format in _STREAMED and bool(result.content["segments"]),
        memory.draw_replay,
        _laid_out_as("hippoformer.variants/1"),
    ),
    "training": Drawing(
        "Training",
        "Perplexity of the text being read, parts of the loss, gate and recall, learning rate, over optimizer steps.",
        "a training log (`training_log.json` of `hippoformer train`, copied into the folder)",
        lambda result: result.format == TRAINING and bool(result.content["history"]),
        training.draw,
    ),
    "perplexity_by_position": Drawing(
        "Perplexity by position and distance",
        "Perplexity along the documents, and what memory gains over memory off: by position, and by how long ago the "
        "last two tokens came together before; shaded where the base no longer sees that. 95 % intervals over "
        "documents.",
        "a report of `hippoformer eval long-range --output`",
        _laid_out_as("hippoformer.long_range/1"),
        perplexity.draw_by_position,
    ),
    "perplexity_over_bytes": Drawing(
        "Perplexity over bytes of state",
        "Every way to read a text over the bytes it carries along: window keys and values, and memory. 95 % intervals.",
        "a report of `hippoformer eval perplexity`, `eval bytes` or `eval baselines`, with --output",
        _laid_out_as(_PERPLEXITY, "hippoformer.comparison/1"),
        perplexity.draw_over_bytes,
    ),
    "recall": Drawing(
        "Facts by distance and depth",
        "Facts told once and asked for later; hollow and dashed: memory off. Left with Wilson 95 % intervals; right, "
        "means of equally many questions in order of depth with ±1.96 standard errors.",
        "a report of `hippoformer eval recall --output`",
        lambda result: result.format == "hippoformer.recall/1" and bool(result.content["cells"]),
        recall.draw,
    ),
    "ablations": Drawing(
        "Ablations",
        "One trained hippocampus under different options. Left against the base alone, right against the first "
        "variant with p corrected for their number; dots with 95 % intervals over documents.",
        "a report of `hippoformer eval variants` or `eval ablations`, with --output",
        _laid_out_as("hippoformer.variants/1"),
        variants.draw,
    ),
    "brain": Drawing(
        "Brain-like behaviour",
        "Each measure for the trained gate beside its controls, the original's figure and what chance would give.",
        "a report of `hippoformer eval brain --output`",
        lambda result: result.format == "hippoformer.brain/1" and bool(result.content["measures"]),
        brain.draw,
    ),
}


def draw(name: str, results: Sequence[Result]) -> Figure:
    """One figure.

    Raises:
        ResultError: no figure of that name, or none of the results it needs.
    """
    if name not in FIGURES:
        raise ResultError(f"there is no figure {name!r}; choose among {', '.join(FIGURES)}.")
    drawing = FIGURES[name]
    sources = drawing.sources(results)
    if not sources:
        raise ResultError(f"the figure {name} cannot be drawn: it needs {drawing.needs}.")
    with styled():
        return drawing.draw(sources)


def draw_all(
    results: Sequence[Result], folder: Path, formats: Sequence[str] = FORMATS, names: Sequence[str] = ()
) -> tuple[list[Path], dict[str, str]]:
    """Writes figures into a folder.

    Args:
        results: of `read_results`. folder: made where it is missing.
        formats: of png, pdf, svg. names: which figures; all that can be drawn where none is named.

    Returns:
        The files, and why the figures that were not asked for by name were not drawn: name -> what they need.

    Raises:
        ResultError: an unknown format, a named figure that is unknown or lacks its results, a folder that cannot be
            made.
    """
    unknown = [form for form in formats if form not in FORMATS]
    if unknown or not formats:
        raise ResultError(f"format {', '.join(unknown) or 'missing'}: choose among {', '.join(FORMATS)}.")
    missing = {n: d.needs for n, d in FIGURES.items() if not names and not d.sources(results)}
    figures = {name: draw(name, results) for name in names or FIGURES if name not in missing}
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for form in formats:
                written.append(folder / f"{name}.{form}")
                save_figure(figure, written[-1])
    except OSError as error:
        raise ResultError(f"{folder} cannot be written ({error.strerror or error}): choose another folder.") from error
    return written, missing
