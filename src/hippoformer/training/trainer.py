"""The training run: phases over text in rows, whose state is carried from step to step.

    recall   queries, keys and fusion learn to predict from a store of the latest episodes: the gate is untrained
    joint    first, documents are read with room for every episode, which measures the credit of each, and the gate
             alone learns to predict it (see `credit`); then everything learns under the gate's selection
    base     instead of both, with the memory off: the base or its adapters learn by the base's own loss

A step reads `max_seq_length` tokens in every row and steps the optimizer; the state is carried on, the graph is cut.
accelerate places the run on its devices (see `processes`), scales what float16 needs scaled, and reports to trackers.
A run is a function of its arguments: draws come from the seed, and a resumed run continues bit for bit.
"""

import copy
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from hippoformer.errors import CheckpointError, ConfigurationError, NonFiniteError
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import credit, processes, readers
from hippoformer.training.arguments import TrainArguments
from hippoformer.training.streams import Piece, StreamedTexts, TextStreams

_BASE_RATE = 0.1
_OPTIMIZER, _USEFUL = "optimizer.", "useful."
_INPUTS = ("target_log_prob", "counted", "salience", "forecast", "useful", "learned")
_OF_TOKENS, _OF_LEARNED = ("salience_mean", "tagged_share", "recall_use"), ("perplexity", "base_perplexity")


