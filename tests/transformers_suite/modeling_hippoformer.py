"""transformers' own tests of a model, over a tiny HippoFormer: `make test-transformers`.

The tests come from the source distribution of transformers, unpacked under TRANSFORMERS_TESTS (a folder that holds
test_modeling_common.py); nothing of them is kept here. The distribution leaves out the tests of `generate`; where the
folder is that of a checkout, they run too. What cannot apply is skipped with its reason: see docs/support.md.
"""

import importlib
import os
import sys
import tempfile
import types
import unittest
from pathlib import Path

import torch
from torch import Tensor

from hippoformer import HippoFormer, HippoFormerConfig
from tiny import SMALL, VOCAB, tiny_base

FOLDER = Path(os.environ["TRANSFORMERS_TESTS"])


def _mixin(module: str, name: str) -> type:
    """A class of transformers' tests; an empty one where the folder does not hold its module."""
    if not (FOLDER / f"{module.replace('.', '/')}.py").is_file():
        stand_in = types.ModuleType(f"transformers_tests.{module}")
        setattr(stand_in, name, type(name, (), {}))
        sys.modules[stand_in.__name__] = stand_in
    return getattr(importlib.import_module(f"transformers_tests.{module}"), name)


package = types.ModuleType("transformers_tests")
package.__path__ = [str(FOLDER)]
sys.modules["transformers_tests"] = package
_mixin("exporters.test_export", "ExportTesterMixin")
GenerationTesterMixin = _mixin("generation.test_utils", "GenerationTesterMixin")
ModelTesterMixin = _mixin("test_modeling_common", "ModelTesterMixin")


class HippoFormerTester:
    """A tiny HippoFormer that reads inner layers and trains its whole base, and two rows of text."""

    is_training = True
    batch_size, seq_length = 2, 21
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, folder: str) -> None:
        tiny_base().save_pretrained(folder)
        self.folder = folder

    def get_config(self) -> HippoFormerConfig:
        options = SMALL | {"base_model_name": self.folder, "window": 16, "memory_layer": [1, 2], "freeze_base": False}
        return HippoFormerConfig(**options, residual_readout=False)

    def prepare_config_and_inputs_for_common(self) -> tuple[HippoFormerConfig, dict[str, Tensor]]:
        ids = torch.randint(3, VOCAB, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class HippoFormerModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (HippoFormer,)
    is_encoder_decoder = False

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.model_tester = HippoFormerTester(folder.name)
