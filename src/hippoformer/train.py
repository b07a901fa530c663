"""`python -m hippoformer.train` and `hippoformer train`: from texts to a trained hippocampus in `output_dir`."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hippoformer.data import Document, dataset_documents, read_documents
from hippoformer.data.planted import plant_facts
from hippoformer.errors import ConfigurationError, HippoFormerError
from hippoformer.evaluation import provenance, write_json
from hippoformer.model.base_models import load_base_model, load_tokenizer
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.model.modeling import HippoFormer
from hippoformer.training.arguments import TrainArguments, config_options, parse
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.trainer import Trainer, TrainingOptions

_CHARACTERS_PER_TOKEN = 4
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
    documents = _documents(arguments)
    documents += _with_facts(documents, arguments)
    model = _model(arguments)
    tokenizer = load_tokenizer(arguments.base_model)
    texts = _encode(documents, tokenizer, arguments.max_document_tokens)
    held_out = (
        _encode(read_documents(arguments.eval_text), tokenizer, arguments.max_document_tokens)
        if arguments.eval_text
        else []
    )
    options = _options(arguments, model.config, texts)
    frozen = model.config.freeze_base and not model.config.use_lora
    cache = Path(arguments.cache_dir) if arguments.cache_dir else options.output_dir / "hidden_states"
    trainer = Trainer(
        model,
        options,
        HiddenStateCache(model, texts, cache) if frozen else texts,
        HiddenStateCache(model, held_out, cache) if frozen and held_out else None,
    )
    resume = arguments.resume_from_checkpoint
    history = trainer.train(Path(resume) if resume else None)
    model.save_pretrained(options.output_dir)
    facts = provenance(seed=arguments.seed, documents=documents)
    write_json(
        options.output_dir / "training_log.json", {"arguments": vars(arguments), "history": history, "run": facts}
    )
    return model


def _model(arguments: TrainArguments) -> HippoFormer:
    lora = arguments.lora_r > 0
    rate = arguments.learning_rate or (1e-4 if lora or arguments.train_base else 1e-3)
    options: dict[str, object] = {
        "base_model_name": arguments.base_model,
        "freeze_base": not arguments.train_base,
        "use_lora": lora,
        "lora_alpha": arguments.lora_alpha,
        "window": arguments.window,
        "buffer_size": arguments.buffer_size,
        "learning_rate": rate,
        "seed": arguments.seed,
    }
    if lora:
        options["lora_r"] = arguments.lora_r
    torch.manual_seed(arguments.seed)  # the hippocampus' initial weights
    known = HippoFormerConfig().to_dict()
    extra = config_options(arguments.set)
    if unknown := sorted(set(extra) - set(known)):
        raise ConfigurationError(f"--set: HippoFormerConfig has no option {', '.join(unknown)}")
    base = load_base_model(arguments.base_model, dtype=getattr(torch, arguments.dtype))
    return HippoFormer(HippoFormerConfig(**(options | extra)), base)  # type: ignore[arg-type]


def _documents(arguments: TrainArguments) -> list[Document]:
    if arguments.dataset is None:
        return read_documents(arguments.text)[: arguments.max_samples]
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
    size = _CHARACTERS_PER_TOKEN * arguments.max_document_tokens
    longest = sorted(documents, key=lambda document: -len(document.text))[: arguments.planted_documents]
    parts = [Document(d.title, d.text[size : 2 * size] or d.text[:size], d.source) for d in longest]
    return plant_facts(parts, arguments.planted_facts, _FACT_GAP, arguments.seed)


def _encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Tensor]:
    encoded = (torch.tensor(tokenizer(d.text, truncation=True, max_length=limit)["input_ids"]) for d in documents)
    return [ids for ids in encoded if len(ids) >= 2]


def _options(arguments: TrainArguments, config: HippoFormerConfig, texts: list[Tensor]) -> TrainingOptions:
    if arguments.max_seq_length % config.segment_len:
        raise ConfigurationError(
            f"--max_seq_length={arguments.max_seq_length} must be a multiple of segment_len={config.segment_len}"
        )
    segments = arguments.max_seq_length // config.segment_len
    steps = arguments.max_steps or 400
    if arguments.num_epochs is not None:
        per_step = arguments.batch_size * segments * arguments.gradient_accumulation_steps
        steps = math.ceil(arguments.num_epochs * sum(math.ceil(len(t) / config.segment_len) for t in texts) / per_step)
    trackers = list(arguments.report_to)
    if arguments.wandb_project and not arguments.no_wandb and "wandb" not in trackers:
        trackers.append("wandb")
    return TrainingOptions(
        output_dir=Path(arguments.output_dir),
        max_steps=steps,
        recall_share=arguments.recall_share,
        rows=arguments.batch_size,
        segments_per_step=segments,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        warmup_ratio=arguments.warmup_ratio,
        credit_documents=arguments.credit_documents,
        save_steps=arguments.save_steps,
        logging_steps=arguments.logging_steps,
        eval_steps=arguments.eval_steps,
        seed=arguments.seed,
        report_to=[tracker for tracker in trackers if not (arguments.no_wandb and tracker == "wandb")],
        run_name=arguments.wandb_run_name,
        project=arguments.wandb_project or "hippoformer",
    )


if __name__ == "__main__":
    sys.exit(main())
