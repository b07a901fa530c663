"""Bases that were loaded otherwise, or changed after they were wrapped: they work, or an error names the cause."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hippoformer import HippoCache, HippoFormer
from hippoformer.errors import ConfigurationError, InputError, MemoryFileError, UnsupportedArchitectureError
from hippoformer.model import memory_file
from tiny import VOCAB, after, awake, read_in_chunks, same_state, small_config, state_of, text, tiny_base

# peft asks transformers 5.23 for a name that is going.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MARGINALS = {"unigram_weight": 0.5, "residual_readout": False}
WITH_NEW = torch.tensor([[5, VOCAB + 2, 7, VOCAB, 5, VOCAB + 2, 7, VOCAB, 11]])


def resize(model: HippoFormer, size: int) -> None:
    model.base.resize_token_embeddings(size, mean_resizing=False)


def written(model: HippoFormer, ids: torch.Tensor, path: Path) -> HippoCache:
    """The state after a text, saved."""
    cache = after(model, ids)
    cache.save(path)
    return cache


def assert_saved(cache: HippoCache, path: Path, reader: HippoFormer) -> None:
    """The file holds the cache, bit for bit."""
    assert not same_state(state_of(cache), state_of(HippoCache.load(path, reader)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory.safetensors"


# ---------------------------------------------------------------- resized embeddings


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_a_base_that_is_resized_after_wrapping(name: str, path: Path) -> None:
    """Is what a base that was resized before would be, for old text and new tokens; and its memories are saved."""
    torch.manual_seed(0)
    model = awake(name, **MARGINALS)
    resize(model, VOCAB + 3)
    before = tiny_base(name)
    before.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    before.load_state_dict(model.base.state_dict())
    other = HippoFormer(small_config(**MARGINALS), before)
    names = ("recall.word_of_token", "recall.ending_of_token", "drift_calibrator.anchor_ids")
    of_vocabulary = {name: other.hippocampus.state_dict()[name] for name in names}
    other.hippocampus.load_state_dict(awake(name, **MARGINALS).hippocampus.state_dict() | of_vocabulary)
    ids = torch.cat((text(1, 40), WITH_NEW), dim=1)
    assert torch.equal(model(ids).logits, other(ids).logits) and torch.equal(model.score(ids), other.score(ids))
    assert model(ids).logits.shape[-1] == model.config.vocab_size == VOCAB + 3
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, ids.shape[1] + 3)
    assert_saved(written(model, ids, path), path, model)
    model.save_pretrained(path.parent / "model")
    again = HippoFormer.from_pretrained(path.parent / "model", base_model=before)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", [VOCAB + 3, VOCAB - 1])
@torch.no_grad()
def test_a_checkpoint_from_before_a_resize(size: int, tmp_path: Path) -> None:
    """Nothing that was learnt hangs on the number of tokens."""
    model, ids = awake(), text(2, 50).clamp_max(VOCAB - 2)
    model.save_pretrained(tmp_path)
    resize(model, size)
    with pytest.warns(UserWarning, match=f"vocabulary of 97 tokens, the base has {size}"):
        again = HippoFormer.from_pretrained(tmp_path, base_model=model.base)
    model.save_pretrained(tmp_path)  # before it was called
    late = HippoFormer.from_pretrained(tmp_path, base_model=model.base)
    assert again.config.vocab_size == late.config.vocab_size == size
    assert torch.equal(again(ids).logits, model(ids).logits) and torch.equal(late(ids).logits, model(ids).logits)


@pytest.mark.parametrize("size", [VOCAB + 3, VOCAB - 1])
@torch.no_grad()
def test_a_cache_from_before_a_resize_goes_on(size: int) -> None:
    """As one that was made after it: nothing was known of the new tokens, and the old ones keep their embeddings."""
    ids, ahead = text(2, 50).clamp_max(VOCAB - 2), text(2, 9, seed=3).clamp_max(VOCAB - 2)
    model = awake(**MARGINALS)
    cache = after(model, ids)
    resize(model, size)
    found = model(ahead, past_key_values=cache).logits
    assert found.shape[-1] == cache.memory.unigram.shift.shape[-1] == size
    expected = model(torch.cat((ids, ahead), dim=1)).logits[:, 50:]
    # The base's expectations were of another vocabulary, so unigram counts differ a little.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.2)
    with model.memory_off():
        assert (model(ahead).logits - expected).abs().max() > 1.0, "what was read before does not matter"


@torch.no_grad()
def test_a_cache_that_holds_tokens_which_are_no_more_is_refused() -> None:
    model, ids = awake(), text(2, 50)
    cache = after(model, ids)
    resize(model, 60)
    with pytest.raises(InputError, match=r"resized from 97 to 60 tokens.*resize them back"):
        model(ids.clamp_max(59), past_key_values=cache)
    with pytest.raises(InputError, match="ids 0 to 59"):
        model(ids)
    assert read_in_chunks(model, ids.clamp_max(59), 7).shape[-1] == 60


@pytest.mark.parametrize("size", [VOCAB + 3, VOCAB - 1])
@torch.no_grad()
def test_a_memory_from_before_a_resize(size: int, path: Path) -> None:
    model, ids, ahead = awake(window=60, **MARGINALS), text(2, 40).clamp_max(VOCAB - 2), text(2, 9, seed=3)
    cache = after(model, ids)
    model.hippocampus.drift_calibrator.anchor_ids.clamp_max_(VOCAB - 2)
    cache.save(path)
    resize(model, size)
    loaded = HippoCache.load(path, model)
    found = model(ahead.clamp_max(VOCAB - 2), past_key_values=loaded).logits
    expected = model(ahead.clamp_max(VOCAB - 2), past_key_values=cache).logits
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)
    resize(model, 60)
    with pytest.raises(MemoryFileError, match="vocabulary has 60"):
        HippoCache.load(path, model)


# ---------------------------------------------------------------- offloaded weights

DEVICE_MAP = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}


def offloaded(model: HippoFormer, how: str, folder: Path) -> HippoFormer:
    """The same model over a base whose weights accelerate keeps elsewhere: all of it, or a layer and the head."""
    if how == "cpu":
        base = cpu_offload(tiny_base(), execution_device=torch.device("cpu"))
    else:
        base = dispatch_model(tiny_base(), DEVICE_MAP, main_device="cpu", offload_dir=folder, force_hooks=True)
    other = HippoFormer(model.config, base)
    other.hippocampus.load_state_dict(model.hippocampus.state_dict())
    assert any(parameter.is_meta for parameter in other.base.parameters())
    return other


@pytest.mark.parametrize("how", ["cpu", "disk"])
@torch.no_grad()
def test_a_memory_of_an_offloaded_base_is_that_of_the_same_weights_in_memory(how: str, path: Path) -> None:
    model, ids, ahead = awake(), text(2, 47), text(2, 9, seed=3)
    other = offloaded(model, how, path.parent / "weights")
    assert other.device.type == "cpu"
    for writer, reader in ((other, model), (model, other)):
        cache = written(writer, ids, path)
        loaded = HippoCache.load(path, reader)
        assert loaded.drift == {"keys": 0.0, "values": 0.0, "calibrated": False}
        assert not same_state(state_of(cache), state_of(loaded))
        assert torch.equal(writer(ahead, past_key_values=cache).logits, reader(ahead, past_key_values=loaded).logits)
    assert any(parameter.is_meta for parameter in other.base.parameters()), "the weights were fetched for good"
    other.save_pretrained(path.parent / "model")
    again = HippoFormer.from_pretrained(path.parent / "model", base_model=tiny_base())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_base_without_weights_is_refused_by_its_cause() -> None:
    base = tiny_base()
    base.model.layers[1].to("meta")
    with pytest.raises(ConfigurationError, match=r"model.layers.1.*meta device.*load them"):
        HippoFormer(small_config(), base)


# ---------------------------------------------------------------- what cannot be computed


@pytest.mark.parametrize("broken", ["fingerprint", "anchors", "both"])
@torch.no_grad()
def test_a_memory_is_written_whatever_else_fails(broken: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read by what is known: bit for bit by the same model, by the anchors, or with a warning that nothing is."""
    model, stranger = awake(window=60), awake(model_seed=11, window=60)
    cache = after(model, text(2, 47))

    def fails(*_: object) -> None:
        raise NotImplementedError("no kernel for this weight")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="no kernel for this weight"):
        if broken != "anchors":
            patch.setattr(memory_file, "base_fingerprint", fails)
        if broken != "fingerprint":
            patch.setattr(HippoFormer, "anchors", fails)
        cache.save(path)
    if broken == "both":
        with pytest.warns(UserWarning, match="nothing says whether"):
            loaded = HippoCache.load(path, model)
    else:
        loaded = HippoCache.load(path, model)
        assert loaded.drift["keys"] == 0.0
        with pytest.raises(MemoryFileError, match="no anchors" if broken == "anchors" else "unrelated"):
            HippoCache.load(path, stranger)
    if broken == "anchors":
        assert not same_state(state_of(cache), state_of(loaded))
    assert not same_state(cache.memory.episodes.tensors(), loaded.memory.episodes.tensors())
    found, expected = (model(text(2, 9, seed=3), past_key_values=state).logits for state in (loaded, cache))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)


