"""A bare `import hippoformer` and every `--help` are quick, and yet transformers knows the model."""

import subprocess
import sys
from pathlib import Path

import pytest

import hippoformer
from hippoformer.cli import COMMANDS
from tiny import awake, tiny_base

SOURCE = str(Path(hippoformer.__file__).parents[1])


def fresh_python(program: str, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {SOURCE!r})\n{program}", *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=600).stdout


def test_importing_takes_no_longer_than_transformers() -> None:
    program = """
import time
start = time.process_time()
import hippoformer
middle = time.process_time()
assert not {"torch", "transformers"} & sys.modules.keys(), "imported too early"
import transformers
assert middle - start < 0.5 + time.process_time() - middle
"""
    fresh_python(program)


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = """
from hippoformer.cli import main
assert main(["--help"]) == main([]) == 0
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""
    shown = fresh_python(program)
    assert all(f"  {name} " in shown for name in COMMANDS)


def test_help_of_a_command_does_not_wait_for_torch() -> None:
    """Unless the parser of transformers does, as in the first releases of transformers 5."""
    parser = fresh_python("import transformers.hf_argparser; print('torch' in sys.modules)")
    program = """
from hippoformer.cli import main
for words in (["demo"], ["ask"], ["chat"], ["memory", "show"], ["eval"]):
    try:
        main([*words, "--help"])
    except SystemExit as error:
        assert error.code == 0, words
print("torch" in sys.modules)
"""
    shown = fresh_python(program)
    assert shown.splitlines()[-1] == parser.strip() and "--buffer-size" in shown


@pytest.mark.parametrize("first", ["hippoformer", pytest.param("transformers", marks=pytest.mark.slow)])
def test_auto_classes_know_the_model_after_a_bare_import(first: str, tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    awake(base_model_name=str(tmp_path / "base"), buffer_size=17).save_pretrained(tmp_path / "saved")
    imports = ["import hippoformer", "from transformers import AutoConfig, AutoModelForCausalLM"]
    program = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is hippoformer.HippoFormer
assert type(AutoConfig.from_pretrained(sys.argv[1])) is hippoformer.HippoFormerConfig
print(model.config.buffer_size)
"""
    order = imports if first == "hippoformer" else imports[::-1]
    assert fresh_python("\n".join(order) + program, str(tmp_path / "saved")).split() == ["17"]


def test_every_name_of_the_package_is_there() -> None:
    for name in hippoformer.__all__:
        assert getattr(hippoformer, name) is not None and name in dir(hippoformer)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hippoformer.no_such_name
