"""The files under cloud/: SkyPilot understands them, and what they run trains, is killed, resumes, and is evaluated.

The parser is SkyPilot's own, which `make test-cloud` installs beside; without it the test says so and is skipped. What
runs on the machine is run here, with the folders of the machine moved into a temporary one.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pages import ROOT, make_readers_folder
from tiny_texts import text

FILES = sorted((ROOT / "cloud").glob("*.yaml"))
TASKS = [path for path in FILES if not path.stem.endswith("_volume")]
SKY_PYTHON = os.environ.get("HIPPOFORMER_SKY_PYTHON")

SMALL = "--dtype float32 --window 12 --buffer_size 16 --max_seq_length 12 --batch_size 2 --credit_documents 2 --set"
SMALL += (
    " segment_len=6 recall_n_heads=2 recall_head_dim=8 recall_value_dim=8 salience_n_heads=2 anchor_len=4 n_anchors=8"
)


def named(path: Path) -> str:
    return path.name


def read(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.skipif(SKY_PYTHON is None, reason="make test-cloud runs it with SkyPilot")
def test_skypilot_understands_every_file() -> None:
    command = [str(SKY_PYTHON), str(ROOT / "tests" / "check_sky.py"), *map(str, FILES)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = {Path(path).name: facts for path, facts in json.loads(finished.stdout).items()}
    spots = {"aws_train.yaml": ["AWS spot"], "runpod_train.yaml": ["RunPod spot"]}
    spots |= {"aws_evaluate.yaml": ["AWS on demand"], "runpod_evaluate.yaml": ["RunPod on demand"]}
    assert {name: facts["resources"] for name, facts in found.items() if facts["kind"] == "task"} == spots
    volume = found["runpod_volume.yaml"]
    for name in spots:
        assert found[name]["mounted"] == ["/runs"], name
        if name.startswith("runpod"):
            assert (found[name]["volumes"], found[name]["zones"]) == ([volume["name"]], [volume["zone"]]), name


@pytest.mark.parametrize("path", TASKS, ids=named)
def test_what_a_file_uses_it_declares(path: Path) -> None:
    task = read(path)
    script = task["setup"] + task["run"]
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    whole = path.read_text(encoding="utf-8").replace("${", "$")
    unused = [name for name in task["envs"] if f"${name}" not in whole]
    assert unused == [] and all(isinstance(value, str) for value in task["envs"].values())
    assert (ROOT / "constraints.txt").is_file() and "-c constraints.txt ." in task["setup"] and task["workdir"] == "."
    # The commands of its head name this file and its own variables.
    head = [line[2:].strip() for line in whole.splitlines() if line.startswith("#     sky")]
    assert any(f"cloud/{path.name}" in line for line in head)
    for line in head:
        words = shlex.split(line)
        assert [word for word in words if word.startswith("cloud/") and not (ROOT / word).is_file()] == []
        given = [words[i + 1].split("=")[0] for i, word in enumerate(words) if word == "--env"]
        assert [name for name in given if name not in task["envs"]] == []


def run(path: Path, folder: Path, **variables: str) -> str:
    """Runs what the machine would run, with its home and its /runs in a folder; what `pip install` would have put there
    is a link to the package of this checkout.
    """
    task = read(path)
    tools = folder / "home" / "hippoformer" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name, arguments in (("python", ""), ("hippoformer", " -m hippoformer")):
        tool = tools / name
        tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n', encoding="utf-8")
        tool.chmod(0o755)
    environment = os.environ | task["envs"] | variables
    environment |= {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    script = task["run"].replace("/runs", str(folder / "volume"))
    finished = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_both_clouds_do_the_same(name: str) -> None:
    one, other = (read(ROOT / "cloud" / f"{cloud}_{name}.yaml") for cloud in ("aws", "runpod"))
    assert {key: one[key] for key in ("name", "workdir", "setup", "run")} == {
        key: other[key] for key in ("name", "workdir", "setup", "run")
    }
    assert one["envs"] == other["envs"] | {"BUCKET": one["envs"]["BUCKET"]}


@pytest.mark.slow
def test_a_run_that_is_started_again_goes_on_and_is_evaluated(tmp_path: Path) -> None:
    make_readers_folder(tmp_path)
    train = {"BASE_MODEL": "my-model", "DATA": "--text my-texts", "RUN": "mine"}
    path = ROOT / "cloud" / "aws_train.yaml"
    often = "--save_steps 2 --logging_steps 1"
    assert "step 1/2" in run(path, tmp_path, OPTIONS=f"--max_steps 2 {often} {SMALL}", **train)
    second = run(path, tmp_path, OPTIONS=f"--max_steps 4 {often} {SMALL}", **train)
    assert "step 3/4" in second and "step 1/4" not in second
    output = tmp_path / "volume" / "mine"
    assert not (output / "hidden_states").exists(), "hidden states are too large for the volume"
    held_out = tmp_path / "dataset"
    held_out.mkdir()
    lines = [json.dumps({"text": text(i, 300)}) for i in range(3)]
    (held_out / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    evaluation = {"DATASET": str(held_out), "DOCUMENTS": "2", "OPTIONS": "--conditions memory,off", "RUN": "mine"}
    run(ROOT / "cloud" / "aws_evaluate.yaml", tmp_path, **evaluation)
    report = json.loads((output / "perplexity.json").read_text(encoding="utf-8"))
    assert set(report["conditions"]) == {"memory", "off"} and len(report["documents"]) == 2