# ---------------------------------------------------------------- adapters of peft


def adapted(base: PreTrainedModel, *names: str, size: float = 0.3) -> PeftModel:
    """With LoRA adapters away from zero; the first is active."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def test_a_peft_model_is_read_with_its_adapters(path: Path) -> None:
    peft_model, ids = adapted(tiny_base(), "poet"), text(2, 40)
    expected = torch.log_softmax(peft_model(ids).logits, dim=-1)
    model = HippoFormer(small_config(window=60), peft_model)
    model.hippocampus.fusion.strength.zero_()
    torch.testing.assert_close(model(ids).logits, expected, rtol=0.0, atol=1e-4)
    assert not any(p.requires_grad for p in model.base.parameters())
    with peft_model.disable_adapter():
        assert (model(ids).logits - expected).abs().max() > 0.1, "the adapters do nothing"
    assert_saved(written(model, ids, path), path, model)


@torch.no_grad()
def test_switching_adapters_under_a_live_cache_is_noticed(path: Path) -> None:
    peft_model, ids, ahead = adapted(tiny_base(), "poet", "clerk", size=0.12), text(2, 40), text(2, 9, seed=3)
    torch.manual_seed(0)
    model = HippoFormer(small_config(window=60), peft_model)
    model.hippocampus.fusion.strength.zero_()
    cache = written(model, ids, path)
    expected = model(ahead, past_key_values=cache.copy()).logits
    peft_model.set_adapter("clerk")
    with pytest.raises(InputError, match=r"read with adapters \['poet'\], now active are \['clerk'\].*save"):
        model(ahead, past_key_values=cache)
    with peft_model.disable_adapter(), pytest.raises(InputError, match=r"now active are \[\]"):
        model.score(ahead, past_key_values=cache)
    by_clerk = model(torch.cat((ids, ahead), dim=1)).logits[:, 40:]
    assert (by_clerk - expected).abs().max() > 0.1
    loaded = HippoCache.load(path, model)  # all weights are the same, and yet another model
    assert loaded.drift["keys"] > 0
    torch.testing.assert_close(model(ahead, past_key_values=loaded).logits, by_clerk, rtol=0.0, atol=1e-4)
    with pytest.warns(UserWarning, match="cannot say by which model"):
        cache.save(path)
    with pytest.warns(UserWarning, match="nothing says whether"):
        late = HippoCache.load(path, model)
    torch.testing.assert_close(model(ahead, past_key_values=late).logits, by_clerk, rtol=0.0, atol=1e-4)
    peft_model.set_adapter("poet")
    assert torch.equal(model(ahead, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_adapters_that_a_base_came_with_are_not_lost_without_a_word(tmp_path: Path) -> None:
    model, ids = HippoFormer(small_config(), adapted(tiny_base(), "poet")), text(2, 40)
    with pytest.warns(UserWarning, match=r"adapters \['poet'\] are not saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"over a base with adapters \['poet'\].*PeftModel.from_pretrained"):
        HippoFormer.from_pretrained(tmp_path, base_model=tiny_base())
    again = HippoFormer.from_pretrained(tmp_path, base_model=adapted(tiny_base(), "poet"))
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("options", [{"lora": {"r": 4}}, {"freeze_base": False}])
def test_adapters_of_two_origins_are_refused(options: dict[str, bool]) -> None:
    with pytest.raises(ConfigurationError, match=r"adapters \['poet'\] of its own.*merge_and_unload"):
        HippoFormer(small_config(**options), adapted(tiny_base(), "poet"))


def test_a_learned_prompt_is_refused_by_its_cause() -> None:
    prompt = get_peft_model(tiny_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedArchitectureError, match=r"PROMPT_TUNING.*learned prompt") as error:
        HippoFormer(small_config(), prompt)
    assert "Supported are decoders" not in str(error.value)


# ---------------------------------------------------------------- quantised weights


class Int8Weight(torch.Tensor):
    """A weight of int8 and a scale for each row, which can only be multiplied with: made of tensors, as torchao's."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> "Int8Weight":
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, operation: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if operation is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"Int8Weight cannot do {operation}")

    @classmethod
    def __torch_function__(cls, function: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if function is torch.nn.functional.linear:
            weight = args[1]
            return function(args[0], weight.numbers * weight.scale, *args[2:])
        return super().__torch_function__(function, types, args, kwargs or {})


class CoarseLinear(nn.Module):
    """int8 weights in a buffer, and activations rounded by one scale for the batch: rows depend on each other."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(0, dtype=torch.int8))
        self.weight, self.scale = _int8(layer.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scale = hidden.abs().max() / 127
        return nn.functional.linear((hidden / scale).round() * scale, self.weight * self.scale)


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return (weight.detach() / scale).round().to(torch.int8), scale


def quantised(how: str) -> PreTrainedModel:
    base = tiny_base()
    for name, layer in list(base.model.layers.named_modules()):
        if isinstance(layer, nn.Linear) and how == "weights":
            layer.weight = nn.Parameter(Int8Weight(*_int8(layer.weight)), requires_grad=False)
        elif isinstance(layer, nn.Linear):
            base.model.layers.set_submodule(name, CoarseLinear(layer))
    return base


@pytest.mark.parametrize("how", ["weights", "weights and activations"])
@torch.no_grad()
def test_a_quantised_base_is_read_within_its_own_noise(how: str, path: Path) -> None:
    base, ids = quantised(how), text(2, 40)
    model = HippoFormer(small_config(window=60), base)
    model.hippocampus.fusion.strength.zero_()
    expected = torch.log_softmax(base(ids).logits, dim=-1)
    alone = torch.cat([torch.log_softmax(base(row[None]).logits, dim=-1) for row in ids])
    noise = float((alone - expected).norm() / expected.norm())
    assert (noise > 1e-3) == (how != "weights"), "the noise is not that of the activations"
    assert (model(ids).logits - expected).norm() / expected.norm() < max(4 * noise, 1e-4)
    same = HippoFormer(model.config, quantised(how))
    same.hippocampus.load_state_dict(model.hippocampus.state_dict())
    assert_saved(written(model, ids, path), path, same)
    weight = same.base.model.layers[0].mlp.up_proj.weight
    (weight.numbers if isinstance(weight, Int8Weight) else weight).neg_()
    assert memory_file.fingerprint(same)["base"] != memory_file.fingerprint(model)["base"]


def test_a_base_that_is_further_from_itself_than_rounding_is_refused() -> None:
    """One that mixes its rows has noise of its own too."""
    base = tiny_base()
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out + out.mean(0, keepdim=True))
    with pytest.raises(UnsupportedArchitectureError, match="through a window it computes other numbers"):
        HippoFormer(small_config(), base)


def test_a_base_that_does_not_run_is_refused_by_its_own_error() -> None:
    base = tiny_base()
    base.model.layers[0].mlp.half()
    with pytest.raises(ConfigurationError, match=r"does not run by itself.*dtype") as error:
        HippoFormer(small_config(), base)
    assert "Supported are decoders" not in str(error.value)


# ---------------------------------------------------------------- another dtype

CONVERSIONS = {
    "half": (HippoFormer.half, torch.float16),
    "bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "double": (HippoFormer.double, torch.float64),
    "there and back": (lambda model: model.half().float(), torch.float32),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@torch.no_grad()
def test_a_model_in_another_dtype_is_its_hippocampus_over_the_base_in_that_dtype(how: str, path: Path) -> None:
    convert, dtype = CONVERSIONS[how]
    options = {"unigram_weight": 0.5, "residual_readout": False, "memory_layer": 1}
    model, ids = convert(awake(**options)), text(2, 50)
    other = HippoFormer(small_config(**options), copy.deepcopy(model.base))  # its rotary table is rounded too
    other.hippocampus.load_state_dict(awake(**options).hippocampus.state_dict())
    assert model.dtype == dtype
    assert {p.dtype for p in model.hippocampus.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert torch.equal(model.score(ids), other.score(ids))
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 53)
    assert_saved(written(model, ids, path), path, model)


@torch.no_grad()
def test_another_dtype_under_a_live_cache_is_refused_and_a_loaded_one_goes_on(path: Path) -> None:
    model, ids, ahead = awake(window=60), text(2, 40), text(2, 9, seed=3)
    cache = written(model, ids, path)
    model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"read in torch.float32, the model is now in torch.bfloat16.*save"):
        model(ahead, past_key_values=cache)
    expected = model(torch.cat((ids, ahead), dim=1)).logits[:, 40:]
    loaded = HippoCache.load(path, model)
    with pytest.warns(UserWarning, match="cannot say by which model"):
        cache.save(path)
    with pytest.warns(UserWarning, match="nothing says whether"):
        late = HippoCache.load(path, model)
    for state in (loaded, late):
        new = {name: t.dtype for name, t in model.new_cache(2).tensors().items()}
        assert {name: t.dtype for name, t in state.tensors().items() if name in new} == new
        found = model(ahead, past_key_values=state).logits
        torch.testing.assert_close(found, expected, rtol=0.0, atol=2.0)


@torch.no_grad()
def test_another_device_under_a_live_cache_is_refused() -> None:
    model, ids = awake(), text(2, 40)
    cache = after(model, ids)
    cache.tokens = cache.tokens.to("meta")
    with pytest.raises(InputError, match=r"on meta, the model now on cpu.*save"):
        model(ids, past_key_values=cache)
