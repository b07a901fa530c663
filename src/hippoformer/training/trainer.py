"""The training run: two phases over streamed text.

    recall   queries, keys and fusion learn to predict with surprise deciding what is kept, since the gate knows
    nothing yet
    credit   no learning: every document is read with room for everything, to see what each episode turns out to be
        worth
    joint    everything learns under the working capacity and the gate's own selection; the gate learns to foresee
    credit

A step reads `segments_per_step` segments in every row and then steps the optimizer; the state is carried on, the
graph is cut. `accelerate` places the run on its device and reports to trackers. A run is a function of its arguments:
draws come from the seed, and a resumed run continues bit for bit.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from hippoformer.errors import ConfigurationError, NonFiniteError
from hippoformer.hippocampus.drift import DriftMonitor
from hippoformer.hippocampus.losses import ConsolidationRScore, HippoFormerLoss
from hippoformer.model import checkpoint
from hippoformer.model.base_models import load_base_model
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import checkpoints
from hippoformer.training.credit import measure_credit, reconfigured, useful
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.readers import CachedReader, LiveReader, Reader, Reading, score_cached
from hippoformer.training.streams import Piece, TextStreams

_SCALAR_RATE = 10.0


@dataclass
class TrainingOptions:
    """How to train; what to train is in the model's config.

    Attributes:
        max_steps: optimizer steps of both phases. recall_share: part of them in the recall phase.
        rows: documents side by side. segments_per_step: segments between optimizer steps, over which gradients flow.
        gradient_accumulation_steps: backward passes between optimizer steps.
        warmup_ratio: part of the steps with a rising learning rate, None for the config's `warmup_steps`; it then falls
            linearly to zero.
        credit_documents: documents whose credit is measured; 0 skips the credit target.
        save_steps, logging_steps, eval_steps: 0 for never. keep_checkpoints: complete ones to keep.
        seed: of order, initial weights' dropout and replay.
    """

    output_dir: Path
    max_steps: int = 400
    recall_share: float = 0.5
    rows: int = 4
    segments_per_step: int = 4
    gradient_accumulation_steps: int = 1
    warmup_ratio: float | None = 0.05
    credit_documents: int = 128
    save_steps: int = 100
    logging_steps: int = 10
    eval_steps: int = 0
    keep_checkpoints: int = 2
    seed: int = 42
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None
    project: str = "hippoformer"


class Trainer:
    """One training run.

    Args:
        model: trained in place. options: see there.
        documents: a `HiddenStateCache` for a frozen base, or token ids (T,) per document to run the base itself.
        evaluation: held-out documents of the same kind, or None.

    Raises:
        ConfigurationError: cached hidden states with a base that itself trains, or whose layers recall changes.
    """

    def __init__(
        self,
        model: HippoFormer,
        options: TrainingOptions,
        documents: HiddenStateCache | Sequence[Tensor],
        evaluation: HiddenStateCache | None = None,
    ) -> None:
        config = model.config
        if isinstance(documents, HiddenStateCache) and (config.use_lora or not config.freeze_base):
            raise ConfigurationError("cached hidden states need a frozen base: set use_lora=False and freeze_base=True")
        if isinstance(documents, HiddenStateCache) and config.memory_layers != (-1,) and config.residual_readout:
            raise ConfigurationError(
                f"what a residual at layer {config.memory_layer} does to the layers above it cannot be cached: set "
                "residual_readout=False, or memory_layer=-1"
            )
        torch.manual_seed(options.seed)
        self.model, self.options, self.documents, self.evaluation = model, options, documents, evaluation
        self.accelerator = Accelerator(log_with=options.report_to or None, project_dir=str(options.output_dir))
        model.to(self.accelerator.device)
        model.hippocampus.fusion.open()
        self._choose_anchors()
        self.reader: Reader
        if isinstance(documents, HiddenStateCache):
            lengths = documents.lengths
            self.reader = CachedReader(model, documents, options.rows)
        else:
            lengths = [len(ids) for ids in documents]
            self.reader = LiveReader(model, documents, options.rows)
        self.streams = TextStreams(lengths, options.rows, config.segment_len, options.seed)
        self.loss = HippoFormerLoss(config)
        self.optimizer = torch.optim.AdamW(_parameter_groups(model))
        ratio = options.warmup_ratio
        warmup = config.warmup_steps if ratio is None else math.ceil(ratio * options.max_steps)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, options.max_steps)
        self.drift = DriftMonitor(config.drift_update_momentum)
        self.useful: dict[int, Tensor] = {}
        self.r_score = ConsolidationRScore()
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.console = Console(stderr=True)

    @property
    def recall_steps(self) -> int:
        """Optimizer steps of the first phase."""
        return round(self.options.recall_share * self.options.max_steps)

    def train(self, resume_from: Path | None = None) -> list[dict[str, float]]:
        """Runs to the end; returns what was logged.

        Raises:
            NonFiniteError: the loss became NaN or infinite; the last checkpoint is untouched.
        """
        if resume_from is not None:
            self._resume(resume_from)
        if self.options.report_to:
            named = {"wandb": {"name": self.options.run_name}} if self.options.run_name else {}
            self.accelerator.init_trackers(self.options.project, self.model.config.to_dict(), init_kwargs=named)
        self._learning()
        started, tokens = time.monotonic(), 0
        window: list[dict[str, float]] = []
        while self.step < self.options.max_steps:
            if self.step >= self.recall_steps and not self.useful:
                self._measure_credit()
            parts = self._optimize()
            window.append(parts)
            tokens += int(parts["tokens"])
            self.step += 1
            if self._due(self.options.logging_steps):
                self._log(window, tokens / (time.monotonic() - started))
                window = []
            if self._due(self.options.eval_steps) and self.evaluation is not None:
                self._record(self.evaluate())
            if self._due(self.options.save_steps) or (self.options.save_steps and self.step == self.options.max_steps):
                self._save()
        self.model.eval()
        if self.options.report_to:
            self.accelerator.end_training()
        return self.history

    def _learning(self) -> None:
        """Training mode; a frozen base stays in evaluation mode, as its hidden states are those of inference."""
        self.model.train()
        if not any(p.requires_grad for p in self.model.base.parameters()):
            self.model.base.eval()

    # ---------------------------------------------------------------- one step

    def _optimize(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        passes = self.options.gradient_accumulation_steps
        for _ in range(passes):
            with self._phase():
                losses = []
                for _ in range(self.options.segments_per_step):
                    piece = self.streams.next()
                    reading = self.reader.read(piece)
                    loss, numbers = self._loss(piece, reading)
                    losses.append(loss)
                    for name, value in numbers.items():
                        sums[name] = sums.get(name, 0.0) + value
                total = torch.stack(losses).mean() / passes
            if not torch.isfinite(total):
                raise NonFiniteError(f"the loss is {total.item()} at step {self.step}: lower the learning rate")
            self.accelerator.backward(total)
            self.reader.cut()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for g in self.optimizer.param_groups for p in g["params"]], self.model.config.max_grad_norm
        )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return sums | {"grad_norm": float(norm), "pieces": float(passes * self.options.segments_per_step)}

    def _phase(self):  # type: ignore[no-untyped-def]
        if self.step < self.recall_steps:
            return reconfigured(self.model.hippocampus, selection="surprise")
        # All priorities together act like the null slot's opposite, and the next-token loss would rather lower that: it
        # tags nothing. Where credit is known it is the gate's only teacher.
        return reconfigured(self.model.hippocampus, credit_only_gate=any(number >= 0 for number in self.useful))

    def _loss(self, piece: Piece, reading: Reading) -> tuple[Tensor, dict[str, float]]:
        found, counted = reading.found, reading.counted
        target = self._useful(piece, counted)
        parts = self.loss(
            reading.target_log_prob,
            counted,
            found.salience_logit,
            found.importance,
            found.prior_nothing,
            target,
        )
        if target is not None:
            self.r_score.update(found.salience, target, counted & ~target.isnan())
        total = parts.total if self.step >= self.recall_steps else parts.lm
        n = int(counted.sum())
        return total, {
            "tokens": n,
            "nll": -float(reading.target_log_prob.detach().sum()),
            "base_nll": -float(reading.base_log_prob.detach()[counted].sum()),
            "salience": float(found.salience.detach()[counted].sum()),
            "tagged": float((found.salience.detach()[counted] > 0.5).sum()),
            "mixture": float((found.prior_mixture * (1 - found.prior_nothing)).detach()[counted].sum()),
        } | {f"loss_{name}": value for name, value in parts.scalars().items()}

    def _useful(self, piece: Piece, counted: Tensor) -> Tensor | None:
        if not self.useful:
            return None
        target = torch.full(counted.shape, torch.nan)
        for row, (document, start, n) in enumerate(zip(piece.documents, piece.start, piece.length, strict=True)):
            if document in self.useful:
                known = self.useful[document][start : start + n]
                target[row, : len(known)] = known
        return target.to(counted.device)

    def _measure_credit(self) -> None:
        """Credit of every measured document under the recall learnt so far; a function of weights and documents
        alone.
        """
        if not isinstance(self.documents, HiddenStateCache) or not self.options.credit_documents:
            self.useful = {-1: torch.zeros(0)}  # nothing is known of any document
            return
        documents = self.documents
        self.model.eval()
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(self.options.seed)).tolist()
        chosen = order[: self.options.credit_documents]
        for number in track(
            chosen, "measuring credit (documents)", console=self.console, disable=not self.console.is_terminal
        ):
            credit = measure_credit(self.model.hippocampus, documents[number])
            self.useful[number] = useful(credit, self.model.config.target_tagged_share)
        self._learning()

    @torch.no_grad()
    def _choose_anchors(self) -> None:
        """Drift anchors from the training text itself, spread over the documents."""
        calibrator = self.model.hippocampus.drift_calibrator
        count, length = calibrator.anchor_ids.shape
        documents = self.documents
        long = [i for i in range(len(documents)) if _length(documents, i) >= 4 * length]
        if not long:
            return  # texts too short to cut probes from: the pseudo-random ones stay
        anchors = []
        for number in range(count):
            document = long[number % len(long)]
            start = (number * 7919) % (_length(documents, document) - length)
            ids = documents[document]
            ids = ids if isinstance(ids, Tensor) else ids.tokens
            anchors.append(ids[start : start + length].to(torch.int32))
        calibrator.set_anchors(torch.stack(anchors))

    # ---------------------------------------------------------------- evaluation, logs, checkpoints

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Perplexity of the held-out documents, each from an empty memory: of the base, and with the memory."""
        assert self.evaluation is not None
        was_training = self.model.training
        self.model.eval()
        with self._phase():
            scores = list(score_cached(self.model, self.evaluation))
        if was_training:
            self._learning()
        tokens = max(sum(score.tokens for score in scores), 1)
        base = math.exp(sum(score.base_nll for score in scores) / tokens)
        fused = math.exp(sum(score.nll for score in scores) / tokens)
        return {"eval_base_perplexity": base, "eval_perplexity": fused, "eval_gain": 1 - fused / base}

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _log(self, window: list[dict[str, float]], tokens_per_second: float) -> None:
        total = {name: sum(w.get(name, 0.0) for w in window) for name in window[-1]}
        n, pieces = max(total["tokens"], 1.0), total["pieces"]
        numbers = {name: total[name] / pieces for name in total if name.startswith("loss_")}
        numbers |= {
            "perplexity": math.exp(total["nll"] / n),
            "base_perplexity": math.exp(total["base_nll"] / n),
            "salience_mean": total["salience"] / n,
            "tagged_share": total["tagged"] / n,
            "recall_use": total["mixture"] / n,
            "grad_norm": total["grad_norm"] / len(window),
            "learning_rate": self.scheduler.get_last_lr()[0],
            "epoch": self.streams.epoch,
            "tokens_per_second": tokens_per_second,
            "buffer_use": self.reader.bound / max(self.model.config.buffer_size, 1),
        }
        if self.model.config.use_lora:
            numbers["drift"] = self.drift.update(
                self.model.anchors(self.model.hippocampus.drift_calibrator.anchor_ids)[0]
            )
        if not math.isnan(r_score := self.r_score.compute()):
            numbers |= {"consolidation_r": r_score, "consolidation_r_target": self.model.config.consolidation_r_target}
            self.r_score = ConsolidationRScore()
        self._record(numbers)

    def _record(self, numbers: dict[str, float]) -> None:
        self.history.append({"step": float(self.step)} | numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.console.print(f"step {self.step}/{self.options.max_steps}  {shown}", highlight=False)
        if self.options.report_to:
            self.accelerator.log(numbers, step=self.step)

    def _save(self) -> None:
        tensors = checkpoints.optimizer_tensors(self.optimizer)
        tensors |= {f"reader.{name}": tensor for name, tensor in self.reader.state().items()}
        tensors |= {f"useful.{number}": target for number, target in self.useful.items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.drift.reference is not None:
            tensors["drift.reference"] = self.drift.reference
        counters: dict[str, Any] = {
            "step": self.step,
            "streams": self.streams.state(),
            "bound": self.reader.bound,
            "scheduler": self.scheduler.state_dict(),
            "history": self.history,
        }
        checkpoints.save(
            self.options.output_dir, self.step, self.model, tensors, counters, self.options.keep_checkpoints
        )

    def _resume(self, path: Path) -> None:
        model, tensors, counters = checkpoints.load(path)
        checkpoint.restore(self.model, model)
        base = checkpoints.locate(path) / checkpoint.BASE
        if base.is_dir():
            self.model.base.load_state_dict(load_base_model(str(base), dtype=self.model.dtype).state_dict())
        checkpoints.restore_optimizer(self.optimizer, tensors)
        reader = {
            n.removeprefix("reader."): t.to(self.model.device) for n, t in tensors.items() if n.startswith("reader.")
        }
        self.reader.restore(reader, counters["bound"])
        self.useful = {int(n.removeprefix("useful.")): t for n, t in tensors.items() if n.startswith("useful.")}
        self.drift.reference = tensors.get("drift.reference")
        torch.set_rng_state(tensors["random.cpu"])
        self.streams.restore(counters["streams"])
        self.scheduler.load_state_dict(counters["scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.step, self.history = counters["step"], counters["history"]


def _parameter_groups(model: HippoFormer) -> list[dict[str, Any]]:
    """The original's two learning rates (memory; base x 0.1), and one for the scalars and vectors among the memory's
    parameters: scales, biases and thresholds must travel far, are few, and are not decayed."""
    config, memory = model.config, [p for p in model.hippocampus.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in memory if p.dim() > 1], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in memory if p.dim() <= 1], "lr": _SCALAR_RATE * config.learning_rate, "weight_decay": 0.0},
        {
            "params": [p for p in model.base.parameters() if p.requires_grad],
            "lr": 0.1 * config.learning_rate,
            "weight_decay": config.weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def _length(documents: HiddenStateCache | Sequence[Tensor], number: int) -> int:
    return documents.lengths[number] if isinstance(documents, HiddenStateCache) else len(documents[number])
