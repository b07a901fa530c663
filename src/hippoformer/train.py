"""`python -m hippoformer.train` and `hippoformer train`: from texts to a trained hippocampus in `output_dir`."""

import math
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hippoformer.configuration import HippoFormerConfig
from hippoformer.data import Document, dataset_documents, read_documents
from hippoformer.data.planted import plant_facts
from hippoformer.data.questions import Question, read_questions
from hippoformer.data.streaming import DatasetStream
from hippoformer.errors import ConfigurationError, HippoFormerError
from hippoformer.files import provenance, write_json
from hippoformer.hippocampus.words import words_of_tokens
from hippoformer.model.base_models import in_computing_dtype, load_base_model, load_tokenizer
from hippoformer.model.checkpoint import load_hippocampus
from hippoformer.model.loading import shipped_hippocampus
from hippoformer.model.modeling import HippoFormer
from hippoformer.text import start_tokens, token_ids
from hippoformer.training import checkpoints
from hippoformer.training.arguments import TrainArguments, config_options, parse
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.processes import own_rows
from hippoformer.training.streaming import StreamedTexts
from hippoformer.training.trainer import Trainer, TrainingOptions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CHARACTERS_PER_TOKEN = 4
_READ_TOGETHER = 8  # documents, at least, while a frozen base reads: without gradients there is room
_PLANTED_DOCUMENTS = 30
_FACT_GAP = (2500, 30000)  # characters between the tellings: from just beyond a window to several thousand tokens


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says; 0 on success, 2 on an error that was explained."""
    try:
        run(parse(sys.argv[1:] if argv is None else argv))
    except HippoFormerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: TrainArguments) -> HippoFormer:
    """One training run; the trained model is also saved in `output_dir`."""
    # First of all: it knows this process among the others, and its device.
    options = _options(arguments)
    accelerator = options.accelerator()
    documents = [] if arguments.read_on_the_way else _documents(arguments)
    documents += _with_facts(documents, arguments)
    questions = _questions(arguments)
    model = _model(arguments)
    model.to(accelerator.device)
    tokenizer = load_tokenizer(arguments.base_model)
    tokenizer.obey_control_tokens = arguments.obey_control_tokens
    model.hippocampus.recall.set_words(*words_of_tokens(tokenizer, model.config.vocab_size))
    frozen = model.config.freeze_base and not model.config.use_lora
    _check_segments(arguments, model.config)
    options.segments_per_step = arguments.max_seq_length // model.config.segment_len

    def encoded(documents: list[Document]) -> list[Tensor]:
        return [ids for d in documents if len(ids := _encode(d.text, tokenizer, arguments.max_document_tokens)) >= 2]

    def ready(texts: list[Tensor]) -> list[Tensor] | HiddenStateCache:
        if not frozen or arguments.read_on_the_way:
            return texts
        folder = Path(arguments.cache_dir) if arguments.cache_dir else options.output_dir / "hidden_states"
        side_by_side = max(_READ_TOGETHER, arguments.batch_size)
        return HiddenStateCache(model, texts, folder, side_by_side, processes=accelerator.state)

    answers: dict[int, int] = {}
    texts: list[Tensor] | HiddenStateCache | StreamedTexts
    if arguments.read_on_the_way:
        assert arguments.dataset is not None
        place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        stream = DatasetStream(arguments.dataset, arguments.dataset_config, **place)
        rows = len(own_rows(options.rows, accelerator))
        encode = partial(_encode, tokenizer=tokenizer, limit=arguments.max_document_tokens)
        texts = StreamedTexts(stream, encode, rows, model.config.segment_len)
    else:
        read = encoded(documents)
        asked = [_encode_question(question, tokenizer, arguments.max_document_tokens) for question in questions]
        answers = {number: answer for number, (_, answer) in enumerate(asked, start=len(read))}
        texts = ready([*read, *(ids for ids, _ in asked)])
        if arguments.num_epochs is not None:
            lengths = texts.lengths if isinstance(texts, HiddenStateCache) else [len(ids) for ids in texts]
            options.max_steps = _steps(arguments, options, lengths, model.config.segment_len)
    held_out = ready(encoded(read_documents(arguments.eval_text))) if arguments.eval_text else None
    trainer = Trainer(model, options, texts, held_out, accelerator, answers)
    history = trainer.train(_resume_from(arguments))
    trainer.save_model(options.output_dir)
    if accelerator.is_main_process:
        told = [Document(q.name, f"{q.context}{q.prompt} {q.answers[0]}", q.name) for q in questions]
        facts = provenance(seed=arguments.seed, documents=[*documents, *told] or None)
        write_json(
            options.output_dir / "training_log.json", {"arguments": vars(arguments), "history": history, "run": facts}
        )
    trainer.close()
    return model


def _resume_from(arguments: TrainArguments) -> Path | None:
    if arguments.resume_from_checkpoint != "auto":
        return Path(arguments.resume_from_checkpoint) if arguments.resume_from_checkpoint else None
    output = Path(arguments.output_dir)
    return output if checkpoints.whole(output) else None


def _model(arguments: TrainArguments) -> HippoFormer:
    lora = arguments.lora_r > 0
    rate = arguments.learning_rate or (1e-4 if lora or arguments.train_base else 2e-3)
    options: dict[str, object] = {
        "base_model_name": arguments.base_model,
        "freeze_base": not arguments.train_base,
        "use_lora": lora,
        "lora_alpha": arguments.lora_alpha,
        "learning_rate": rate,
    }
    given = arguments.hippocampus and (shipped_hippocampus(arguments.hippocampus) or arguments.hippocampus)
    if not (given and arguments.memory_off):  # one that is only carried along stays as it is
        options["seed"] = arguments.seed
    sizes = {"window": arguments.window, "buffer_size": arguments.buffer_size}
    options |= {name: value for name, value in sizes.items() if value is not None}
    if lora:
        options["lora_r"] = arguments.lora_r
    torch.manual_seed(arguments.seed)  # the hippocampus' initial weights
    if arguments.dtype is not None and arguments.dtype not in _DTYPES:
        raise ConfigurationError(f"--dtype {arguments.dtype} is unknown; choose one of {', '.join(_DTYPES)}")
    known = HippoFormerConfig().to_dict()
    extra = config_options(arguments.set)
    if unknown := sorted(set(extra) - set(known)):
        raise ConfigurationError(f"--set: HippoFormerConfig has no option {', '.join(unknown)}")
    dtype = arguments.dtype or ("float32" if arguments.train_base else "bfloat16")
    base = load_base_model(arguments.base_model, dtype=_DTYPES[dtype])
    if arguments.dtype is None:
        base = in_computing_dtype(base)
    if given:
        config = HippoFormerConfig.from_pretrained(given, **(options | extra))  # type: ignore[arg-type]
    else:
        config = HippoFormerConfig(**(options | extra))  # type: ignore[arg-type]
    model = HippoFormer(config, base)
    if given:
        load_hippocampus(model, given)
    return model


def _questions(arguments: TrainArguments) -> list[Question]:
    sets = (
        read_questions(name, arguments.questions_split, arguments.data_dir, arguments.max_samples)
        for name in arguments.questions
    )
    return [question for questions in sets for question in questions]


def _documents(arguments: TrainArguments) -> list[Document]:
    if arguments.dataset is None:
        return read_documents(arguments.text)[: arguments.max_samples] if arguments.text else []
    return list(
        dataset_documents(
            arguments.dataset,
            arguments.dataset_config,
            streaming=arguments.streaming,
            max_samples=arguments.max_samples,
        )
    )


def _with_facts(documents: list[Document], arguments: TrainArguments) -> list[Document]:
    """Further parts of the longest documents, with facts planted: what follows the part that is read as it is."""
    wanted = arguments.planted_documents
    if wanted is None:
        wanted = 0 if arguments.memory_off else _PLANTED_DOCUMENTS
    size = _CHARACTERS_PER_TOKEN * arguments.max_document_tokens
    longest = sorted(documents, key=lambda document: -len(document.text))[:wanted]
    parts = [Document(d.title, d.text[size : 2 * size] or d.text[:size], d.source) for d in longest]
    parts = [part for part in parts if len(part.text) >= 2 * _FACT_GAP[0]]  # no room for facts in the others
    return plant_facts(parts, arguments.planted_facts, _FACT_GAP, arguments.seed)


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> Tensor:
    return torch.tensor([*start_tokens(tokenizer), *token_ids(tokenizer, text)][:limit], dtype=torch.int64)


def _encode_question(question: Question, tokenizer: PreTrainedTokenizerBase, limit: int) -> tuple[Tensor, int]:
    """A text, its question and the first of its answers, (T,), and where the answer begins; the text's end is cut."""
    ids = partial(token_ids, tokenizer)
    start, tail, answer = start_tokens(tokenizer), ids(question.prompt), ids(f" {question.answers[0]}\n")
    room = limit - len(start) - len(tail) - len(answer)
    if room < 1:
        raise ConfigurationError(
            f"--max_document_tokens {limit} leaves no room for the text of {question.name}: its question and answer "
            f"need {limit - room}"
        )
    told = [*start, *ids(question.context)[:room], *tail]
    return torch.tensor([*told, *answer], dtype=torch.int64), len(told)


