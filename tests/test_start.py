"""A bare `import hippoformer` and every `--help` are quick, since they import nothing heavy, and yet transformers knows
the model.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import hippoformer
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
assert not {"torch", "transformers", "rich", "typer"} & sys.modules.keys(), "imported too early"
import transformers
assert middle - start < 0.5 + time.process_time() - middle
"""
    fresh_python(program)


def test_help_imports_neither_torch_nor_transformers() -> None:
    program = """
from hippoformer.cli import app
import typer.main
from typer.testing import CliRunner

def helps(command, *words):
    if "train" in words or "lm-eval" in words:  # their options belong to other parsers
        return
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, words
    print(*words)
    for name, further in getattr(command, "commands", {}).items():
        helps(further, *words, name)

helps(typer.main.get_command(app))
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
"""
    shown = fresh_python(program).splitlines()
    assert "eval perplexity" in shown and "chat" in shown and len(shown) > 15


def test_help_of_training_does_not_wait_for_torch() -> None:
    """Unless the parser of transformers does, as in the first releases of transformers 5."""
    parser = fresh_python("import transformers.hf_argparser; print('torch' in sys.modules)")
    program = """
from hippoformer.cli import app
from typer.testing import CliRunner
result = CliRunner().invoke(app, ["train", "--help"])
assert result.exit_code == 0 and "--max_steps" in result.output, result.output
print("torch" in sys.modules)
"""
    assert fresh_python(program) == parser


@pytest.mark.parametrize("first", ["hippoformer", pytest.param("transformers", marks=pytest.mark.slow)])
def test_auto_classes_know_the_model_after_a_bare_import(first: str, tmp_path: Path) -> None:
    tiny_base().save_pretrained(tmp_path / "base")
    model = awake(base_model_name=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "saved")
    imports = ["import hippoformer", "from transformers import AutoConfig, AutoModelForCausalLM"]
    program = (
        "\n".join(imports if first == "hippoformer" else imports[::-1])
        + """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model) is hippoformer.HippoFormer
assert type(AutoConfig.from_pretrained(sys.argv[1])) is hippoformer.HippoFormerConfig
print(model.config.buffer_size)
"""
    )
    assert fresh_python(program, str(tmp_path / "saved")).split() == [str(model.config.buffer_size)]


def test_every_name_of_the_package_is_there() -> None:
    for name in hippoformer.__all__:
        assert getattr(hippoformer, name) is not None and name in dir(hippoformer)
    assert hippoformer.DifferentiablePriorityBuffer is hippoformer.Episodes
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hippoformer.no_such_name
