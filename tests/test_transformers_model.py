"""What tools expect of any model of transformers: hidden states, tuples, names of files, loading, embeddings.

transformers' own tests of a model run too, in a target of their own: `make test-transformers`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

import hippoformer
from hippoformer import HippoFormer, HippoFormerConfig
from hippoformer.errors import CheckpointError, ConfigurationError, InputError
from hippoformer.model.loading import saved_hippocampus, shipped_hippocampus
from tiny import SMALL, VOCAB, awake, text, tiny_base
from tiny_texts import tiny_tokenizer

# ---------------------------------------------------------------- outputs


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_states_are_the_bases_own(name: str) -> None:
    """Within the window and a segment, of every layer, whatever the padding; and of each step's own call alone."""
    model = awake(name, memory_layer=1, window=40, segment_len=40, residual_readout=False)
    ids = text(rows=1, length=20)
    expected = model.base(ids, output_hidden_states=True).hidden_states
    padded, mask = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1), torch.ones(1, 23)
    mask[:, :3] = 0
    got = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(got) == len(expected) == 3
    for mine, theirs in zip(got, expected, strict=True):
        assert not mine[:, :3].any()
        torch.testing.assert_close(mine[:, 3:], theirs)
    assert model(ids).hidden_states is None


@torch.no_grad()
def test_hidden_states_do_not_depend_on_how_the_text_is_cut() -> None:
    model, ids = awake(), text(length=50)
    whole = model(ids, output_hidden_states=True).hidden_states
    cache = model.new_cache(2)
    parts = [model(part, past_key_values=cache, output_hidden_states=True).hidden_states for part in ids.split(7, 1)]
    for layer, states in enumerate(whole):
        torch.testing.assert_close(torch.cat([part[layer] for part in parts], dim=1), states)
    assert cache.hidden_states is None
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_hidden_states": True}
    steps = model.generate(ids, do_sample=False, **options).hidden_states
    assert [step[0].shape[1] for step in steps] == [50, 1, 1, 1]


@torch.no_grad()
def test_tuples_hold_what_the_output_does_and_the_config_decides_where_the_call_says_nothing() -> None:
    model, ids = awake(), text(length=20)
    loss, logits, cache = model(ids, labels=ids, return_dict=False)
    expected = model(ids, labels=ids)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits) and cache.lengths == [20, 20]
    model.config.output_hidden_states, model.config.return_dict = True, False
    output = model(ids)
    assert isinstance(output, tuple) and torch.equal(output[0], logits) and len(output[2]) == 3
    assert model(ids, output_hidden_states=False, return_dict=True).hidden_states is None