def _check_segments(arguments: TrainArguments, config: HippoFormerConfig) -> None:
    if arguments.max_seq_length % config.segment_len:
        raise ConfigurationError(
            f"--max_seq_length={arguments.max_seq_length} must be a multiple of segment_len={config.segment_len}"
        )


def _steps(arguments: TrainArguments, options: TrainingOptions, lengths: list[int], segment_len: int) -> int:
    """Optimizer steps of so many passes over the documents."""
    assert arguments.num_epochs is not None
    per_step = options.rows * options.segments_per_step * options.gradient_accumulation_steps
    return math.ceil(arguments.num_epochs * sum(math.ceil(n / segment_len) for n in lengths) / per_step)


def _options(arguments: TrainArguments) -> TrainingOptions:
    trackers = list(arguments.report_to)
    if arguments.wandb_project and not arguments.no_wandb and "wandb" not in trackers:
        trackers.append("wandb")
    return TrainingOptions(
        output_dir=Path(arguments.output_dir),
        max_steps=arguments.max_steps or TrainingOptions.max_steps,
        recall_share=arguments.recall_share,
        rows=arguments.batch_size,
        memory_off=arguments.memory_off,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        warmup_ratio=arguments.warmup_ratio,
        credit_documents=arguments.credit_documents,
        foresight_passes=arguments.foresight_passes,
        save_steps=arguments.save_steps,
        logging_steps=arguments.logging_steps,
        eval_steps=arguments.eval_steps,
        seed=arguments.seed,
        mixed_precision=arguments.mixed_precision,
        gradient_checkpointing=arguments.gradient_checkpointing,
        torch_compile=arguments.torch_compile,
        report_to=[tracker for tracker in trackers if not (arguments.no_wandb and tracker == "wandb")],
        run_name=arguments.wandb_run_name,
        project=arguments.wandb_project or "hippoformer",
    )


if __name__ == "__main__":
    sys.exit(main())
