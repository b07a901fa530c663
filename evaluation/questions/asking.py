"""Questions put to a model that has read a long text: with memory, without, after rereading, and to the base alone.

Each text is read from an empty memory; then the question is put to copies of the state. Under `reread` the copy first
reads again what is remembered of the question, and the base alone answers. `window N` is the base with full attention
over the start token and the last tokens before the question, N in all. Replies are decoded greedily.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hippoformer.data.questions import Question
from hippoformer.evaluation import reading
from hippoformer.model.rereading import left_padded, reread
from hippoformer.text import start_tokens, token_ids

_GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@dataclass(frozen=True)
class Reply:
    """What was said, as token ids, and its first line; nats: -log p of the first accepted answer, said at once."""

    ids: list[int]
    line: str
    nats: float


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    new_tokens: int,
    batch_size: int = 4,
    reread_tokens: int = 0,
    windows: Sequence[int] = (),
    limit_tokens: int | None = None,
) -> list[dict[str, Reply]]:
    """Condition -> reply, for each question.

    Args:
        new_tokens: of a reply. batch_size: texts read side by side, those of like length.
        reread_tokens: tokens to read again; 0: not under that condition. windows: of the base alone.
        limit_tokens: read the first N tokens of each text.
    """
    start = start_tokens(tokenizer)
    texts = [[*start, *token_ids(tokenizer, one.context)[:limit_tokens]] for one in questions]
    order = sorted(range(len(questions)), key=lambda i: -len(texts[i]))
    replies: list[dict[str, Reply]] = [{} for _ in questions]

    def note(condition: str, chosen: Sequence[int], made: Sequence[list[int]], nats: Sequence[float]) -> None:
        for i, ids, of in zip(chosen, made, nats, strict=True):
            replies[i][condition] = Reply(ids, tokenizer.decode(ids).strip().partition("\n")[0].strip(), of)

    for low in range(0, len(order), batch_size):
        chosen = order[low : low + batch_size]
        prompts = [token_ids(tokenizer, questions[i].prompt) for i in chosen]
        answers = [token_ids(tokenizer, f" {questions[i].answers[0]}") for i in chosen]
        with reading(model):
            cache = read_texts(model, [texts[i] for i in chosen])
            note("memory", chosen, *_put(model, cache, prompts, answers, new_tokens))
            with model.memory_off():
                note("off", chosen, *_put(model, cache, prompts, answers, new_tokens))
                if reread_tokens:
                    cue = left_padded([token_ids(tokenizer, questions[i].question) for i in chosen], model.device)
                    again = reread(cache, *cue, n_tokens=reread_tokens)
                    note("reread", chosen, *_put(model, again, prompts, answers, new_tokens))
            for window in windows:
                for i, prompt, answer in zip(chosen, prompts, answers, strict=True):
                    held = [*texts[i][: len(start)], *texts[i][len(start) :][-max(1, window - len(start)) :], *prompt]
                    made, nats = _base_alone(model.base, held, answer, new_tokens)
                    note(f"window {window}", [i], [made], [nats])
    return replies


def read_texts(model: Any, texts: Sequence[Sequence[int]]) -> Any:
    """The state after the texts, token ids of each row."""
    ids, mask = left_padded(texts, model.device)
    cache = model.new_cache(len(texts))
    model.score(ids, attention_mask=mask, past_key_values=cache)
    return cache


def continued(model: Any, cache: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The likeliest next tokens of each row after its prompt, one after the other; `cache` goes on."""
    cache.new_turn()
    ids, mask = left_padded(prompts, model.device)
    made = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new_tokens, **_GREEDY)
    return made[:, ids.shape[1] :].tolist()


def _put(
    model: Any, cache: Any, prompts: list[list[int]], answers: list[list[int]], new_tokens: int
) -> tuple[list[list[int]], list[float]]:
    """Replies and -log p of the answers, to copies of the state."""
    ids, mask = left_padded([[*p, *a] for p, a in zip(prompts, answers, strict=True)], model.device)
    log_probs = model.score(ids, attention_mask=mask, past_key_values=cache.copy())
    nats = [-float(row[-len(answer) :].double().sum()) for row, answer in zip(log_probs, answers, strict=True)]
    return continued(model, cache.copy(), prompts, new_tokens), nats


def _base_alone(base: Any, prompt: list[int], answer: list[int], new_tokens: int) -> tuple[list[int], float]:
    ids = torch.tensor([[*prompt, *answer]], device=base.device)
    asked = ids[:, : len(prompt)]
    said = base.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=new_tokens, **_GREEDY)
    log_probs = base(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    nats = -log_probs.gather(-1, ids[0, len(prompt) :, None]).double().sum()
    return said[0, len(prompt) :].tolist(), float(nats)
