"""The files under cloud/: SkyPilot understands them, and what they run trains, is killed, resumes, and is evaluated.

The parser is SkyPilot's own, which `make test-cloud` installs apart; without it its test is skipped. What runs on the
machine is run here, with the folders of the machine moved into a temporary one.
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

from tiny_texts import text, tiny_load

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "cloud").glob("*.yaml"))
SKY_PYTHON = os.environ.get("HIPPOFORMER_SKY_PYTHON")


def read(name: str) -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "cloud" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.mark.skipif(SKY_PYTHON is None, reason="make test-cloud runs it with SkyPilot")
def test_skypilot_understands_every_file() -> None:
    command = [str(SKY_PYTHON), str(ROOT / "tests" / "check_sky.py"), *map(str, FILES)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = {Path(path).stem: facts for path, facts in json.loads(finished.stdout).items()}
    volume = found["runpod_volume"]
    for cloud, shown in (("aws", "AWS"), ("runpod", "RunPod")):
        for task, kind in (("train", "spot"), ("evaluate", "on demand")):
            facts = found[f"{cloud}_{task}"]
            assert (facts["resources"], facts["mounted"]) == ([f"{shown} {kind}"], ["/runs"])
            if cloud == "runpod":
                assert (facts["volumes"], facts["zones"]) == ([volume["name"]], [volume["zone"]])


@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_both_clouds_do_the_same_with_what_they_declare(task: str) -> None:
    one, other = read(f"aws_{task}"), read(f"runpod_{task}")
    shared = ("name", "workdir", "setup", "run")
    assert {key: one[key] for key in shared} == {key: other[key] for key in shared}
    assert one["envs"] == other["envs"] | {"BUCKET": one["envs"]["BUCKET"]}
    assert subprocess.run(["bash", "-n"], input=one["setup"] + one["run"], text=True, check=False).returncode == 0
    used = one["run"] + json.dumps(one["file_mounts"])
    assert [name for name in one["envs"] if f"${name}" not in used.replace("${", "$")] == []


def run(name: str, folder: Path, **variables: str) -> str:
    """Runs what the machine would run, with its home and its /runs in a folder; the programs that pip would install are
    links to this checkout.
    """
    task, tools = read(name), folder / "home" / "hippoformer" / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for program, arguments in (("python", ""), ("hippoformer", " -m hippoformer")):
        (tools / program).write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n', encoding="utf-8"
        )
        (tools / program).chmod(0o755)
    environment = os.environ | task["envs"] | variables | {"HOME": str(folder / "home"), "HF_HOME": str(folder / "hf")}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = task["run"].replace("/runs", str(folder / "volume"))
    finished = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=folder, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr[-3000:]
    return finished.stdout + finished.stderr


@pytest.mark.slow
def test_a_run_that_is_started_again_goes_on_and_is_evaluated(tmp_path: Path) -> None:
    model, tokenizer = tiny_load()
    model.base.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    (tmp_path / "my-texts").mkdir()
    for number in range(3):
        (tmp_path / "my-texts" / f"{number}.txt").write_text(text(number, 900), encoding="utf-8")
    train = {"BASE_MODEL": "my-model", "DATA": "--text my-texts", "RUN": "mine"}
    often = "--save_steps 2 --logging_steps 1 --dtype float32 --window 64 --buffer_size 16 --max_seq_length 256"
    often += " --batch_size 2 --credit_documents 2"
    assert "step 1/2" in run("aws_train", tmp_path, OPTIONS=f"--max_steps 2 {often}", **train)
    second = run("aws_train", tmp_path, OPTIONS=f"--max_steps 4 {often}", **train)
    assert "step 3/4" in second and "step 1/4" not in second
    output = tmp_path / "volume" / "mine"
    assert not (output / "hidden_states").exists(), "hidden states are too large for the volume"
    evaluation = {"DATASET": "my-texts", "DOCUMENTS": "2", "RUN": "mine"}
    run("aws_evaluate", tmp_path, OPTIONS=f"--text {tmp_path / 'my-texts'} --parts perplexity", **evaluation)
    report = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert {row["condition"] for row in report["rows"]} == {"memory", "off", "window-only"}
    assert len(report["evaluations"]["perplexity"]["details"]["documents"]) == 2
