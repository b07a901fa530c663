"""Arguments of a training run, from a command line or from Python: the original's names, and what is added here."""

# ruff: noqa: RUF009, `_option` makes fields

import argparse
import inspect
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser

from hippoformer.configuration import HippoFormerConfig
from hippoformer.errors import ConfigurationError

_DEFAULT_STEPS = 800
_OPTIONS = inspect.signature(HippoFormerConfig).parameters.keys() - {"kwargs"}


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: [*default], metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainArguments:
    """What to train on, what to train, and how; options of the model's config go into `set`.

    The defaults are the recipe of the shipped hippocampus, in one run.
    """

    base_model: str = _option("smollm2-135m", "folder, hub repository, or smollm2-135m")
    hippocampus: str | None = _option(None, "a saved hippocampus to continue from, or smollm2-135m: the shipped one")
    text: list[str] = _option([], "files or folders of text to train on")
    eval_text: list[str] = _option([], "held-out files or folders")
    questions: list[str] = _option([], ".jsonl files of texts with a question; the answers are learned")
    dataset: str | None = _option(None, "a Hugging Face dataset instead of --text")
    dataset_config: str | None = _option(None, "its configuration")
    streaming: bool = _option(False, "read the dataset during training; with --max_samples, download only N documents")
    max_samples: int | None = _option(None, "documents to use")
    max_document_tokens: int = _option(12288, "tokens read of each document")
    obey_control_tokens: bool = _option(False, "read control tokens written in the texts as such, not as text")
    planted_documents: int | None = _option(None, "read a further part of the N longest with made-up facts; default 30")
    planted_facts: int = _option(32, "facts in each of those, each stated once and asked for once")
    max_seq_length: int = _option(512, "tokens over which gradients flow, a multiple of segment_len")
    batch_size: int = _option(4, "documents read side by side, of all processes together")
    gradient_accumulation_steps: int = _option(1, "backward passes for each optimizer step")
    num_epochs: float | None = _option(None, "passes over the documents, instead of --max_steps")
    max_steps: int | None = _option(None, f"optimizer steps; {_DEFAULT_STEPS} if neither is given")
    recall_share: float = _option(0.65, "share of the steps before the gate takes over selection")
    credit_documents: int = _option(128, "documents whose credit is measured; 0 for none")
    foresight_passes: int = _option(6, "passes over those in which the gate alone learns to predict credit")
    learning_rate: float | None = _option(None, "default: 2e-3 over a frozen base, 1e-4 where LoRA or the base trains")
    warmup_ratio: float = _option(0.05, "share of the steps with a rising learning rate; it then falls linearly to 0")
    weight_decay: float = _option(0.01, "of AdamW, on matrices")
    max_grad_norm: float = _option(1.0, "norm to which gradients are clipped")
    lm_loss_weight: float = _option(1.0, "weight of the next-token loss")
    credit_loss_weight: float = _option(1.0, "weight of the gate's error in predicting credit")
    sparsity_loss_weight: float = _option(0.1, "weight of salience above its target")
    target_tagged_share: float = _option(0.3, "share of tokens that the gate is set to tag")
    lora_r: int = _option(0, "rank of LoRA on the base; 0 for none")
    lora_alpha: int = _option(32, "scale of LoRA")
    lora_dropout: float = _option(0.05, "dropout of LoRA")
    lora_target_modules: list[str] = _option(["q_proj", "v_proj"], "layers of the base that get LoRA")
    train_base: bool = _option(False, "train the base's own weights")
    memory_off: bool = _option(False, "train LoRA or the base alone; --hippocampus stays unchanged")
    set: list[str] = _option([], "options of the model's config as name=value; each can also be given as --name value")
    dtype: Literal["bfloat16", "float16", "float32"] | None = _option(None, "of the base's weights; docs/training.md")
    mixed_precision: str | None = _option(None, "bf16, fp16 (scaled) or no; default: as accelerate launch says")
    gradient_checkpointing: bool = _option(False, "recompute a training base's layers in the backward pass")
    output_dir: str = _option("runs/hippoformer", "folder of checkpoints and of the trained model")
    cache_dir: str | None = _option(None, "folder of hidden states; default: output_dir/hidden_states")
    save_steps: int = _option(100, "steps between checkpoints; 0 for none")
    logging_steps: int = _option(10, "steps between logs; 0 for none")
    eval_steps: int = _option(0, "steps between evaluations of --eval_text; 0 for none")
    seed: int = _option(42, "of initial weights, order, dropout and replay")
    wandb_project: str | None = _option(None, "report to wandb, and the project's name for every tracker")
    wandb_run_name: str | None = _option(None, "name of the run in trackers")
    no_wandb: bool = _option(False, "never report to wandb")
    report_to: list[str] = _option([], "tensorboard, trackio, wandb")
    resume_from_checkpoint: str | None = _option(None, "a checkpoint, an output folder, or auto: output_dir's newest")

    def __post_init__(self) -> None:
        frozen = not self.trains_base
        given_to_a_stream = self.num_epochs is not None or self.planted_documents or self.questions
        broken = {
            "no --text beside --dataset": self.text and self.dataset,
            "--num_epochs or --max_steps, not both": self.max_steps is not None and self.num_epochs is not None,
            "--lora_r (adapters) or --train_base (the weights), not both": self.lora_r and self.train_base,
            "--lora_r RANK or --train_base with --memory_off: only the base trains then": self.memory_off and frozen,
            "--streaming with --dataset": self.streaming and self.dataset is None,
            "--max_samples with --streaming, or no --num_epochs, --planted_documents, --questions": self.reads_stream
            and given_to_a_stream,
            "--gradient_checkpointing with --lora_r or --train_base, not with a frozen base": frozen
            and self.gradient_checkpointing,
        }
        if rules := [rule for rule, is_broken in broken.items() if is_broken]:
            raise ConfigurationError(f"expected {'; '.join(rules)}")

    @property
    def reads_stream(self) -> bool:
        """Documents come from a stream during training; else all are there before it begins."""
        return self.streaming and self.max_samples is None

    @property
    def trains_base(self) -> bool:
        """Weights of the base, or adapters in it, are trained."""
        return self.lora_r > 0 or self.train_base

    @property
    def rate(self) -> float:
        """The learning rate of the memory's matrices; the base has a tenth of it."""
        return self.learning_rate or (1e-4 if self.trains_base else 2e-3)

    @property
    def trackers(self) -> list[str]:
        """What the run reports to."""
        asked = [*self.report_to, *(["wandb"] if self.wandb_project and "wandb" not in self.report_to else [])]
        return [tracker for tracker in asked if not (self.no_wandb and tracker == "wandb")]

    @property
    def lora(self) -> dict[str, Any] | None:
        """Fields of a peft `LoraConfig`, or None."""
        sizes = {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}
        return sizes | {"target_modules": self.lora_target_modules} if self.lora_r else None

    def steps(self, segments: int, segment_len: int) -> int:
        """Optimizer steps of a run over documents of `segments` segments together."""
        if self.num_epochs is None:
            return self.max_steps or _DEFAULT_STEPS
        per_step = self.batch_size * (self.max_seq_length // segment_len) * self.gradient_accumulation_steps
        return -int(-self.num_epochs * segments // per_step)


def config_options(pairs: list[str]) -> dict[str, Any]:
    """`name=value` strings as options of the config, which must exist; values are read as JSON, else as text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name not in _OPTIONS:
            raise ConfigurationError(f"expected name=value, name an option of HippoFormerConfig; got {pair!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def parse(argv: list[str]) -> TrainArguments:
    """Reads a command line; a `ConfigurationError` names arguments that are unknown or contradict each other."""
    parser = HfArgumentParser(TrainArguments, prog="hippoformer train", allow_abbrev=False)  # type: ignore[arg-type]
    group = parser.add_argument_group("options of the model's config")
    for name in sorted(_OPTIONS - vars(TrainArguments()).keys() - {"base_model_name", "freeze_base", "lora"}):
        group.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="+", default=argparse.SUPPRESS)
    arguments, *named, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        raise ConfigurationError(f"{' '.join(rest)}: expected options as --name value; --help lists them")
    for name, values in (pair for options in named for pair in vars(options).items()):
        arguments.set.append(f"{name}={values[0] if len(values) == 1 else '[' + ', '.join(values) + ']'}")
    if not (arguments.text or arguments.dataset or arguments.questions):
        raise ConfigurationError("nothing to train on: give --text FILE_OR_FOLDER..., --dataset NAME or --questions")
    config_options(arguments.set)  # a wrong one fails here, before the base is loaded
    return arguments
