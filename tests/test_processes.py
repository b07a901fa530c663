"""Training in several processes, and in processes that are killed: the same losses, the same weights.

The processes talk through gloo on the CPU. FSDP2 shards and gathers for real; accelerate only has to be told that it
may, since it offers sharding on accelerators alone (`forge.shard_on_cpu`).
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions, is_torch_version
from accelerate.utils.launch import prepare_multi_gpu_env

from hippoformer import HippoFormer
from hippoformer.errors import ConfigurationError
from hippoformer.training import processes
from hippoformer.training.arguments import TrainArguments
from tiny_training import arguments, differing, history

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
Jobs = list[dict[str, Any]]
Forge = Callable[[Jobs], list[int]]


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    """Runs jobs side by side in processes of their own; see forge.py."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(Path(__file__).with_name("forge.py"))]
    process = subprocess.Popen(command, env=ENVIRONMENT | quiet, cwd=ROOT, **pipes)

    def run(jobs: Jobs) -> list[int]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(jobs) + "\n")
        process.stdin.flush()
        codes = json.loads(process.stdout.readline())
        if any(code > 0 for code in codes):
            print(*(Path(job["log"]).read_text() for job in jobs), sep="\n")
        return codes

    with process:
        yield run
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def texts(folder: Path) -> Path:
    """The folder, with texts of several lengths, so that rows end at different times."""
    (folder / "texts").mkdir()
    for i in range(6):
        text = f"number {i} the memory keeps what the window loses. " * (4 + 3 * i)
        (folder / "texts" / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


def alone(texts: Path, output: str, *more: str, **job: Any) -> Jobs:
    argv = arguments(texts, output, "--recall_share", "0", "--logging_steps", "1", *more)
    argv[argv.index(str(texts / "text.txt"))] = str(texts / "texts")
    return [{"argv": argv, "log": str(texts / f"{output}.log"), **job}]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def pair(texts: Path, output: str, *more: str, **job: Any) -> Jobs:
    """Two processes as `accelerate launch` starts them."""
    (one,) = alone(texts, output, *more, **job)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    return [
        one | {"log": str(texts / f"{output}.{rank}.log"), "env": shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}}
        for rank in range(2)
    ]


def losses(texts: Path, output: str) -> list[dict[str, float]]:
    varying = ("tokens_per_second", "consolidation_r", "grad_norm")
    return [{n: value for n, value in entry.items() if n not in varying} for entry in history(texts / output)]


def largest_difference(one: Path, other: Path) -> float:
    a, b = (HippoFormer.from_pretrained(path).state_dict() for path in (one, other))
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


# What each engine needs: FSDP2 is newer than the lowest versions supported.
SHARDING = is_torch_version(">=", "2.7.0") and compare_versions("accelerate", ">=", "1.6.0")
ENGINES: dict[str, dict[str, Any]] = {"DDP": {}, "FSDP2": {"fsdp": True}}
AVAILABLE = [
    "DDP",
    pytest.param(
        "FSDP2",
        marks=(pytest.mark.slow, pytest.mark.skipif(not SHARDING, reason="torch or accelerate without FSDP2")),
    ),
]
LORA = ["--lora_r", "2", "--lora_dropout", "0.0"]  # draws differ between processes
MODES = {"frozen": [], "lora": LORA, "base": ["--train_base", "--gradient_accumulation_steps", "2"]}


