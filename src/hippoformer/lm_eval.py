"""`python -m hippoformer.lm_eval ...`: lm-evaluation-harness, which then knows `--model hippoformer`.

All options and subcommands are the harness's own. Its class for transformers does what any causal model needs; what a
stream with a memory needs otherwise is here:

    loglikelihood            every request begins with an empty memory; requests that share a context read it once
    loglikelihood_rolling    a document is one stream, with no windows cut: the numbers of `hippoformer eval perplexity`
    generate_until           the prompt is read whole, whatever its length, from an empty memory
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hippoformer.data import Document
from hippoformer.errors import ConfigurationError, HippoFormerError, MissingPackageError
from hippoformer.evaluation import EncodedDocument, encode, reading, score
from hippoformer.model.loading import load
from hippoformer.model.rereading import left_padded

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise MissingPackageError(f"lm-eval is not installed ({error}): pip install 'hippoformer[harness]'") from error

_CONDITIONS = ("memory", "off", "window-only")
_NO_LIMIT = 2**31 - 1  # of what a stream reads
_OF_HARNESS = ("add_bos_token", "enable_thinking", "chat_template_args", "think_end_token", "prefix_token_id")


@register_model("hippoformer")
class HippoFormerLM(HFLM):
    """A HippoFormer as the harness sees it; everything comes from `--model_args`.

    `options` are those of the harness's own class that `_OF_HARNESS` names, and options of `HippoFormerConfig`. With
    prefix_token_id the first token of a rolling document is scored too, also where the tokenizer puts no start.

    Raises:
        ConfigurationError: an unknown condition or dtype, or a batch size that is no number.
    """

    def __init__(
        self, pretrained: str, condition: str = "memory", dtype: str | None = None, device: str | None = None,
        batch_size: int | str = 4, max_batch_size: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if condition not in _CONDITIONS:
            raise ConfigurationError(f"condition={condition} is unknown; choose one of {', '.join(_CONDITIONS)}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ConfigurationError(f"batch_size={batch_size}: expected a number from 1")
        harness = {name: options.pop(name) for name in _OF_HARNESS if name in options}
        if dtype not in (None, "auto"):
            options["dtype"] = getattr(torch, str(dtype), None)
            if not isinstance(options["dtype"], torch.dtype):
                raise ConfigurationError(f"dtype={dtype} is unknown; choose float32, bfloat16 or float16")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, tokenizer = load(pretrained, device=device, **options)
        harness |= {"backend": "causal", "max_length": _NO_LIMIT, "batch_size": int(batch_size)}
        super().__init__(pretrained=model, tokenizer=tokenizer, **harness)
        self.condition, self.name = condition, pretrained

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with reading(self.model), self.model.memory_off() if self.condition == "off" else contextlib.nullcontext():
            yield

    def _new_cache(self, rows: int) -> Any:
        cache = self.model.new_cache(rows)
        cache.freeze_memory(self.condition == "window-only")
        return cache

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Summed log-probability of each document's tokens, read as one stream."""
        encoded = [self._document(request.args[0], number) for number, request in enumerate(requests)]
        found = [0.0] * len(requests)
        with_tokens = [document for document in encoded if document.tokens_scored]
        for scored in score(self.model, with_tokens, (self.condition,), self.batch_size):
            found[scored.document.index] = -scored.nll
            self.cache_hook.add_partial("loglikelihood_rolling", (scored.document.document.text,), -scored.nll)
        return found

    def _document(self, text: str, number: int) -> EncodedDocument:
        encoded = encode(self.tokenizer, Document(f"document {number}", text, "lm-eval"), number)
        prefix = [] if self.custom_prefix_token_id is None else [self.custom_prefix_token_id]
        return replace(encoded, input_ids=torch.cat((torch.tensor(prefix, dtype=torch.int64), encoded.input_ids)))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None, **more: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: summed log-probability, and whether greedy decoding gives it."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        of_context: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, _) in enumerate(requests):
            of_context.setdefault(tuple(context), []).append(number)
        contexts = sorted(of_context, key=len, reverse=True)
        size = override_bs or self.batch_size
        with self._reading():
            for chosen in (contexts[low : low + size] for low in range(0, len(contexts), size)):
                cache = self._new_cache(len(chosen))
                ids, mask = left_padded([list(context) for context in chosen], self.device)
                last = self.model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1).logits
                asked = [(row, number) for row, context in enumerate(chosen) for number in of_context[context]]
                for part in (asked[first : first + size] for first in range(0, len(asked), size)):
                    rows = torch.tensor([row for row, _ in part])
                    targets = [requests[number][2] for _, number in part]
                    scores = self._continuations(targets, last[rows.to(last.device)], cache.select_rows(rows))
                    for (_, number), one in zip(part, scores, strict=True):
                        found[number] = one
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], one)
        return found

    def _continuations(self, targets: list[list[int]], last: Tensor, cache: Any) -> list[tuple[float, bool]]:
        """Scores of R continuations, after contexts whose last distribution is `last` (R, 1, V)."""
        following = last[:, :0]
        if any(len(target) > 1 for target in targets):
            ids, mask = left_padded([target[:-1] for target in targets], self.device)
            following = self.model(ids, attention_mask=mask, past_key_values=cache).logits  # (R, T, V)
        scores = []
        for first, rest, target in zip(last, following, targets, strict=True):
            own, wanted = torch.cat((first, rest[len(rest) + 1 - len(target) :])), torch.tensor(target).to(first.device)
            nats = own.gather(-1, wanted.unsqueeze(-1)).double().sum()
            scores.append((float(nats), bool((own.argmax(-1) == wanted).all())))
        return scores

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        with self._reading():
            cache = self._new_cache(context.shape[0])
            return super()._model_generate(context, max_length, stop, past_key_values=cache, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        config, size = self.model.config, self.model.get_num_total_params()
        own = {"condition": self.condition, "window": config.window, "buffer_size": config.buffer_size}
        return {"model_name": self.name, "model_num_parameters": size, "model_dtype": str(self.model.dtype)} | own


def main(argv: list[str] | None = None) -> int:
    """Runs the harness; 0 on success."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *(sys.argv[1:] if argv is None else argv)]
    cli_evaluate()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HippoFormerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
