"""What a DeepSpeed configuration may say and what is filled in; test_processes.py runs it.

None of this needs DeepSpeed itself, accelerate reads the file; but an accelerate as new as DeepSpeed needs here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import compare_versions
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from hippoformer.errors import ConfigurationError
from hippoformer.training import processes, zero

pytestmark = pytest.mark.skipif(compare_versions("accelerate", "<", "1.15.0"), reason="an older accelerate")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what `accelerate launch --config_file configs/deepspeed.yaml` gives each process."""
    monkeypatch.chdir(ROOT)
    words = ["--config_file", "configs/deepspeed.yaml", "--main_process_port", "0", "-m", "hippoformer.train"]
    launched: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.deepspeed_launcher", launched.append)
    launch_command(launch_command_parser().parse_args(words))
    for name, value in prepare_deepspeed_cmd_env(launched[0])[1].items():
        if name.startswith("ACCELERATE"):
            monkeypatch.setenv(name, value)


def config_of(**section: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}} | section


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def write(config: dict[str, Any]) -> None:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps(config), encoding="utf-8")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))

    return write


def test_the_configuration_in_the_repository_is_filled_in() -> None:
    assert zero.asked_for()
    config = zero.plugin(3, "bf16").deepspeed_config
    zero.complete(config, rows=2, processes=4, max_grad_norm=0.5)
    assert config["zero_optimization"]["stage"] == 2
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == (3, 0.5)
    assert (config["train_micro_batch_size_per_gpu"], config["train_batch_size"]) == (2, 24)
    assert not config["bf16"]["enabled"] and not config["fp16"]["enabled"], "weights would not stay in float32"
    assert config["torch_autocast"]["enabled"] and config["torch_autocast"]["dtype"] == "bfloat16"


def test_the_command_line_decides_about_precision() -> None:
    assert not zero.plugin(1, "no").deepspeed_config["torch_autocast"]["enabled"]


def test_what_deepspeed_alone_decides_is_left_as_it_is(configured: Any) -> None:
    autocast = {"enabled": True, "dtype": "bfloat16"}
    own = {"stage": 1, "reduce_bucket_size": 12345, "offload_optimizer": {"device": "cpu"}}
    configured(config_of(zero_optimization=own, bf16={"enabled": "auto"}, torch_autocast=autocast))
    config = zero.plugin(1, "bf16").deepspeed_config
    assert config["zero_optimization"] == own and config["torch_autocast"] == autocast
    assert not config["zero_force_ds_cpu_optimizer"], "AdamW would be exchanged for another"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of(zero_optimization={"stage": 3}), "stage 3.*fsdp2.yaml"),
        (config_of(zero_optimization={"stage": 0}), "stage 0.*multi_gpu.yaml"),
        (config_of(optimizer={"type": "AdamW"}), "section optimizer"),
        (config_of(scheduler={"type": "WarmupLR"}), "section scheduler"),
        (
            config_of(gradient_accumulation_steps=4),
            "gradient_accumulation_steps=4, --gradient_accumulation_steps says 2",
        ),
        (config_of(gradient_accumulation_steps="auto", bf16={"enabled": True}), "bf16 with DeepSpeed"),
        (config_of(torch_autocast={"enabled": True, "dtype": "float16"}), "float16 with DeepSpeed"),
        (config_of(zero_force_ds_cpu_optimizer=True), "zero_force_ds_cpu_optimizer=True"),
        ({}, "ZeRO"),
    ],
)
def test_what_contradicts_the_run_is_refused(configured: Any, config: dict[str, Any], message: str) -> None:
    configured(config)
    with pytest.raises(ConfigurationError, match=message):
        zero.plugin(1 if "gradient_accumulation_steps" not in config else 2, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_clipping": 2.0}, "gradient_clipping=2.0.*max_grad_norm says 1.0"),
        ({"train_batch_size": 7}, "train_batch_size=7, --batch_size says 4"),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu=1.*says 2"),
    ],
)
def test_numbers_of_another_run_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        zero.complete({"gradient_accumulation_steps": 1} | given, rows=2, processes=2, max_grad_norm=1.0)


def test_float16_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="float16 with DeepSpeed"):
        zero.plugin(1, "fp16")


def test_weights_that_train_in_half_precision_are_refused() -> None:
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    with pytest.raises(ConfigurationError, match="--dtype float32"):
        zero.prepared(layer, torch.optim.AdamW(layer.parameters()), None)  # type: ignore[arg-type]


def test_a_run_without_deepspeed_that_asked_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ACCELERATE_USE_CPU, with which accelerate would quietly train data parallel."""

    class Engine:
        def __init__(self, **_: object) -> None:
            self.distributed_type = "MULTI_CPU"

    monkeypatch.setattr(processes, "Accelerator", Engine)
    with pytest.raises(ConfigurationError, match="ACCELERATE_USE_CPU"):
        processes.new_accelerator([], "runs", 1, None)
