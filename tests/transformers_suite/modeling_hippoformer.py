"""transformers' own tests of a model, over a tiny HippoFormer: `make test-transformers`.

The tests come from the source distribution of transformers, unpacked under TRANSFORMERS_TESTS (a folder that holds
test_modeling_common.py); nothing of them is kept here. The distribution leaves out the tests of `generate`; where the
folder is that of a checkout, they run too. docs/support.md lists what cannot apply, and is read here.
"""

import importlib
import os
import re
import sys
import tempfile
import types
import unittest
from pathlib import Path

import torch
from torch import Tensor

from hippoformer import HippoCache, HippoFormer, HippoFormerConfig
from tiny import SMALL, VOCAB, tiny_base

FOLDER = Path(os.environ["TRANSFORMERS_TESTS"])
PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
# Rows of the page's table: | `a pattern of names` | the reason |
NOT_APPLICABLE = re.findall(r"^\| `(test_\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def _mixin(module: str, name: str) -> type:
    """A class of transformers' tests; an empty one where the folder does not hold its module."""
    if not (FOLDER / f"{module.replace('.', '/')}.py").is_file():
        stand_in = types.ModuleType(f"tests.{module}")
        setattr(stand_in, name, type(name, (), {}))
        sys.modules[stand_in.__name__] = stand_in
    return getattr(importlib.import_module(f"tests.{module}"), name)


package = types.ModuleType("tests")
package.__path__ = [str(FOLDER)]
sys.modules["tests"] = package
_mixin("exporters.test_export", "ExportTesterMixin")
GenerationTesterMixin = _mixin("generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = _mixin("test_modeling_common", "ModelTesterMixin")


class HippoFormerTester:
    """A tiny HippoFormer that reads inner layers and trains its whole base, and two rows of text."""

    is_training = True
    batch_size, seq_length = 2, 21
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, folder: str) -> None:
        base = tiny_base()
        base.config.tie_word_embeddings = True
        base.tie_weights()
        base.save_pretrained(folder)
        self.folder = folder

    def get_config(self) -> HippoFormerConfig:
        options = SMALL | {"base_model_name": self.folder, "window": 16, "memory_layer": [1, 2], "freeze_base": False}
        config = HippoFormerConfig(**options, residual_readout=False)
        config.use_cache, config.vocab_size = True, VOCAB  # tests ask for them before there is a model
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[HippoFormerConfig, dict[str, Tensor]]:
        ids = torch.randint(3, VOCAB, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class HippoFormerModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (HippoFormer,)
    is_encoder_decoder = test_torch_exportable = False  # torch.export takes no cache of ours

    def setUp(self) -> None:
        for name, reason in NOT_APPLICABLE:
            if self._testMethodName == name:
                self.skipTest(reason)
        # It has them, and does not give them out.
        self.has_attentions = any(word in self._testMethodName for word in ("sdpa", "left_padding"))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.model_tester = HippoFormerTester(folder.name)

    def _prepare_for_class(self, inputs: dict, model_class: type, return_labels: bool = False) -> dict:
        """Labels only go by transformers' own list of causal models."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        return inputs | {"labels": inputs["input_ids"]} if return_labels else inputs

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: HippoCache, seq_length: int, config: HippoFormerConfig
    ) -> None:
        """A window has as many slots as it has, whatever was read."""
        self.assertIsInstance(past_key_values, HippoCache)
        self.assertEqual(past_key_values.batch_size, batch_size)


def test_every_listed_test_exists() -> None:
    missing = [name for name, _ in NOT_APPLICABLE if not hasattr(HippoFormerModelTest, name)]
    assert NOT_APPLICABLE and not missing
