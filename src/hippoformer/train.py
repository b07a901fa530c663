"""`python -m hippoformer.train` and `hippoformer train`: from texts to a trained hippocampus in `output_dir`."""

import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hippoformer.configuration import HippoFormerConfig
from hippoformer.data import Document, dataset_documents, read_documents
from hippoformer.data.datasets import DatasetStream
from hippoformer.data.planted import plant_facts
from hippoformer.data.questions import Question, read_questions
from hippoformer.errors import ConfigurationError, HippoFormerError
from hippoformer.files import provenance, write_json
from hippoformer.model.base_models import in_computing_dtype, load_base_model, load_tokenizer
from hippoformer.model.checkpoint import load_hippocampus
from hippoformer.model.loading import shipped_hippocampus
from hippoformer.model.modeling import HippoFormer
from hippoformer.text import start_tokens, token_ids
from hippoformer.training.arguments import TrainArguments, config_options, parse
from hippoformer.training.processes import complete, new_accelerator, own_rows
from hippoformer.training.readers import Documents, HiddenStateCache
from hippoformer.training.streams import StreamedTexts
from hippoformer.training.trainer import Trainer

_CHARACTERS_PER_TOKEN = 4
_READ_TOGETHER = 8  # documents, at least, while a frozen base reads: without gradients there is room
_PLANTED_DOCUMENTS = 30
_FACT_GAP = (2500, 30000)  # characters between statement and question: from just beyond a window to thousands of tokens


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says.

    Raises:
        HippoFormerError: of any kind; on the command line it becomes one line and exit code 2.
    """
    run(parse(sys.argv[1:] if argv is None else argv))
    return 0


def run(arguments: TrainArguments) -> HippoFormer:
    """One training run; the trained model is also saved in `output_dir`."""
    accelerator = new_accelerator(arguments)  # first: it knows this process among the others, and its device
    documents = [] if arguments.reads_stream else _documents(arguments)
    questions = [q for name in arguments.questions for q in read_questions(name, max_samples=arguments.max_samples)]
    model, tokenizer = _model(arguments).to(accelerator.device), load_tokenizer(arguments.base_model)
    tokenizer.obey_control_tokens = arguments.obey_control_tokens
    model.set_tokenizer(tokenizer)
    model.spelling = None  # no passages are kept in training
    output, limit = Path(arguments.output_dir), arguments.max_document_tokens

    def encode(text: str) -> Tensor:
        return torch.tensor([*start_tokens(tokenizer), *token_ids(tokenizer, text)][:limit], dtype=torch.int64)

    def encoded(documents: Iterable[Document]) -> list[Tensor]:
        return [ids for document in documents if len(ids := encode(document.text)) >= 2]

    def ready(texts: list[Tensor]) -> Documents:
        if arguments.trains_base or arguments.reads_stream:
            return texts
        folder = Path(arguments.cache_dir) if arguments.cache_dir else output / "hidden_states"
        return HiddenStateCache(model, texts, folder, max(_READ_TOGETHER, arguments.batch_size))

    answers: dict[int, int] = {}
    texts: Documents | StreamedTexts
    if arguments.reads_stream:
        place = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        stream = DatasetStream(str(arguments.dataset), arguments.dataset_config, **place)
        rows = len(own_rows(arguments.batch_size, accelerator))
        texts = StreamedTexts(stream, encode, rows, model.config.segment_len)
    else:
        read, asked = encoded(documents), [_encode_question(question, tokenizer, limit) for question in questions]
        answers = {number: answer for number, (_, answer) in enumerate(asked, start=len(read))}
        texts = ready([*read, *(ids for ids, _ in asked)])
    held_out = ready(encoded(read_documents(arguments.eval_text))) if arguments.eval_text else None
    trainer = Trainer(model, arguments, texts, held_out, accelerator, answers)
    resume = arguments.resume_from_checkpoint
    if resume == "auto":
        resume = arguments.output_dir if complete(output) else None
    history = trainer.train(Path(resume) if resume else None)
    trainer.save_model(output)
    if accelerator.is_main_process:
        told = [Document(q.name, f"{q.context}{q.prompt} {q.answers[0]}", q.name) for q in questions]
        facts = provenance(documents=[*documents, *told] or None)
        write_json(output / "training_log.json", {"arguments": asdict(arguments), "history": history, "run": facts})
    accelerator.end_training()
    return model


def _model(arguments: TrainArguments) -> HippoFormer:
    options: dict[str, object] = {"base_model_name": arguments.base_model, "freeze_base": not arguments.train_base}
    if arguments.lora is not None:
        options["lora"] = arguments.lora
    given = arguments.hippocampus and (shipped_hippocampus(arguments.hippocampus) or arguments.hippocampus)
    if not (given and arguments.memory_off):  # one that is only carried along stays as it is
        options["seed"] = arguments.seed
    options |= config_options(arguments.set)
    torch.manual_seed(arguments.seed)  # the hippocampus' initial weights
    dtype = arguments.dtype or ("float32" if arguments.train_base else "bfloat16")
    base = load_base_model(arguments.base_model, dtype=getattr(torch, dtype))
    if arguments.dtype is None:
        base = in_computing_dtype(base)
    if not given:
        return HippoFormer(HippoFormerConfig(**options), base)  # type: ignore[arg-type]
    model = HippoFormer(HippoFormerConfig.from_pretrained(given, **options), base)  # type: ignore[arg-type]
    load_hippocampus(model, given)
    return model


def _documents(arguments: TrainArguments) -> list[Document]:
    """The documents, and further parts of the longest with facts planted: the text after what is read as it is."""
    if arguments.dataset is not None:
        name, config, count = arguments.dataset, arguments.dataset_config, arguments.max_samples
        documents = list(dataset_documents(name, config, streaming=arguments.streaming, max_samples=count))
    else:
        documents = read_documents(arguments.text)[: arguments.max_samples] if arguments.text else []
    wanted = arguments.planted_documents
    if wanted is None:
        wanted = 0 if arguments.memory_off else _PLANTED_DOCUMENTS
    size = _CHARACTERS_PER_TOKEN * arguments.max_document_tokens
    longest = sorted(documents, key=lambda document: -len(document.text))[:wanted]
    parts = [Document(d.title, d.text[size : 2 * size] or d.text[:size], d.source) for d in longest]
    parts = [part for part in parts if len(part.text) >= 2 * _FACT_GAP[0]]  # no room for facts in the others
    return documents + plant_facts(parts, arguments.planted_facts, _FACT_GAP, arguments.seed)


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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HippoFormerError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
