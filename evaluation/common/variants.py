"""One hippocampus under other options, and other hippocampi: what comparisons run over."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError
from hippoformer.model.loading import load_beside
from hippoformer.model.modeling import HippoFormer

# Options that the hippocampus was trained with, though the shapes of its weights do not show it.
_TRAINED_WITH = ("base_model_name", "memory_layer", "residual_readout")


def with_options(model: HippoFormer, **options: Any) -> HippoFormer:
    """The model with another window, buffer, selection rule, or other options that shape no weights; same base.

    Raises:
        ConfigurationError: an unknown option, one that the weights depend on, or a value out of range.
    """
    known = model.config.to_dict()
    wrong = [name for name in options if name not in known or (name in _TRAINED_WITH and options[name] != known[name])]
    if wrong:
        raise ConfigurationError(f"{', '.join(wrong)} cannot differ from the model's own; expected options of memory")
    # Adapters, where there are some, are in the base already.
    as_it_is = {"freeze_base": False} | ({"lora": None} if "lora" in known else {"use_lora": False})
    other = HippoFormer(HippoFormerConfig(**(known | options | as_it_is)), model.base)
    try:
        other.hippocampus.load_state_dict(model.hippocampus.state_dict())
    except RuntimeError as error:
        raise ConfigurationError(f"{options}: the weights of the hippocampus depend on these options") from error
    other.spelling = model.spelling
    return other.eval()


@dataclass
class VariantOptions:
    """What is compared; the first is the reference."""

    variant: list[str] = field(
        default_factory=list, metadata={"help": "NAME or NAME:option=value,option=value; without any, the ablations"}
    )
    trained: list[str] = field(
        default_factory=list, metadata={"help": "NAME=FOLDER of another hippocampus on the same base"}
    )


def models(model: HippoFormer, options: VariantOptions) -> Iterator[tuple[str, HippoFormer]]:
    """Name and model of each variant, one after the other.

    Raises:
        ConfigurationError: a name twice, an option without a value, or what `with_options` raises.
    """
    parsed = {name: parse(rest) for name, _, rest in (part.partition(":") for part in options.variant)}
    folders = {name: folder for name, _, folder in (part.partition("=") for part in options.trained)}
    if len(parsed | folders) < len(options.variant) + len(options.trained) or "" in folders.values():
        raise ConfigurationError(
            f"variants {options.variant + options.trained}: expected names that differ, and folders"
        )
    for name, changed in (parsed if parsed else ablations(model.config)).items():
        yield name, with_options(model, **changed)
    for name, folder in folders.items():
        yield name, load_beside(model, folder)


def parse(options: str) -> dict[str, Any]:
    """`option=value,option=value` as options; a value that is not JSON is a string.

    Raises:
        ConfigurationError: an option without a value.
    """
    found: dict[str, Any] = {}
    for part in filter(None, options.split(",")):
        name, separator, value = part.partition("=")
        if not separator:
            raise ConfigurationError(f"{part!r}: expected option=value")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


# What each mechanism is worth without training again; the first is the model as it is.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "selection: first in, first out": {"selection": "fifo"},
    "selection: random": {"selection": "random"},
    "selection: surprise": {"selection": "surprise"},
    "no gate: all alike": {"importance_weight_range": [5.0, 5.0]},
    "no following": {"following": False},
    "no memory: window only": {"buffer_size": 0},
    "buffer 512": {"buffer_size": 512},
    "buffer 1024": {"buffer_size": 1024},
    "buffer 4096": {"buffer_size": 4096},
    "decay 0.8": {"decay_rate": 0.8},
    "decay 0.95": {"decay_rate": 0.95},
    "decay 0.99": {"decay_rate": 0.99},
    "no forgetting": {"decay_rate": 1.0},
    "importance 1 to 3": {"importance_weight_range": [1.0, 3.0]},
    "importance 1 to 10": {"importance_weight_range": [1.0, 10.0]},
    "no replay": {"max_replay_rounds": 0},
    "replay": {"max_replay_rounds": 10},
}


def ablations(config: HippoFormerConfig) -> dict[str, dict[str, Any]]:
    """Name -> options of every ablation that changes a model of this configuration."""
    own = json.loads(json.dumps({name: getattr(config, name) for of in _ABLATIONS.values() for name in of}))
    return {name: of for name, of in _ABLATIONS.items() if not of or any(own[option] != of[option] for option in of)}
