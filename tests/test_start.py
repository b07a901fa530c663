"""What a user gets who installs the package: quick imports and help, and auto classes that know the model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hippoformer
from hippoformer.cli import COMMANDS
from tiny import awake, tiny_base

ROOT = Path(__file__).resolve().parents[1]
SOURCE = str(Path(hippoformer.__file__).parents[1])


def run(*words: object, **options: object) -> str:
    line = [str(word) for word in words]
    return subprocess.run(line, check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload]


def fresh_python(program: str, *arguments: str) -> str:
    """What a program prints in a process of its own."""
    return run(sys.executable, "-c", f"import sys; sys.path.insert(0, {SOURCE!r})\n{program}", *arguments)


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
for words in (["demo"], ["ask"], ["chat"], ["memory", "show"]):
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


# ---------------------------------------------------------------- installing


def test_the_wheel_installs_one_package_and_the_shipped_weights(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hippoformer"}
    assert "hippoformer/pretrained/smollm2-135m/model.safetensors" in names


@pytest.mark.slow
@pytest.mark.real
def test_the_base_install_in_an_empty_environment_reads_and_answers(tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    bin_, text = tmp_path / "venv" / "bin", tmp_path / "book.txt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(bin_ / "pip", "install", "torch==2.13.0", ROOT, env=environment)
    installed = run(bin_ / "pip", "list")
    assert not [name for name in ("peft", "datasets", "scipy", "prompt_toolkit", "matplotlib") if name in installed]
    assert "usage: hippoformer" in run(bin_ / "hippoformer", "--help", cwd=tmp_path, env=environment)
    text.write_text("Mrs Lane keeps the key of the boat house.\n\n" + 150 * "It rained, and nobody came.\n")
    asked = (bin_ / "hippoformer", "ask", text, "Who keeps the key?", "--model", "smollm2-135m")
    answer, *passages = run(*asked, cwd=tmp_path, env=environment).splitlines()[1:]
    assert answer and any("Mrs Lane keeps the key" in line for line in passages)


def test_the_originals_command_runs_from_a_checkout() -> None:
    assert "--checkpoint" in run(sys.executable, "-m", "evaluation.comprehensive_eval", "--help", cwd=ROOT)
