"""HippoFormer for lm-evaluation-harness: `python -m hippoformer.lm_eval --model hippoformer --model_args pretrained=…`.

The harness's own class for transformers does what any causal model needs (tokens, chat templates, generation). What a
stream with a memory needs otherwise is here:

    loglikelihood            every request begins with an empty memory; requests that share a context read it once
    loglikelihood_rolling    a document is one stream in order, from an empty memory, with no windows cut: exactly what
                             `hippoformer eval perplexity` reads, so the numbers are the same
    generate_until           the prompt is read whole, whatever its length, from an empty memory
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError
from hippoformer.evaluation.scoring import EncodedDocument, batches, encode, reading, score_batch
from hippoformer.model.loading import load

Tokens = tuple[int, ...]
Request = tuple[tuple[str, str], list[int], list[int]]

_CONDITIONS = ("memory", "off", "window-only")
_NO_LIMIT = 2**31 - 1  # of what a stream reads


@register_model("hippoformer")
class HippoFormerLM(HFLM):
    """A HippoFormer as the harness sees it; everything is given through `--model_args`.

    Args:
        pretrained: what `hippoformer.load` takes: a saved HippoFormer or a base model, by folder or name.
        condition: memory; off for the base with the same window; window-only for recall over the window alone.
        dtype, device, batch_size: as everywhere; rows read side by side.
        prefix_token_id: a token to put before every rolling document, so that its first token is scored too. By default
            a document is read as `hippoformer eval perplexity` reads it: with a start token only where the tokenizer
            has one, and without it the first token, which nothing foretells, is not scored.
        max_batch_size, add_bos_token, enable_thinking, chat_template_args, think_end_token: see the harness.
        options: of `HippoFormerConfig`, to change (window, buffer_size, …).

    Raises:
        ConfigurationError: an unknown condition, or a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: str,
        condition: str = "memory",
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 4,
        max_batch_size: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        think_end_token: str | int | None = None,
        **options: Any,
    ) -> None:
        if condition not in _CONDITIONS:
            raise ConfigurationError(f"condition={condition} is unknown; choose one of {', '.join(_CONDITIONS)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigurationError(f"batch_size={batch_size}: expected a number from 1")
        if dtype not in (None, "auto"):
            options["dtype"] = getattr(torch, str(dtype), None)
            if not isinstance(options["dtype"], torch.dtype):
                raise ConfigurationError(f"dtype={dtype} is unknown; choose float32, bfloat16 or float16")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load(pretrained, device=device, **options)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=_NO_LIMIT,
            batch_size=int(batch_size),
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
            think_end_token=think_end_token,
        )
        self.condition = condition
        self.name = pretrained

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        off = self.model.memory_off() if self.condition == "off" else contextlib.nullcontext()
        with reading(self.model), off:
            yield

    def _new_cache(self, rows: int) -> Any:
        cache = self.model.new_cache(rows)
        if self.condition == "window-only":
            cache.freeze_memory()
        return cache

    # ---------------------------------------------------------------- rolling

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Summed log-probability of each document's tokens, read as one stream."""
        encoded = [self._document(request.args[0], number) for number, request in enumerate(requests)]
        found = [0.0] * len(requests)
        scored = [document for document in encoded if document.tokens_scored > 0]
        with reading(self.model), tqdm(total=len(scored), disable=disable_tqdm, desc="reading documents") as bar:
            for batch in batches(scored, self.batch_size):
                nll = score_batch(self.model, self.condition, batch).nll
                for document, loss in zip(batch, nll, strict=True):
                    found[document.index] = -loss
                    self.cache_hook.add_partial("loglikelihood_rolling", (document.document.text,), -loss)
                bar.update(len(batch))
        return found

    def _document(self, text: str, number: int) -> EncodedDocument:
        encoded = encode(self.tokenizer, Document(f"document {number}", text, "lm-eval"), number)
        if self.custom_prefix_token_id is None:
            return encoded
        ids = torch.cat((torch.tensor([self.custom_prefix_token_id]), encoded.input_ids))
        return EncodedDocument(number, encoded.document, ids, 1, len(text.split()), len(text.encode("utf-8")))

    # ---------------------------------------------------------------- context, continuation

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None, **more: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: summed log-probability, and whether greedy decoding says it."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        of_context: dict[Tokens, list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            of_context.setdefault(tuple(context), []).append(number)
        contexts = sorted(of_context, key=len, reverse=True)
        size = override_bs or self.batch_size
        with self._reading(), tqdm(total=len(requests), disable=disable_tqdm, desc="reading requests") as bar:
            for low in range(0, len(contexts), size):
                chosen = contexts[low : low + size]
                cache = self._new_cache(len(chosen))
                ids, mask = self._padded([list(context) for context in chosen], left=True)
                last = self.model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                asked = [(row, number) for row, context in enumerate(chosen) for number in of_context[context]]
                for first in range(0, len(asked), size):
                    part = asked[first : first + size]
                    row = torch.tensor([r for r, _ in part])
                    targets = [requests[number][2] for _, number in part]
                    scores = self._continuations(targets, last[row.to(last.device)], cache.select_rows(row))
                    for (_, number), score in zip(part, scores, strict=True):
                        found[number] = score
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                    bar.update(len(part))
        return found

    def _continuations(self, targets: list[list[int]], last: Tensor, cache: Any) -> list[tuple[float, bool]]:
        """Scores of continuations (R of them), after contexts whose distribution is `last` (R, V)."""
        log_probs = last.unsqueeze(1)  # (R, 1, V)
        if any(len(target) > 1 for target in targets):
            ids, mask = self._padded([target[:-1] for target in targets], left=False)
            following = self.model(ids, attention_mask=mask, past_key_values=cache).logits
            log_probs = torch.cat((log_probs, following), dim=1)  # (R, T, V)
        scores = []
        for row, target in zip(log_probs, targets, strict=True):
            wanted = torch.tensor(target, device=row.device)
            own = row[: len(target)]
            scores.append(
                (
                    float(own.gather(-1, wanted.unsqueeze(-1)).double().sum()),
                    bool((own.argmax(-1) == wanted).all()),
                )
            )
        return scores

    def _padded(self, rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
        """(R, T) ids and mask."""
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(0, len(row))
            ids[number, where], mask[number, where] = torch.tensor(row, dtype=torch.int64), 1
        return ids.to(self.device), mask.to(self.device)

    # ---------------------------------------------------------------- generation, and what reports say

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        with self._reading():
            cache = self._new_cache(context.shape[0])
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        config = self.model.config
        return {
            "model_name": self.name,
            "model_num_parameters": self.model.get_num_total_params(),
            "model_dtype": str(self.model.dtype),
            "condition": self.condition,
            "window": config.window,
            "buffer_size": config.buffer_size,
        }
