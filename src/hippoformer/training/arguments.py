"""Command-line arguments of training: the original's names, with `_` or `-`, and what this project adds."""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hippoformer.errors import ConfigurationError


@dataclass
class TrainArguments:
    """`hippoformer train`; options of the model's config are given as `--set name=value name=value ...`.

    The defaults are the recipe of the shipped hippocampus, in one run.
    """

    base_model: str = field(default="smollm2-135m", metadata={"help": "folder, hub repository, or smollm2-135m"})
    hippocampus: str | None = field(
        default=None, metadata={"help": "a saved hippocampus to go on from, or smollm2-135m for the shipped one"}
    )
    text: list[str] = field(default_factory=list, metadata={"help": "files or folders of text to train on"})
    eval_text: list[str] = field(default_factory=list, metadata={"help": "held-out files or folders"})
    questions: list[str] = field(
        default_factory=list,
        metadata={"help": ".jsonl files, or names as babi-qa1: texts with a question, of which the answer is learned"},
    )
    questions_split: str = field(default="train", metadata={"help": "which part of --questions that have parts"})
    data_dir: str = field(default="data", metadata={"help": "where local copies of --questions lie"})
    dataset: str | None = field(default=None, metadata={"help": "a Hugging Face dataset instead of --text"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    streaming: bool = field(
        default=False,
        metadata={
            "help": "read the dataset while training goes on; with --max_samples, download only so many documents"
        },
    )
    max_samples: int | None = field(default=None, metadata={"help": "documents to use"})
    max_document_tokens: int = field(default=12288, metadata={"help": "tokens read of each document"})
    obey_control_tokens: bool = field(
        default=False, metadata={"help": "control tokens written in the texts are control tokens, not text"}
    )
    planted_documents: int | None = field(
        default=None,
        metadata={
            "help": "of the N longest documents a further part is read, with made-up facts in it, where it is long "
            "enough; default 30, or 0 with --memory_off and --streaming"
        },
    )
    planted_facts: int = field(
        default=32, metadata={"help": "facts in each of those, each stated once and asked for once"}
    )
    max_seq_length: int = field(
        default=512, metadata={"help": "tokens over which gradients flow, a multiple of a segment"}
    )
    batch_size: int = field(default=4, metadata={"help": "documents side by side, of all processes together"})
    gradient_accumulation_steps: int = 1
    num_epochs: float | None = field(
        default=None, metadata={"help": "passes over the documents, instead of --max_steps"}
    )
    max_steps: int | None = field(default=None, metadata={"help": "optimizer steps; 800 if neither is given"})
    recall_share: float = field(
        default=0.65, metadata={"help": "part of the steps before the gate takes over selection"}
    )
    credit_documents: int = field(default=128, metadata={"help": "documents whose credit is measured; 0 for none"})
    foresight_passes: int = field(
        default=6, metadata={"help": "passes over those in which the gate alone learns to foresee credit"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "default: 2e-3 over a frozen base, 1e-4 where LoRA or the base trains"}
    )
    warmup_ratio: float = 0.05
    lora_r: int = field(default=0, metadata={"help": "rank of LoRA on the base; 0 keeps it frozen"})
    lora_alpha: int = 32
    train_base: bool = field(default=False, metadata={"help": "train the base's own weights"})
    memory_off: bool = field(
        default=False,
        metadata={"help": "train LoRA or the base alone, by its own loss; --hippocampus is carried along untouched"},
    )
    window: int | None = field(default=None, metadata={"help": "default 512, or what --hippocampus has"})
    buffer_size: int | None = field(default=None, metadata={"help": "default 2048, or what --hippocampus has"})
    set: list[str] = field(
        default_factory=list, metadata={"help": "other options of the config: --set name=value name=value"}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "of the base: bfloat16, float16 or float32; default bfloat16; float32 if its weights train, or "
            "on a processor that is slow in bfloat16"
        },
    )
    mixed_precision: str | None = field(
        default=None, metadata={"help": "bf16, fp16 (scaled) or no; default: as accelerate launch says"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "compute a training base's layers twice instead of keeping them"}
    )
    torch_compile: str | None = field(
        default=None, metadata={"help": "compile a live base's layers with this backend, for example inductor"}
    )
    output_dir: str = "runs/hippoformer"
    cache_dir: str | None = field(
        default=None, metadata={"help": "of hidden states; default: output_dir/hidden_states"}
    )
    save_steps: int = 100
    logging_steps: int = 10
    eval_steps: int = 0
    seed: int = 42
    wandb_project: str | None = None
    wandb_run_name: str | None = None
    no_wandb: bool = field(default=False, metadata={"help": "never report to wandb"})
    report_to: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, wandb"})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "a checkpoint, an output folder, or auto: output_dir's newest, if it has one"}
    )

    @property
    def read_on_the_way(self) -> bool:
        """Documents come from a stream while training goes on; else all are there before it begins."""
        return self.streaming and self.max_samples is None


def parse(argv: list[str]) -> TrainArguments:
    """Reads a command line.

    Raises:
        ConfigurationError: options that contradict each other.
    """
    (arguments,) = HfArgumentParser(TrainArguments, prog="hippoformer train").parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
    if (arguments.text and arguments.dataset) or not (arguments.text or arguments.dataset or arguments.questions):
        raise ConfigurationError(
            "say what to train on: either --text FILE_OR_FOLDER... or --dataset NAME; beside them or alone --questions "
            "NAME..."
        )
    if arguments.max_steps is not None and arguments.num_epochs is not None:
        raise ConfigurationError("--max_steps and --num_epochs both set the length of the run: give one of them")
    if arguments.lora_r > 0 and arguments.train_base:
        raise ConfigurationError("--lora_r trains adapters beside the base's weights, --train_base the weights: choose")
    if arguments.streaming and arguments.dataset is None:
        raise ConfigurationError("--streaming is for --dataset; texts of --text are read as they are")
    if arguments.read_on_the_way and (
        arguments.num_epochs is not None or arguments.planted_documents or arguments.questions
    ):
        raise ConfigurationError(
            "--streaming without --max_samples reads a stream of unknown length: give --max_steps instead of "
            "--num_epochs, and leave --planted_documents and --questions out"
        )
    if arguments.memory_off and not (arguments.lora_r > 0 or arguments.train_base):
        raise ConfigurationError("--memory_off leaves only the base to train: give --lora_r RANK or --train_base")
    live = arguments.lora_r > 0 or arguments.train_base or arguments.read_on_the_way
    if (arguments.gradient_checkpointing or arguments.torch_compile) and not live:
        raise ConfigurationError(
            "--gradient_checkpointing and --torch_compile are for a base that runs while training (--lora_r, "
            "--train_base or --streaming): a frozen one reads the texts once, before"
        )
    return arguments


def config_options(pairs: list[str]) -> dict[str, object]:
    """`name=value` strings as options; values are read as JSON, else as text."""
    import json

    options: dict[str, object] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ConfigurationError(f"--set expects name=value, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options
