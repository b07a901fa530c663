"""The recipes of docs/training.md and docs/lm-eval.md: the tools take every command, and every file is there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from typer.main import get_command

from hippoformer import cli
from hippoformer.errors import ConfigurationError
from hippoformer.training import processes
from hippoformer.training.arguments import parse
from test_processes import SHARDING

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def commands(page: str) -> list[list[str]]:
    """The lines of a page's shell blocks, as words."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line]


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", commands("training.md"), ids=lambda words: " ".join(words)[:70])
def test_every_training_command_is_accepted(command: list[str]) -> None:
    if command[0] == "ACCELERATE_USE_CPU=true":
        command = command[1:]
    if command[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(command[2:])
        assert launch.module and launch.training_script == "hippoformer.train"
        assert Path(launch.config_file) in [file.relative_to(ROOT) for file in CONFIGS]
        rest = launch.training_script_args
    elif command[:2] == ["hippoformer", "export-base"]:
        export: Any = get_command(cli.app).commands["export-base"]  # type: ignore[attr-defined]
        assert set(export.make_context("export-base", command[2:]).params) == {"model", "output"}
        return
    else:
        assert command[:2] == ["hippoformer", "train"]
        rest = command[2:]
    arguments = parse(rest)
    assert arguments.output_dir.startswith("runs/")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_accelerate_reads_the_configurations(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    kinds = {"one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed": "DEEPSPEED"}
    assert config.distributed_type == DistributedType(kinds[file.stem])


@pytest.mark.skipif(not SHARDING, reason="FSDP2 is newer than these versions of torch and accelerate")
def test_the_sharded_configuration_is_the_one_that_works_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch` makes of it for each process."""
    launch = launch_command_parser().parse_args(["--config_file", "configs/fsdp2.yaml", "-m", "hippoformer.train"])
    launch, _, _ = _validate_launch_command(launch)
    for name, value in prepare_multi_gpu_env(launch).items():
        if name.startswith(("FSDP", "ACCELERATE")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading and plugin.reshard_after_forward


def test_another_kind_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        mixed_precision, scaler, log_with, distributed_type = "no", None, (), DistributedType.FSDP

        def __init__(self, **_: object) -> None:
            self.state = self
            self.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1, "cpu_ram_efficient_loading": True})

    monkeypatch.setattr(processes, "Accelerator", Engine)
    with pytest.raises(ConfigurationError, match=r"fsdp2|torch 2.7"):
        processes.new_accelerator([], "runs", 1, None)


def lm_eval_commands() -> Iterator[list[str]]:
    for command in commands("lm-eval.md"):
        if command[0] == "hippoformer" or command[:2] == ["python", "-m"]:
            yield command[2:] if command[0] == "hippoformer" else command[3:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", list(lm_eval_commands()), ids=lambda words: " ".join(words)[:60])
def test_every_lm_eval_command_is_accepted(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval._cli import HarnessCLI

    monkeypatch.setattr("sys.argv", ["lm-eval", *options])
    read = HarnessCLI().parse_args()
    assert read.model == "hippoformer" and read.tasks
