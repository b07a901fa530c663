"""The headline of an evaluation, made from the result files of its parts alone."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from hippoformer.evaluation.report import with_range

_R_TARGET = 0.86
_TRAINED, _UNTRAINED = "trained gate", "untrained gate"


def headline(parts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The figures to begin with, from whichever parts there are.

    Args:
        parts: name -> content of the part's file.

    Returns:
        Rows of name, value, low, high (None without an interval), unit, target (the original's, or None), control (a
        figure to hold it against, or None), control_name, part.
    """
    makers = {
        "perplexity": _perplexity,
        "long_range": _long_range,
        "salience": _salience,
        "ablations": _ablations,
        "brain": _brain,
        "quality": _quality,
        "recall": _recall,
    }
    return [row | {"part": name} for name, make in makers.items() if name in parts for row in make(parts[name])]


def summary_table(rows: list[dict[str, Any]], model: Mapping[str, Any]) -> Table:
    """The headline as a table for a terminal."""
    caption = (
        f"window {model['window']} + {model['sink_tokens']} sinks, buffer {model['buffer_size']}; "
        "[95 % bootstrap intervals over documents]"
    )
    table = Table(title=Text(f"Evaluation of {model['base_model_name']}"), caption=Text(caption))
    table.add_column("figure")
    for heading in ("value", "original", "control"):
        table.add_column(heading, justify="right")
    for row in rows:
        control = "-" if row["control"] is None else f"{row['control']:.4g} ({row['control_name']})"
        cells = (
            f"{row['name']} ({row['unit']})",
            with_range("{:.4g}", row["value"], row["low"], row["high"]),
            "-" if row["target"] is None else f"{row['target']:g}",
            control,
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _row(
    name: str,
    unit: str,
    value: float | Mapping[str, Any],
    control: float | None = None,
    control_name: str | None = None,
    target: float | None = None,
) -> dict[str, Any]:
    interval = {"estimate": value, "low": None, "high": None} if isinstance(value, (int, float)) else value
    return {
        "name": name,
        "value": interval["estimate"],
        "low": interval["low"],
        "high": interval["high"],
        "unit": unit,
        "target": target,
        "control": control,
        "control_name": control_name,
    }


def _perplexity(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    conditions = part["conditions"]
    rows = []
    off = conditions.get("off")
    for condition, found in conditions.items():
        if condition == "off":
            continue
        rows.append(
            _row(
                f"perplexity, {condition}",
                "a token",
                found["token_perplexity"],
                None if off is None else off["token_perplexity"]["estimate"],
                None if off is None else "memory off",
            )
        )
        if condition == "memory":
            rows.append(
                _row(
                    "bits, memory",
                    "a byte",
                    found["bits_per_byte"],
                    None if off is None else off["bits_per_byte"],
                    None if off is None else "memory off",
                )
            )
    return rows


def _long_range(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    if part["early_late"]:
        memory, off = (part["early_late"][condition]["early_minus_late"] for condition in ("memory", "off"))
        rows.append(_row("first minus last quarter", "perplexity", memory, off, "memory off", 6.95))
        gain = part["early_late_gain"]["memory"]
        rows.append(_row("gain, last minus first quarter", "nats a token", gain["late_minus_early"]))
    for n, cells in part["by_distance"].items():
        beyond = [cell for cell in cells if cell["low"] is not None and cell["low"] > part["window"]]
        if n == "1" or not beyond:
            continue
        (new,) = (cell for cell in cells if cell["low"] is None)
        rows.append(
            _row(
                f"gain where a {n}-gram last came {beyond[0]['label']} tokens ago",
                "nats a token",
                beyond[0]["gain"]["memory"],
                new["gain"]["memory"]["estimate"],
                "where it is new",
            )
        )
    return rows


def _salience(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    rules = {rule["rule"]: rule for rule in part["rules"]}
    trained, untrained = rules["salience"], rules["untrained gate"]
    ceiling = part.get("ceiling")
    at_most = [_row("the most that a forecast could reach", "Pearson", ceiling)] if ceiling else []
    return [
        _row(
            "consolidation R (salience and credit)",
            "Pearson",
            trained["pearson"],
            untrained["pearson"]["estimate"],
            _UNTRAINED,
            _R_TARGET,
        ),
        *at_most,
        _row(
            "salience and credit, by rank",
            "Spearman",
            trained["spearman"],
            rules["surprise"]["spearman"]["estimate"],
            "surprise",
        ),
    ]


def _ablations(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    chosen = ("selection: random", "no replay", "replay", "no memory: window only")
    return [
        _row(f"perplexity ratio, {v['name']}", f"to {part['reference']}", v["against"]["ratio"], 1.0, "no difference")
        for v in part["variants"]
        if v["name"] in chosen and v["against"] is not None
    ]


def _brain(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for measure in part["measures"]:
        trained, untrained = measure["values"][_TRAINED], measure["values"].get(_UNTRAINED)
        if trained is None:
            continue
        control = None if untrained is None else untrained["estimate"]
        rows.append(_row(measure["label"], measure["unit"], trained, control, _UNTRAINED, measure["target"]))
    return rows


def _quality(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    memory, off = part["conditions"]["memory"], part["conditions"]["off"]
    return [
        _row(f"continuations, {metric}", unit, memory[metric], off[metric]["estimate"], "memory off")
        for metric, unit in (("bleu", "of 100"), ("rouge_l", "share"), ("f1", "share"))
    ]


def _recall(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        _row(
            f"{cell['kind']} after {cell['distance']:,} tokens",
            "share right",
            {"estimate": cell["right"], "low": cell["low"], "high": cell["high"]},
            cell["right_off"],
            "memory off",
        )
        for cell in part["cells"]
    ]