class Trainer:
    """One training run.

    Args:
        model: trained in place.
        arguments: those that say what to read are not used.
        documents: a `HiddenStateCache` for a frozen base; token ids (T,) per document, or `StreamedTexts`, to run the
            base itself.
        evaluation: held-out documents, cached or token ids, or None.
        accelerator: of the process; None makes one of the arguments.
        answers: document number -> where its answer begins, for those of which the answer alone is to be learned.
    """

    def __init__(
        self,
        model: HippoFormer,
        arguments: TrainArguments,
        documents: readers.Documents | StreamedTexts,
        evaluation: readers.Documents | None = None,
        accelerator: Accelerator | None = None,
        answers: Mapping[int, int] | None = None,
    ) -> None:
        segment_len, base = model.config.segment_len, [p for p in model.base.parameters() if p.requires_grad]
        if isinstance(documents, readers.HiddenStateCache) and base:
            raise ConfigurationError("cached hidden states need a frozen base: give token ids for one that trains")
        if arguments.max_seq_length % segment_len:
            raise ConfigurationError(
                f"--max_seq_length={arguments.max_seq_length} must be a multiple of segment_len={segment_len}"
            )
        torch.manual_seed(arguments.seed)
        self.model, self.arguments, self.documents, self.evaluation = model, arguments, documents, evaluation
        self.accelerator = accelerator or processes.new_accelerator(arguments)
        self.rows = processes.own_rows(arguments.batch_size, self.accelerator)
        self.schedule: TextStreams | StreamedTexts
        self.learned, segments = dict[int, Tensor](), 0
        if isinstance(documents, StreamedTexts):
            self.schedule, self.rows = documents, range(len(self.rows))
        else:
            lengths = readers.lengths_of(documents)
            self.schedule = TextStreams(lengths, arguments.batch_size, segment_len, arguments.seed)
            self.learned = {n: torch.arange(lengths[n]) >= answer for n, answer in (answers or {}).items()}
            segments = sum(math.ceil(n / segment_len) for n in lengths)
        self.steps = arguments.steps(segments, segment_len)
        model.to(self.accelerator.device)
        if arguments.memory_off:
            model.hippocampus.requires_grad_(False)
        else:
            self._choose_anchors()
        if arguments.gradient_checkpointing:
            readers.checkpoint_layers(model)
        self.reader = readers.new_reader(model, documents, len(self.rows))
        weights = (arguments.lm_loss_weight, arguments.credit_loss_weight, arguments.sparsity_loss_weight)
        self.loss = credit.HippoFormerLoss(*weights, target_tagged_share=arguments.target_tagged_share)
        groups = credit.parameter_groups(model.hippocampus, arguments.rate, arguments.weight_decay)
        groups.append({"params": base, "lr": _BASE_RATE * arguments.rate, "weight_decay": arguments.weight_decay})
        self.optimizer: Any = torch.optim.AdamW([group for group in groups if group["params"]])
        warmup = math.ceil(arguments.warmup_ratio * self.steps)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, self.steps)
        self.work: Any = processes.Work(model)
        self.useful: dict[int, Tensor] = {}
        self.r_score = credit.ConsolidationRScore()
        self.step, self.history = 0, list[dict[str, float]]()

    def train(self, resume_from: Path | None = None) -> list[dict[str, float]]:
        """Runs to the end; returns what was logged.

        Raises:
            NonFiniteError: the loss became NaN or infinite; the last checkpoint is untouched.
            CheckpointError: `resume_from` has no whole checkpoint, or not one of this run.
        """
        arguments = self.arguments
        if resume_from is not None:  # weights before an engine shards them, everything else after
            processes.restore_weights(self.model, resume_from)
        self.work, self.optimizer = processes.prepared(self.work, self.optimizer, self.accelerator)
        if resume_from is not None:
            self._restore(resume_from)
        if arguments.trackers:
            self._start_trackers()
        self._train_mode()
        started, tokens, window = time.monotonic(), 0.0, list[dict[str, float]]()
        while self.step < self.steps:
            if self._joint and not self.useful:
                self._measure_credit()
            window.append(self._optimize())
            tokens += window[-1]["tokens"]
            self.step += 1
            if self._due(arguments.logging_steps):
                self._record(self._means(window) | {"tokens_per_second": tokens / (time.monotonic() - started)})
                window = []
            if self._due(arguments.eval_steps) and self.evaluation is not None:
                self._record(self._evaluate(self.evaluation))
            if self._due(arguments.save_steps) or (arguments.save_steps and self.step == self.steps):
                self._save()
        self.model.eval()
        return self.history

    def save_model(self, folder: Path) -> None:
        """Writes the model for `HippoFormer.from_pretrained`; every process must call it, the main one writes."""
        main = self.accelerator.is_main_process
        self.model.save_pretrained(folder, is_main_process=main, state_dict=processes.whole_weights(self.model))
        self.accelerator.wait_for_everyone()

    @property
    def _joint(self) -> bool:
        """Whether the gate's part of the run has begun."""
        return not self.arguments.memory_off and self.step >= round(self.arguments.recall_share * self.steps)

    def _during_phase(self) -> AbstractContextManager[Any]:
        if self.arguments.memory_off:
            return self.model.memory_off()
        return nullcontext() if self._joint else credit.reconfigured(self.model.hippocampus, selection="fifo")

    def _train_mode(self) -> None:
        self.model.train()
        self.model.base.train(self.arguments.trains_base)  # hidden states of a frozen one are those of inference

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    # ---------------------------------------------------------------- one step

    def _optimize(self) -> dict[str, float]:
        sums: Counter[str] = Counter()
        place = self.step * self.accelerator.num_processes + self.accelerator.process_index
        torch.manual_seed(self.arguments.seed * 1_000_003 + place)  # so a resumed step draws the same dropout
        for _ in range(backward_passes := self.arguments.gradient_accumulation_steps):
            with self._during_phase():
                loss, numbers = self.work(self._read)
                if not torch.isfinite(loss):
                    raise NonFiniteError(f"the loss is {loss.item()} at step {self.step}: lower the learning rate")
                # DDP exchanges gradients in every pass: it cannot look for unused weights while it postpones that.
                self.accelerator.backward(loss * self.accelerator.num_processes / backward_passes)
            self.reader.cache.detach()
            sums.update(numbers)
        processes.average_unsharded(self.model, self.accelerator)
        norm = float(self.accelerator.clip_grad_norm_(self.work.parameters(), self.arguments.max_grad_norm))
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise NonFiniteError(f"the gradients are {norm} at step {self.step}: lower the learning rate")
        self.optimizer.step()
        skipped = self.optimizer.step_was_skipped  # because of an overflow in float16; the scale is lower now
        if not skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        return {**sums, "grad_norm": 0.0 if skipped else norm, "skipped": float(skipped)}

    def _read(self) -> tuple[Tensor, Counter[str]]:
        """The loss of the next pieces of all rows, and sums for the log."""
        losses, sums = [], Counter[str]()
        for _ in range(self.arguments.max_seq_length // self.model.config.segment_len):
            piece = self.schedule.next().of_rows(self.rows)
            terms, numbers = self._terms(piece, self.reader.read(piece))
            losses.append(terms["total" if self._joint else "lm"])
            sums.update(numbers)
        return torch.stack(losses).mean(), sums

    def _terms(self, piece: Piece, reading: readers.Reading) -> tuple[dict[str, Tensor], dict[str, float]]:
        found = reading.found
        of = {name: getattr(reading, name) for name in ("target_log_prob", "base_log_prob", "counted")}
        of["learned"] = reading.counted & self._of_tokens(piece, self.learned, True, reading.counted)
        if found is not None:
            of |= {"salience": found.salience, "forecast": found.forecast}
            of["recalled"] = found.prior_mixture * (1.0 - found.prior_nothing)
            if self.useful:
                of["useful"] = self._of_tokens(piece, self.useful, torch.nan, found.salience)
        of = processes.of_all_rows(of, self.accelerator, self.model.config.segment_len)
        terms = self.loss(**{name: of[name] for name in _INPUTS if name in of})
        of = {name: tensor.detach() for name, tensor in of.items()}
        counted, learned = of["counted"], of["learned"]
        sums: dict[str, Any] = {f"loss_{name}": term.detach() for name, term in terms.items()}
        sums |= {"pieces": 1, "tokens": counted.sum(), "learned": learned.sum()}
        sums |= {"perplexity": -of["target_log_prob"][learned].sum()}
        sums |= {"base_perplexity": -of["base_log_prob"][learned].sum()}
        if found is not None:
            salience = of["salience"][counted]
            sums |= {"salience_mean": salience.sum(), "tagged_share": (salience > 0.5).sum()}
            sums |= {"recall_use": of["recalled"][counted].sum()}
            if self.useful:
                self.r_score.update(of["salience"], of["useful"], counted & ~of["useful"].isnan())
        return terms, {name: float(value) for name, value in sums.items()}

    def _of_tokens(self, piece: Piece, values: Mapping[int, Tensor], missing: float, like: Tensor) -> Tensor:
        """(R, N) of `values`, (T,) of some documents, for the tokens of a piece; `missing` where there are none."""
        spread = torch.full(like.shape, missing, dtype=like.dtype)
        for row, (document, span) in enumerate(zip(piece.documents, piece.spans, strict=True)):
            if document in values:
                spread[row, : span.stop - span.start] = values[document][span]
        return spread.to(like.device)

    # ---------------------------------------------------------------- credit and anchors

    def _measure_credit(self) -> None:
        """Measures credit under the recall learnt so far, and teaches the gate: a function of weights and documents."""
        documents, arguments, hippocampus = self.documents, self.arguments, self.model.hippocampus
        if not isinstance(documents, readers.HiddenStateCache) or not arguments.credit_documents:
            return
        self.model.eval()
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
        mine = order[: arguments.credit_documents][self.accelerator.process_index :: self.accelerator.num_processes]
        groups = readers.of_like_length(mine, documents.lengths, arguments.batch_size)

        def measure() -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            for group in tqdm(groups, desc="measuring credit", unit="group", disable=None):
                earned = credit.measure_credit(hippocampus, [documents[number] for number in group])
                found |= {number: of.clamp(0.0, 1.0) for number, of in zip(group, earned, strict=True)}
            return found

        self.useful = {number: of for part in gather_object([self.work(measure)]) for number, of in part.items()}
        learning = copy.deepcopy(hippocampus)  # an engine would look at the gradients of its own weights
        loss = credit.teach_gate(learning, documents, self.useful, arguments)
        hippocampus.load_state_dict(learning.state_dict())
        self.accelerator.print(f"the gate alone: loss_credit {loss:.4f}", file=sys.stderr)
        self._train_mode()

    def _choose_anchors(self) -> None:
        """Drift anchors from the training text itself, spread evenly over it."""
        calibrator = self.model.hippocampus.drift_calibrator
        count, length = calibrator.anchor_ids.shape
        texts: Any = getattr(self.documents, "texts", self.documents)
        text = torch.cat([ids.int().cpu() for ids in texts])
        if len(text) >= 4 * length:  # else the pseudo-random ones stay
            starts = torch.linspace(0, len(text) - length, count).long()
            calibrator.set_anchors(text.unfold(0, length, 1)[starts])
        calibrator.set_anchors(broadcast(calibrator.anchor_ids))  # of a stream, every process has others in hand

    # ---------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        shared = {f"{_OPTIMIZER}{n}": tensor for n, tensor in processes.optimizer_tensors(self.optimizer).items()}
        shared |= {f"{_USEFUL}{document}": target for document, target in self.useful.items()}
        scaler = self.accelerator.scaler
        counters = {
            "step": self.step,
            "streamed": isinstance(self.schedule, StreamedTexts),
            "orders": gather_object([self.schedule.state()]),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "history": self.history,
        }
        processes.save(Path(self.arguments.output_dir), self.model, shared, self.reader.state(), counters)

    def _restore(self, path: Path) -> None:
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        shared, rows, counters = processes.load(path, index, count)
        orders, streamed = counters["orders"], isinstance(self.schedule, StreamedTexts)
        if counters["streamed"] != streamed or (streamed and len(orders) != count):
            raise CheckpointError(
                f"{path} has streamed={counters['streamed']}, processes={len(orders)}: resume it with the same data, "
                "and a streamed run on as many processes"
            )
        self.reader.restore(rows)
        self.schedule.restore(orders[index if streamed else 0])
        processes.restore_optimizer(self.optimizer, _named(shared, _OPTIMIZER))
        self.useful = {int(document): target for document, target in _named(shared, _USEFUL).items()}
        self.scheduler.load_state_dict(counters["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        if self.accelerator.scaler is not None and counters["scaler"]:
            self.accelerator.scaler.load_state_dict(counters["scaler"])
        self.step, self.history = counters["step"], counters["history"]

    # ---------------------------------------------------------------- evaluation and logs

    @torch.no_grad()
    def _evaluate(self, documents: readers.Documents) -> dict[str, float]:
        """Perplexity of held-out documents, each from an empty memory: of the base, and with the memory."""
        arguments, accelerator = self.arguments, self.accelerator
        # Processes that share one base in pieces must all read the same.
        divided = isinstance(documents, readers.HiddenStateCache) or not processes.is_sharded(accelerator)
        index, count = (accelerator.process_index, accelerator.num_processes) if divided else (0, 1)
        chosen = range(len(documents))[index::count]
        self.model.eval()
        with self.model.memory_off() if arguments.memory_off else nullcontext():
            scores = self.work(lambda: readers.score_documents(self.model, documents, chosen, arguments.batch_size))
        self._train_mode()
        sums = scores.sum(0).tolist()
        tokens, *log_probs = processes.summed(sums) if divided else sums
        fused, base = (math.exp(-log_prob / max(tokens, 1.0)) for log_prob in log_probs)
        return {"eval_base_perplexity": base, "eval_perplexity": fused, "eval_gain": 1 - fused / base}

    def _means(self, window: Sequence[dict[str, float]]) -> dict[str, float]:
        """The numbers of several optimizer steps in one: means over their tokens, losses over their pieces.

        The perplexities are those of the tokens that were to be learned, 1 where there was none.
        """
        total = {name: sum(step.get(name, 0.0) for step in window) for name in window[-1]}
        numbers = {name: total[name] / total["pieces"] for name in total if name.startswith("loss_")}
        numbers |= {name: total[name] / max(total["tokens"], 1.0) for name in _OF_TOKENS if name in total}
        numbers |= {name: math.exp(total[name] / max(total["learned"], 1.0)) for name in _OF_LEARNED}
        stored = self.reader.cache.memory.episodes.slots(0, self.model.config.buffer_size).valid
        filled, slots = processes.summed([float(stored.sum()), float(stored.numel())])
        r_score, self.r_score = self.r_score.compute(), credit.ConsolidationRScore()
        if not math.isnan(r_score):
            numbers["consolidation_r"] = r_score
        return numbers | {
            "buffer_use": filled / max(slots, 1.0),
            "grad_norm": total["grad_norm"] / max(len(window) - total["skipped"], 1.0),
            "skipped_steps": total["skipped"],
            "learning_rate": self.scheduler.get_last_lr()[0],
            "epoch": self.schedule.epoch,
        }

    def _record(self, numbers: dict[str, float]) -> None:
        self.history.append({"step": float(self.step)} | numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.accelerator.print(f"step {self.step}/{self.steps}  {shown}", file=sys.stderr)
        if self.arguments.trackers:
            self.accelerator.log(numbers, step=self.step)

    def _start_trackers(self) -> None:
        arguments, options = self.arguments, self.model.config.to_dict() | vars(self.arguments)
        # Trackers keep tables of scalars; what is a list or nothing goes in as its JSON.
        scalar = bool | int | float | str
        table = {n: v if isinstance(v, scalar) else json.dumps(v, default=str) for n, v in options.items()}
        named = {tracker: {"name": arguments.wandb_run_name} for tracker in ("wandb", "trackio")}
        project = arguments.wandb_project or "hippoformer"
        self.accelerator.init_trackers(project, table, init_kwargs=named if arguments.wandb_run_name else {})


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