def test_what_cannot_be_served_is_refused_by_name() -> None:
    model, ids = awake(), text(rows=1, length=10)
    embedded = model.get_input_embeddings()(ids)
    for given in ({}, {"input_ids": ids}):
        with pytest.raises(InputError, match="does not take inputs_embeds: embeddings name no tokens"):
            model(inputs_embeds=embedded, **given)
    with pytest.raises(InputError, match=r"does not take output_attentions.*model.base\(input_ids"):
        model(ids, output_attentions=True)
    with pytest.raises(InputError, match="no input_ids"):
        model()
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embedded, max_new_tokens=2)


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved HippoFormer on a tiny base in a folder."""
    base = tmp_path / "a-base"
    tiny_base().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    awake(base_model_name=str(base)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@torch.no_grad()
def test_weights_under_the_former_name_load(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:  # where tools look
        assert file.metadata() == {"format": "pt"} and len(file.keys()) > 10
    ids = text(rows=1, length=40)
    expected = HippoFormer.from_pretrained(saved)(ids).logits
    (saved / "model.safetensors").rename(saved / "hippocampus.safetensors")
    assert saved_hippocampus(saved) == saved
    model = HippoFormer.from_pretrained(saved)
    assert torch.equal(model(ids).logits, expected)
    model.save_pretrained(saved)
    assert (saved / "model.safetensors").is_file() and not (saved / "hippocampus.safetensors").exists()


def test_a_base_is_not_taken_for_a_saved_model(saved: Path) -> None:
    """Both have a config.json and a model.safetensors."""
    base = saved.parent / "a-base"
    assert (base / "model.safetensors").is_file()
    assert saved_hippocampus(base) is None and shipped_hippocampus(str(base)) is None
    assert hippoformer.load(base, window=32, segment_len=16)[0].memory == "untrained"
    with pytest.raises(CheckpointError, match=r"not a HippoFormer checkpoint.*hippoformer.load"):
        HippoFormer.from_pretrained(base)


def test_settings_of_generate_come_back(saved: Path) -> None:
    model = HippoFormer.from_pretrained(saved)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.3, max_new_tokens=7)
    model.save_pretrained(saved)
    again = HippoFormer.from_pretrained(saved).generation_config
    assert (again.do_sample, again.temperature, again.max_new_tokens) == (True, 0.3, 7)
    (saved / "generation_config.json").unlink()
    assert HippoFormer.from_pretrained(saved).generation_config.temperature != 0.3, "not the base's own"


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("load", [HippoFormer.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_loading_info_and_attention(load: Any, saved: Path) -> None:
    model, info = load(pretrained_model_name_or_path=str(saved), output_loading_info=True, attn_implementation="eager")
    assert type(model) is HippoFormer and not any(info.values())
    assert model.config._attn_implementation == model.base.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert model.base.config._attn_implementation == "sdpa"


def test_a_config_and_tensors_make_a_model(saved: Path) -> None:
    model = HippoFormer.from_pretrained(saved)
    again = HippoFormer.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match="do not fit"):
        HippoFormer.from_pretrained(None, config=model.config, state_dict={})
    with pytest.raises(ConfigurationError, match="expected the name of a saved model"):
        HippoFormer.from_pretrained(None)


@torch.no_grad()
def test_made_on_the_meta_device_it_takes_weights_later(saved: Path) -> None:
    config = HippoFormerConfig.from_pretrained(saved)
    with torch.device("meta"):
        empty = HippoFormer(config)
        with pytest.raises(ConfigurationError, match="meta device"):
            HippoFormer.from_pretrained(saved)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    model, ids = HippoFormer.from_pretrained(saved), text(rows=1, length=40)
    empty.to_empty(device="cpu").init_weights()  # makes what no file holds, such as the tables of positions
    fresh = HippoFormer(config, model.base).hippocampus.state_dict()
    buffers = [name for name, _ in empty.hippocampus.named_buffers()]
    assert buffers and all(torch.equal(empty.hippocampus.state_dict()[name], fresh[name]) for name in buffers)
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty(ids).logits, model(ids).logits)


def test_weights_that_are_there_are_never_drawn_again() -> None:
    model = awake(lora={"r": 4})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    model.post_init()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model._no_split_modules == {"LlamaDecoderLayer"}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # newer releases have another name
def test_checkpointing_that_takes_the_cache_away_is_refused() -> None:
    model, ids = awake(freeze_base=False), text(rows=1, length=5)
    with pytest.raises(ConfigurationError, match="checkpoint_layers"):
        model.gradient_checkpointing_enable()
    model.base.gradient_checkpointing_enable()
    model(ids)
    with pytest.raises(ConfigurationError, match="checkpoint_layers"):
        model.train()(ids)


# ---------------------------------------------------------------- embeddings


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_resized_through_the_model(tied: bool) -> None:
    """Old tokens read as before, and new ones can be read."""
    base = tiny_base()
    base.config.tie_word_embeddings = tied
    base.tie_weights()
    model, ids = HippoFormer(HippoFormerConfig(**SMALL), base), text(length=30)
    assert model.config.tie_word_embeddings is tied
    expected = model(ids, output_hidden_states=True).hidden_states[-1]
    assert model.resize_token_embeddings(VOCAB + 10) is model.get_input_embeddings()
    assert model.config.vocab_size == model.vocab_size == base.config.vocab_size == VOCAB + 10
    assert model.get_output_embeddings().weight.shape[0] == VOCAB + 10
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    torch.testing.assert_close(model(ids, output_hidden_states=True).hidden_states[-1], expected)
    for wrapped in (model, HippoFormer(HippoFormerConfig(**SMALL), model.base)):  # resized before it was wrapped, too
        assert torch.isfinite(wrapped(torch.full((2, 3), VOCAB + 9)).logits).all()
        with pytest.raises(InputError, match=str(VOCAB + 10)):
            wrapped(torch.full((2, 3), VOCAB + 10))


def test_embeddings_are_the_bases() -> None:
    model = awake()
    other = torch.nn.Embedding(VOCAB, 32)
    model.set_input_embeddings(other)
    assert model.base.get_input_embeddings() is other is model.get_input_embeddings()
    head = torch.nn.Linear(32, VOCAB, bias=False)
    model.set_output_embeddings(head)
    assert model.base.get_output_embeddings() is head is model.get_output_embeddings()
