"""The training run: two phases over streamed text, and the gate's lessons between them.

    recall   queries, keys and fusion learn to predict from a store that simply holds the latest, since the gate knows
        nothing yet
    credit   documents are read with room for everything, to see what each episode turns out to be worth; then the gate
        alone learns to foresee it (see `foresight`)
    joint    everything learns under the working capacity and the gate's own selection; the gate learns to foresee
    credit

A step reads `segments_per_step` segments in every row and then steps the optimizer; the state is carried on, the
graph is cut. `accelerate` places the run on its device or devices (see `processes`), scales what half precision needs
scaled, and reports to trackers. A run is a function of its arguments: draws come from the seed, and a resumed run
continues bit for bit.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from hippoformer.errors import ConfigurationError, NonFiniteError
from hippoformer.hippocampus.drift import DriftMonitor
from hippoformer.hippocampus.losses import ConsolidationRScore, HippoFormerLoss
from hippoformer.model.modeling import HippoFormer
from hippoformer.training import layers, processes, resuming, tracking
from hippoformer.training.credit import measure_credit, reconfigured, useful
from hippoformer.training.foresight import teach_foresight
from hippoformer.training.hidden_states import HiddenStateCache, of_like_length
from hippoformer.training.learning_rates import model_parameter_groups
from hippoformer.training.readers import CachedReader, LiveReader, Reader, Reading, score_cached, score_live
from hippoformer.training.streaming import StreamedTexts
from hippoformer.training.streams import Piece, TextStreams
from hippoformer.training.zero import ZeroOptimizer


@dataclass
class TrainingOptions:
    """How to train; what to train is in the model's config.

    Attributes:
        max_steps: optimizer steps of both phases. recall_share: part of them in the recall phase.
        rows: documents side by side, of all processes.
        segments_per_step: segments between optimizer steps, over which gradients flow.
        gradient_accumulation_steps: backward passes between optimizer steps.
        warmup_ratio: part of the steps with a rising learning rate, None for the config's `warmup_steps`; it then falls
            linearly to zero.
        credit_documents: documents whose credit is measured; 0 skips the credit target.
        foresight_passes: over the measured documents, in which the gate alone learns to foresee credit.
        save_steps, logging_steps, eval_steps: 0 for never. keep_checkpoints: complete ones to keep.
        memory_off: the base alone learns, by its own loss; the hippocampus stays as it is.
        seed: of order, initial weights' dropout and replay.
        mixed_precision: "bf16" or "fp16" for autocast, "no", or None for what `accelerate launch` says.
        gradient_checkpointing: compute the live base's layers again on the way back, instead of keeping them.
        torch_compile: a backend of torch.compile for the live base's layers, "inductor" as a rule.
        report_to, run_name, project: trackers of accelerate, and what the run is called there.
    """

    output_dir: Path
    max_steps: int = 800
    recall_share: float = 0.65
    rows: int = 4
    segments_per_step: int = 2
    gradient_accumulation_steps: int = 1
    warmup_ratio: float | None = 0.05
    credit_documents: int = 128
    foresight_passes: int = 6
    save_steps: int = 100
    logging_steps: int = 10
    eval_steps: int = 0
    keep_checkpoints: int = 2
    memory_off: bool = False
    seed: int = 42
    mixed_precision: str | None = None
    gradient_checkpointing: bool = False
    torch_compile: str | None = None
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None
    project: str = "hippoformer"

    def accelerator(self) -> Accelerator:
        """What places a run with these options."""
        return processes.new_accelerator(
            self.report_to, str(self.output_dir), self.gradient_accumulation_steps, self.mixed_precision
        )


class Trainer:
    """One training run.

    Args:
        model: trained in place. options: see there.
        documents: a `HiddenStateCache` for a frozen base; token ids (T,) per document, or `StreamedTexts`, to run the
            base itself.
        evaluation: held-out documents, cached or token ids, or None.
        accelerator: of the process, made of the options where it is None.
        answers: number of a document -> where its answer begins, for those of which no more than that is to be learned.

    Raises:
        ConfigurationError: cached hidden states with a base that itself trains, or whose layers recall changes; rows
            that the processes cannot divide; memory off over a frozen base.
    """

    def __init__(
        self,
        model: HippoFormer,
        options: TrainingOptions,
        documents: HiddenStateCache | Sequence[Tensor] | StreamedTexts,
        evaluation: HiddenStateCache | Sequence[Tensor] | None = None,
        accelerator: Accelerator | None = None,
        answers: Mapping[int, int] | None = None,
    ) -> None:
        config = model.config
        if isinstance(documents, HiddenStateCache) and (config.use_lora or not config.freeze_base):
            raise ConfigurationError("cached hidden states need a frozen base: set use_lora=False and freeze_base=True")
        if isinstance(documents, HiddenStateCache) and config.memory_layers != (-1,) and config.residual_readout:
            raise ConfigurationError(
                f"what a residual at layer {config.memory_layer} does to the layers above it cannot be cached: set "
                "residual_readout=False, or memory_layer=-1"
            )
        if options.memory_off and config.freeze_base and not config.use_lora:
            raise ConfigurationError("with the memory off a frozen base leaves nothing to train: set use_lora=True")
        torch.manual_seed(options.seed)
        self.model, self.options, self.documents, self.evaluation = model, options, documents, evaluation
        self.answers = answers or {}
        self.accelerator = accelerator or options.accelerator()
        self.own = processes.own_rows(options.rows, self.accelerator)
        model.to(self.accelerator.device)
        if options.memory_off:
            model.hippocampus.requires_grad_(False)
        else:
            self._choose_anchors()
        if not isinstance(documents, HiddenStateCache):
            if options.torch_compile:
                layers.compile_layers(model, options.torch_compile)
            if options.gradient_checkpointing:
                layers.checkpoint_layers(model)
        self.reader: Reader
        self.streams: TextStreams | StreamedTexts
        if isinstance(documents, HiddenStateCache):
            self.reader = CachedReader(model, documents, len(self.own))
        else:
            self.reader = LiveReader(model, documents, len(self.own))
        if isinstance(documents, StreamedTexts):
            self.streams = documents
        else:
            lengths = [_length(documents, number) for number in range(len(documents))]
            self.streams = TextStreams(lengths, options.rows, config.segment_len, options.seed)
        self.loss = HippoFormerLoss(config)
        self.optimizer: Any = torch.optim.AdamW(model_parameter_groups(model))
        ratio = options.warmup_ratio
        warmup = config.warmup_steps if ratio is None else math.ceil(ratio * options.max_steps)
        self.scheduler = get_linear_schedule_with_warmup(self.optimizer, warmup, options.max_steps)
        self.drift = DriftMonitor(config.drift_update_momentum)
        self.useful: dict[int, Tensor] = {}
        self.r_score = ConsolidationRScore()
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        self.work: Any = processes.Work(model)
        self._anchors: Tensor | None = None

    @property
    def recall_steps(self) -> int:
        """Optimizer steps of the first phase."""
        return round(self.options.recall_share * self.options.max_steps)

    def train(self, resume_from: Path | None = None) -> list[dict[str, float]]:
        """Runs to the end; returns what was logged.

        Raises:
            NonFiniteError: the loss became NaN or infinite; the last checkpoint is untouched.
            CheckpointError: `resume_from` has no whole checkpoint, or not one of this run.
        """
        if resume_from is not None:
            resuming.restore_weights(self, resume_from)
        self.work, self.optimizer = processes.prepared(self.work, self.optimizer, self.accelerator, len(self.own))
        torch.manual_seed(self.options.seed + self.accelerator.process_index)
        if resume_from is not None:
            resuming.restore_run(self, resume_from)
        if self.options.report_to:
            tracking.start(self.accelerator, self.options.project, self.options.run_name, self.model.config)
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
        return self.history

    def save_model(self, folder: Path) -> None:
        """Writes the model for `HippoFormer.from_pretrained`; every process must call it, the main one writes."""
        main = self.accelerator.is_main_process
        self.model.save_pretrained(folder, is_main_process=main, state_dict=resuming.weights(self))
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Ends what trackers and processes hold open."""
        self.accelerator.end_training()

    def _learning(self) -> None:
        """Training mode; a frozen base stays in evaluation mode, as its hidden states are those of inference."""
        self.model.train()
        if not any(p.requires_grad for p in self.model.base.parameters()):
            self.model.base.eval()

    # ---------------------------------------------------------------- one step

    def _optimize(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        passes = self.accelerator.gradient_accumulation_steps
        for _ in range(passes):
            with self.accelerator.accumulate(self.work), self._phase():
                total, numbers = self.work(self._read)
                if not torch.isfinite(total):
                    raise NonFiniteError(f"the loss is {total.item()} at step {self.step}: lower the learning rate")
                self.accelerator.backward(processes.scaled(total, self.accelerator))
            self.reader.cut()
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
        processes.average_unsharded(self.model, self.accelerator)
        norm = processes.clipped(self.work, self.accelerator, self.model.config.max_grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            raise NonFiniteError(f"the gradients are {norm} at step {self.step}: lower the learning rate")
        self.optimizer.step()
        skipped = self.optimizer.step_was_skipped  # because of an overflow in float16; the scale is lower now
        if not skipped:
            self.scheduler.step()
        self.optimizer.zero_grad()
        pieces = float(passes * self.options.segments_per_step)
        return sums | {"grad_norm": 0.0 if skipped else norm, "skipped": float(skipped), "pieces": pieces}

    def _read(self) -> tuple[Tensor, dict[str, float]]:
        """The loss of the next pieces of all rows, and what is logged of them."""
        losses = []
        sums: dict[str, float] = {}
        for _ in range(self.options.segments_per_step):
            piece = self.streams.next()
            own = piece if isinstance(self.streams, StreamedTexts) else piece.of_rows(self.own)
            reading = processes.of_all_rows(self.reader.read(own), self.accelerator, self.model.config.segment_len)
            loss, numbers = self._loss(piece, reading)
            losses.append(loss)
            for name, value in numbers.items():
                sums[name] = sums.get(name, 0.0) + value
        return torch.stack(losses).mean(), sums

    def _phase(self):  # type: ignore[no-untyped-def]
        if self.options.memory_off:
            return self.model.memory_off()
        if self.step < self.recall_steps:
            return reconfigured(self.model.hippocampus, selection="fifo")
        # All priorities together act like the null slot's opposite, and the next-token loss would rather lower that: it
        # tags nothing. Where credit is known it is the gate's only teacher.
        return reconfigured(self.model.hippocampus, credit_only_gate=any(number >= 0 for number in self.useful))

    def _loss(self, piece: Piece, reading: Reading) -> tuple[Tensor, dict[str, float]]:
        found, counted = reading.found, reading.counted
        learned = counted & self._learned(piece, counted)
        n = int(learned.sum())
        numbers = {
            "tokens": int(counted.sum()),
            "learned": n,
            "nll": -float(reading.target_log_prob.detach()[learned].sum()),
            "base_nll": -float(reading.base_log_prob.detach()[learned].sum()),
        }
        if found is None:
            loss = -torch.where(learned, reading.target_log_prob, 0.0).sum() / max(n, 1)
            return loss, numbers | {"loss_lm": float(loss.detach())}
        target = self._useful(piece, counted)
        parts = self.loss(
            reading.target_log_prob,
            counted,
            found.salience,
            found.forecast,
            found.importance,
            found.prior_nothing,
            target,
            learned,
        )
        if target is not None:
            self.r_score.update(found.salience, target, counted & ~target.isnan())
        total = parts.total if self.step >= self.recall_steps else parts.lm
        return total, numbers | {
            "salience": float(found.salience.detach()[counted].sum()),
            "tagged": float((found.salience.detach()[counted] > 0.5).sum()),
            "mixture": float((found.prior_mixture * (1 - found.prior_nothing)).detach()[counted].sum()),
        } | {f"loss_{name}": value for name, value in parts.scalars().items()}

    def _learned(self, piece: Piece, counted: Tensor) -> Tensor:
        """(R, N) bool, all tokens but those before an answer."""
        first = [self.answers.get(document, 0) for document in piece.documents]
        before = torch.tensor([a - s for a, s in zip(first, piece.start, strict=True)], device=counted.device)
        return torch.arange(counted.shape[1], device=counted.device) >= before.unsqueeze(-1)

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
        chosen = processes.share_of(order[: self.options.credit_documents], self.accelerator)

        def measure() -> dict[int, Tensor]:
            found: dict[int, Tensor] = {}
            groups = of_like_length(chosen, documents.lengths, self.options.rows)
            told = "measuring credit (groups of documents)"
            for group in track(groups, told, console=self.console, disable=not self.console.is_terminal):
                credits = measure_credit(self.model.hippocampus, [documents[number] for number in group])
                found |= {number: useful(credit) for number, credit in zip(group, credits, strict=True)}
            return found

        with torch.no_grad():
            self.useful = processes.collected(self.work(measure), self.accelerator)
        self._learning()
        hippocampus, passes = self.model.hippocampus, self.options.foresight_passes
        if passes and self.useful:
            learning = copy.deepcopy(hippocampus)  # an engine would look at the gradients of its own weights
            loss = teach_foresight(
                learning, documents, self.useful, passes, self.model.config.learning_rate, self.options.seed
            )
            hippocampus.load_state_dict(learning.state_dict())
            if isinstance(self.optimizer, ZeroOptimizer):
                self.optimizer.refresh()
            self.console.print(f"the gate alone, {passes} passes: loss_credit {loss:.4f}", highlight=False)

    @torch.no_grad()
    def _choose_anchors(self) -> None:
        """Drift anchors from the training text itself, spread over the documents."""
        calibrator = self.model.hippocampus.drift_calibrator
        count, length = calibrator.anchor_ids.shape
        documents = self.documents.texts() if isinstance(self.documents, StreamedTexts) else self.documents
        long = [i for i in range(len(documents)) if _length(documents, i) >= 4 * length]
        if long:  # else the pseudo-random ones stay
            anchors = []
            for number in range(count):
                document = long[number % len(long)]
                start = (number * 7919) % (_length(documents, document) - length)
                ids = documents[document]
                ids = ids if isinstance(ids, Tensor) else ids.tokens
                anchors.append(ids[start : start + length].to(torch.int32))
            calibrator.set_anchors(torch.stack(anchors))
        if isinstance(self.documents, StreamedTexts):  # every process has others in hand
            calibrator.set_anchors(broadcast(calibrator.anchor_ids))

    # ---------------------------------------------------------------- evaluation, logs, checkpoints

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Perplexity of the held-out documents, each from an empty memory: of the base, and with the memory."""
        documents = self.evaluation
        assert documents is not None
        was_training = self.model.training
        self.model.eval()
        cached, everything = isinstance(documents, HiddenStateCache), list(range(len(documents)))
        # Processes that share one base in pieces must all read the same.
        divided = cached or not processes.is_sharded(self.accelerator)
        chosen = processes.share_of(everything, self.accelerator) if divided else everything
        with self._phase():
            if isinstance(documents, HiddenStateCache):
                scores = self.work(lambda: score_cached(self.model, documents, chosen, self.options.rows))
            else:
                scores = self.work(lambda: list(score_live(self.model, documents, chosen)))
        if was_training:
            self._learning()
        sums = [float(sum(getattr(score, name) for score in scores)) for name in ("tokens", "nll", "base_nll")]
        tokens, nll, base_nll = processes.summed(sums, self.accelerator) if divided else sums
        base, fused = (math.exp(total / max(tokens, 1.0)) for total in (base_nll, nll))
        return {"eval_base_perplexity": base, "eval_perplexity": fused, "eval_gain": 1 - fused / base}

    def _due(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _log(self, window: list[dict[str, float]], tokens_per_second: float) -> None:
        numbers = tracking.means(window) | {
            "learning_rate": self.scheduler.get_last_lr()[0],
            "epoch": self.streams.epoch,
            "tokens_per_second": tokens_per_second,
            "buffer_use": self._buffer_use(),
            "drift": self.drift.update(self.work(self._anchor_keys)),
        }
        if not math.isnan(r_score := self.r_score.compute()):
            numbers |= {"consolidation_r": r_score, "consolidation_r_target": self.model.config.consolidation_r_target}
            self.r_score = ConsolidationRScore()
        self._record(numbers)

    def _buffer_use(self) -> float:
        stored = self.reader.memory.episodes.slots(0, self.model.config.buffer_size).valid
        filled, places = processes.summed([float(stored.sum()), float(stored.numel())], self.accelerator)
        return filled / max(places, 1.0)

    @torch.no_grad()
    def _anchor_keys(self) -> Tensor:
        """(A L, K) how the anchors are encoded now; a frozen base reads them once."""
        hippocampus = self.model.hippocampus
        if self._anchors is None or any(p.requires_grad for p in self.model.base.parameters()):
            self._anchors = self.model.window.hidden_of(hippocampus.drift_calibrator.anchor_ids.long())
        normed = hippocampus.normed(self._anchors.to(hippocampus.recall.key_proj.weight.dtype))
        return hippocampus.recall.encode_key(normed).flatten(0, 1).float()

    def _record(self, numbers: dict[str, float]) -> None:
        self.history.append({"step": float(self.step)} | numbers)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.console.print(f"step {self.step}/{self.options.max_steps}  {shown}", highlight=False)
        if self.options.report_to:
            self.accelerator.log(numbers, step=self.step)

    def _save(self) -> None:
        resuming.save(self)


def _length(documents: HiddenStateCache | Sequence[Tensor], number: int) -> int:
    return documents.lengths[number] if isinstance(documents, HiddenStateCache) else len(documents[number])
