"""What a user gets who installs the package."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_wheel_installs_one_package_and_the_shipped_weights(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"hippoformer"}
    assert "hippoformer/pretrained/smollm2-135m/model.safetensors" in names


def test_the_originals_command_runs_from_a_checkout() -> None:
    command = [sys.executable, "-m", "evaluation.comprehensive_eval", "--help"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "--checkpoint" in shown
