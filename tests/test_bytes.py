"""Ways to spend bytes on the past: each against a slow reading of the same text, and all on one text."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from evaluation.bytes import run as bytes_run
from evaluation.bytes.kv_selection import SelectedKeys
from evaluation.bytes.other_models import OtherModel, load_other
from evaluation.bytes.run import Options, run
from evaluation.common.causality import check
from evaluation.perplexity import run as perplexity
from hippoformer import HippoFormer
from hippoformer.data import Document
from hippoformer.errors import (
    BaseModelNotFoundError,
    CausalityError,
    ConfigurationError,
    NonFiniteError,
    TextError,
    UnsupportedArchitectureError,
)
from hippoformer.evaluation import encode_all
from tiny import fresh, small_config, text, tiny_base
from tiny_texts import LETTERS, byte_tokenizer, documents, tiny_load, tiny_tokenizer

TEXTS = [*documents(300, 170), Document("empty", "", "made up"), *documents(0, 0, 120)[2:]]
SIZES: dict[str, Any] = {"vocab_size": len(LETTERS) + 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IDS, SHORT = text(1, 61)[0], torch.randint(1, 200, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model of each family in a folder, one of them with a tokenizer of its own, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **(SIZES | {"vocab_size": len(LETTERS) + 3}))
    built = {
        "gpt2": GPT2LMHeadModel(gpt2),
        "llama": LlamaForCausalLM(LlamaConfig(**llama, max_position_embeddings=128, **SIZES)),
        "mamba": MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **SIZES)),
    }
    merging = byte_tokenizer(["<end>"], merges=[("a", "b"), ("c", "d")], bos_token="<end>", eos_token="<end>")
    for name, model in built.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        (merging if name == "gpt2" else tiny_tokenizer()).save_pretrained(root / name)
    adapted = LlamaForCausalLM.from_pretrained(root / "llama")
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(root / "llama")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return {name: str(root / name) for name in (*built, "adapter")}


@torch.no_grad()
def alone(model: Any, ids: Tensor, start: int, token: int) -> float:
    """log p of a token by everything from `start` to the one before it, in one plain call."""
    logits = model(input_ids=ids[None, start:token]).logits[0, -1]
    return float(torch.log_softmax(logits.float(), -1)[ids[token]])


@pytest.mark.parametrize("overlap", [0, 7, 15])
def test_a_window_that_slides_with_overlap(folders: dict[str, str], overlap: int) -> None:
    other, _ = load_other(folders["llama"], 20, overlap)
    expected = []
    for token in range(1, len(IDS)):
        reader, start = token - 1, 0  # the window in which the token before was first read predicts it
        while reader >= start + 20:
            start += 20 - overlap
        expected.append(alone(other.model, IDS, start, token))
    assert other.scores(IDS).tolist() == pytest.approx(expected, abs=1e-4)
    assert other.nbytes == (2 * 2 * 2 * 8 * 20 * 4, 0)  # layers, keys and values, heads of 8, 20 tokens, 4 bytes


@pytest.mark.parametrize("piece", [1, 512])
def test_a_recurrent_state_carries_everything(folders: dict[str, str], piece: int) -> None:
    other, _ = load_other(folders["mamba"])
    other.piece = min(piece, other.piece)
    expected = [alone(other.model, SHORT, 0, token) for token in range(1, 40)]
    assert other.window is None and other.scores(SHORT).tolist() == pytest.approx(expected, abs=1e-4)
    nbytes = other.nbytes
    other.scores(SHORT[:10])
    assert other.nbytes == nbytes and nbytes[0] > 0


def test_all_of_them_look_at_the_past_alone(folders: dict[str, str]) -> None:
    for name, window, overlap in (("gpt2", 16, None), ("llama", 16, 3), ("mamba", None, None)):
        assert check(load_other(folders[name], window, overlap)[0], IDS)["future"] == 0.0
    for method in ("h2o", "snapkv", "random"):
        assert check(SelectedKeys(tiny_base(), small_config(), method, 5), IDS)["future"] == 0.0


def test_figures_are_those_of_the_text(folders: dict[str, str]) -> None:
    model, tokenizer = tiny_load()
    options = Options([64], [16], ["h2o:8"], [folders["gpt2"]], model_window=32)
    result = run(model, tokenizer, TEXTS, options)
    found = {(row.condition, row.metric): row for row in result.rows}
    names = ["hippoformer", "base, window 48", "base, window 64", "hippoformer, buffer 16"]
    names += ["base, window 48 + 8 by h2o", folders["gpt2"]]
    assert list(dict.fromkeys(row.condition for row in result.rows)) == names
    for theirs in perplexity.run(model, tokenizer, TEXTS, perplexity.Options(batch_size=1)).rows:
        name = {"memory": names[0], "off": names[1]}[theirs.condition]
        if theirs.metric in ("bits/byte", "word perplexity", "perplexity", "window, bytes", "memory, bytes"):
            assert found[name, theirs.metric].value == pytest.approx(theirs.value, rel=1e-5), theirs
    bits = result.details["bits/byte"]
    encoded = encode_all(load_other(folders["gpt2"])[1], TEXTS)
    sizes = [document.utf8_bytes for document in encoded]
    together = sum(b * n for b, n in zip(bits[names[5]], sizes, strict=True)) / sum(sizes)
    assert found[names[5], "bits/byte"].value == pytest.approx(together)
    change = 100 * (together / found[names[0], "bits/byte"].value - 1)  # type: ignore[operator]
    assert found[names[5], "bits against hippoformer, %"].value == pytest.approx(change)
    sizes = [found[name, "state, bytes"].value for name in (names[2], names[1])]  # type: ignore[misc]
    assert sizes[0] > sizes[1] and ("hippoformer", "bits against hippoformer, %") not in found
    assert found[names[3], "memory, bytes"].value < found[names[0], "memory, bytes"].value  # type: ignore[operator]


def test_whoever_cheats_or_breaks_is_refused(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_load()
    asked = Options(models=[folders["llama"]], model_window=20)
    with monkeypatch.context() as patch, pytest.raises(CausalityError, match="scores differ"):
        patch.setattr(OtherModel, "scores", lambda self, ids: torch.full((len(ids) - 1,), -0.01))
        run(model, tokenizer, TEXTS, asked)
    with monkeypatch.context() as patch, pytest.raises(NonFiniteError, match="'text 0'"):
        patch.setattr(bytes_run, "check", lambda *of: None)
        patch.setattr(OtherModel, "scores", lambda self, ids: torch.full((len(ids) - 1,), math.nan))
        run(model, tokenizer, TEXTS, asked)
    with pytest.raises(ConfigurationError, match="each of them once"):
        run(model, tokenizer, TEXTS, Options(windows=[64, 64]))
    with pytest.raises(TextError, match="two tokens for everyone"):
        run(model, tokenizer, documents(1), Options())
    with pytest.raises(ConfigurationError, match="METHOD:BUDGET"):
        run(model, tokenizer, TEXTS, Options(kv=["h2o"]))
    for name, window, overlap, message in (("llama", 20, 20, "less overlap"), ("gpt2", 65, 0, "2 to 64 tokens")):
        with pytest.raises(ConfigurationError, match=message):
            load_other(folders[name], window, overlap)
    (Path(folders["adapter"]) / "adapter_model.safetensors").unlink()
    with pytest.raises(BaseModelNotFoundError, match="adapter"):
        load_other(folders["adapter"])


# ------------------------------------------------------------------ selected keys


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt-neox"])
def test_nothing_selected_is_the_window(name: str) -> None:
    base = tiny_base(name)
    base.set_attn_implementation("eager")  # sdpa of transformers 5.3 leaves out Gemma 2's soft capping
    model = HippoFormer(fresh(name).config, base)
    with model.memory_off():
        expected = model.score(IDS.unsqueeze(0))[0]
    for method in ("h2o", "snapkv", "random"):
        selecting = SelectedKeys(model.base, model.config, method, 0)
        assert torch.allclose(selecting.scores(IDS), expected, atol=2e-4)
        logits = torch.log_softmax(selecting.logits(IDS, 5)[:-1], -1).gather(-1, IDS[1:, None]).squeeze(-1)
        assert torch.allclose(logits, expected, atol=2e-4)


@pytest.mark.parametrize("method", ["h2o", "snapkv", "random"])
def test_everything_selected_is_the_whole_text(method: str) -> None:
    base = tiny_base()
    with torch.no_grad():
        expected = base(IDS.unsqueeze(0)).logits[0].log_softmax(-1)[:-1].gather(-1, IDS[1:, None]).squeeze(-1)
    assert torch.allclose(SelectedKeys(base, small_config(), method, 60).scores(IDS), expected, atol=1e-4)
    assert not torch.allclose(SelectedKeys(base, small_config(), method, 8).scores(IDS), expected, atol=1e-2)
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", ["h2o", "snapkv"])
def test_who_is_kept_is_who_was_looked_at(method: str) -> None:
    base, config, budget = tiny_base(), small_config(), 5
    selecting, calls = SelectedKeys(base, config, method, budget), list[tuple[int, int, Tensor]]()
    for number, layer in enumerate(base.model.layers):  # (layer, tokens read before, attention (heads, queries, slots))
        layer.self_attn.register_forward_hook(
            lambda module, args, output, number=number: calls.append((number, selecting.done, output[1][0]))
        )
    selecting.scores(IDS[:54])
    sinks, window, others = config.sink_tokens, config.window, set()
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        slots: list[int] = []
        mass: dict[int, float] = {}
        history: list[dict[int, float]] = []
        for _, done, weights in (call for call in calls if call[0] == layer):
            tokens = list(range(done, done + weights.shape[1]))
            slots = [*slots, *tokens]
            for query in range(len(tokens)):
                votes = {p: float(weights[2 * head : 2 * head + 2, query, s].sum()) for s, p in enumerate(slots)}
                history.append(votes)
                mass |= {position: mass.get(position, 0.0) + vote for position, vote in votes.items()}
            if (leave := len(slots) - sinks - budget - window) <= 0:
                continue
            worth = mass
            if method == "snapkv":
                means = []
                for slot, p in enumerate(slots):
                    saw = [q for q in range(p, done + len(tokens)) if slot < sinks + budget or p > q - window]
                    saw = [q for q in saw if q >= done + len(tokens) - 38][-32:]
                    means.append(sum(history[q].get(p, 0.0) for q in saw) / max(1, len(saw)))
                worth = {p: sum(means[max(0, i - 3) : i + 4]) for i, p in enumerate(slots)}
            best = sorted(slots[sinks : sinks + budget + leave], key=lambda p: -worth[p])[:budget]
            slots = [*slots[:sinks], *sorted(best), *slots[sinks + budget + leave :]]
        assert selecting.origin[layer, head, : sinks + budget].tolist() == slots[: sinks + budget]
        others.add(tuple(slots[: sinks + budget]))
    assert len(others) > 1, "heads choose for themselves"


def test_kept_keys_stand_at_their_new_positions() -> None:
    """The first layer's keys depend on token and position alone; the state does not grow."""
    base = tiny_base()
    selecting = SelectedKeys(base, small_config(), "h2o", 5)
    selecting.scores(IDS[:54])
    used = 2 + 5 + 12
    for head in range(2):
        tokens = IDS[selecting.origin[0, head, :used]]
        cache = base(tokens.unsqueeze(0), use_cache=True).past_key_values
        assert torch.allclose(selecting.cache.layers[0].keys[0, head, :used], cache.layers[0].keys[0, head], atol=1e-5)
    before = selecting.nbytes
    selecting.scores(text(1, 200)[0])
    assert selecting.nbytes == before and before[1] > 0


def test_what_cannot_be_selected() -> None:
    for base, method, budget, message in (
        ("llama", "lru", 5, "h2o, snapkv, random"),
        ("gpt2", "h2o", 5, "learned positions"),
        ("llama", "h2o", 500, "positions"),
    ):
        with pytest.raises((ConfigurationError, UnsupportedArchitectureError), match=message):
            SelectedKeys(tiny_base(base), small_config(), method, budget)