@pytest.mark.supports(trainer="{mode}", architecture="llama", mode="two processes, {engine}")
@pytest.mark.parametrize("engine", AVAILABLE)
@pytest.mark.parametrize("mode", ["lora", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("frozen", "base"))])
def test_two_processes_compute_what_one_does(texts: Path, forge: Forge, mode: str, engine: str) -> None:
    """Data parallel and sharded; credit is measured, rows end and begin, and gradients are clipped on the way."""
    more = [*MODES[mode], "--eval_text", str(texts / "text.txt"), "--eval_steps", "8"]
    assert forge([*alone(texts, "one", *more), *pair(texts, "two", *more, **ENGINES[engine])]) == [0, 0, 0]
    expected = losses(texts, "one")
    assert len(expected) == 9 and "eval_perplexity" in expected[-1] and expected[3]["loss_total"] > 0
    if mode == "frozen":
        assert expected[0]["loss_credit"] > 0, "the credit that the processes share out was not measured"
    for got, wanted in zip(losses(texts, "two"), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert largest_difference(texts / "one", texts / "two") < 1e-5
    HippoFormer.from_pretrained(texts / "two")


def test_only_the_main_process_writes_and_talks(texts: Path, forge: Forge) -> None:
    assert forge(pair(texts, "two")) == [0, 0]
    main, other = ((texts / f"two.{rank}.log").read_text() for rank in range(2))
    assert "step 8/8" in main and "step" not in other
    newest = processes.complete(texts / "two")[-1]
    assert sorted(file.name for file in newest.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "process-00000-of-00002.safetensors",
        "process-00001-of-00002.safetensors",
        "training.json",
        "training.safetensors",
    ]


@pytest.mark.slow
@pytest.mark.supports(trainer="lora", architecture="llama", mode="two processes, resumed ({engine})")
@pytest.mark.parametrize("engine", AVAILABLE)
def test_a_checkpoint_of_two_processes_resumes(texts: Path, forge: Forge, engine: str) -> None:
    """On two to the same bits, and on one to the same numbers."""
    more, job = LORA, ENGINES[engine]
    assert forge(pair(texts, "whole", *more, **job)) == [0, 0]
    killed = [{**one, "die": ["step", 6]} for one in pair(texts, "parts", *more, **job)]
    codes = forge(killed)
    assert -signal.SIGKILL in codes and 0 not in codes
    assert [path.name for path in processes.complete(texts / "parts")] == ["checkpoint-00000003"]
    resumed = [*more, "--resume_from_checkpoint", str(texts / "parts" / "checkpoint-00000003")]
    assert forge(alone(texts, "alone", *resumed)) == [0]
    assert forge(pair(texts, "parts", *resumed, **job)) == [0, 0]
    assert differing(texts / "whole", texts / "parts") == []
    assert losses(texts, "whole") == losses(texts, "parts")
    for got, wanted in zip(losses(texts, "alone"), losses(texts, "whole"), strict=True):
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.supports(trainer="base", architecture="llama", mode="killed and resumed")
def test_killed_at_any_moment_a_run_ends_with_the_same_weights(texts: Path, forge: Forge) -> None:
    """SIGKILL before the first checkpoint, in the middle of writing the first or the second, and after it."""
    automatic = ["--save_steps", "3", "--train_base", "--resume_from_checkpoint", "auto"]
    assert forge(alone(texts, "whole", *automatic)) == [0]
    deaths = {("step", 2): 0, ("tensors", 3): 0, ("rename", 7): 1, ("tensors", 5): 1, ("step", 7): 2}
    runs = [f"{where}-{count}" for where, count in deaths]
    jobs = [alone(texts, f"{where}-{count}", *automatic, die=[where, count])[0] for where, count in deaths]
    assert forge(jobs) == [-signal.SIGKILL] * len(deaths)
    assert [len(processes.complete(texts / run)) for run in runs] == list(deaths.values())
    assert forge([alone(texts, run, *automatic)[0] for run in runs]) == [0] * len(deaths)
    for run in runs:
        assert differing(texts / "whole", texts / run) == [], run
        assert not list((texts / run).glob(".checkpoint*")), "what the killed run left behind is still there"


def test_rows_must_divide_evenly() -> None:
    second: Any = SimpleNamespace(num_processes=2, process_index=1)
    assert processes.own_rows(4, second) == range(2, 4)
    with pytest.raises(ConfigurationError, match="batch_size=3"):
        processes.own_rows(3, second)


@pytest.mark.slow
def test_accelerate_launch(texts: Path) -> None:
    """The command of the documentation, two processes on the CPU."""
    (job,) = alone(texts, "launched", "--max_steps", "4")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/multi_gpu.yaml"]
    command += ["--num_processes", "2", "--mixed_precision", "no"]
    command += ["--main_process_port", free_port()]  # accelerate 1.1 does not look for one itself
    command += ["-m", "hippoformer.train", *job["argv"]]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logged = losses(texts, "launched")
    assert len(logged) == 4 and all(math.isfinite(entry["loss_total"]) for entry in logged)
    assert len(list((processes.complete(texts / "launched")[-1]).glob("process-*-of-00002*"))) == 2


# ---------------------------------------------------------------- the files that accelerate launch reads

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_accelerate_reads_the_configurations(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(file))
    kinds = {"one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP"}
    assert config.distributed_type == DistributedType(kinds[file.stem])
    if file.stem == "fsdp2" and SHARDING:  # what accelerate launch makes of it for each process
        launch = launch_command_parser().parse_args(["--config_file", str(file), "-m", "hippoformer.train"])
        for name, value in prepare_multi_gpu_env(_validate_launch_command(launch)[0]).items():
            if name.startswith(("FSDP", "ACCELERATE")):
                monkeypatch.setenv(name, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and not plugin.cpu_ram_efficient_loading and plugin.reshard_after_forward


def test_another_kind_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine:
        mixed_precision, scaler, log_with, distributed_type = "no", None, (), DistributedType.FSDP
        device = torch.device("cpu")

        def __init__(self, **_: object) -> None:
            self.state = self
            self.fsdp_plugin = type("Plugin", (), {"fsdp_version": 1, "cpu_ram_efficient_loading": True})

    monkeypatch.setattr(processes, "Accelerator", Engine)
    with pytest.raises(ConfigurationError, match=r"fsdp2|torch 2.7"):
        processes.new_accelerator(TrainArguments())
