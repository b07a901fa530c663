"""Break the package one line at a time and check that the named test fails.

    python tests/run_mutations.py                     # all of tests/mutations.yaml
    python tests/run_mutations.py --only recall.py    # those in files whose path ends so

Mutates a copy of `src`. Exits with 1 if a test passes on a mutated package, or fails on the unchanged one.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


def read_mutations(only: str = "") -> list[dict[str, str]]:
    """The mutations in files whose path ends with `only`, each with its `file`."""
    by_file = yaml.safe_load((TESTS / "mutations.yaml").read_text(encoding="utf-8"))
    return [{"file": file, **one} for file, found in by_file.items() if file.endswith(only) for one in found]


def mutate(mutation: dict[str, str], source: Path = ROOT / "src") -> tuple[Path, str]:
    """Path and new text of the file to mutate; raises ValueError unless `old` occurs exactly once."""
    path = source / "hippoformer" / mutation["file"]
    text = path.read_text(encoding="utf-8")
    if (times := text.count(mutation["old"])) != 1:
        raise ValueError(f"{mutation['file']} contains {mutation['old']!r} {times} times, expected once: update it")
    return path, text.replace(mutation["old"], mutation["new"])


def run_tests(tests: set[str], source: Path) -> tuple[int, str]:
    """Exit status and output of pytest on the named tests, with the package under `source`."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += ["-o", f"pythonpath={source} {ROOT} {ROOT / 'scripts'}", *(str(TESTS / test) for test in sorted(tests))]
    environment = os.environ | {"PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description="Break the package on purpose and check that tests fail.")
    parser.add_argument("--only", default="", help="only mutations in files whose path ends with this")
    mutations = read_mutations(parser.parse_args().only)
    status, output = run_tests({mutation["test"] for mutation in mutations}, ROOT / "src")
    if status != 0:
        sys.exit(f"The named tests do not all pass on the unchanged package:\n{output}")
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(shutil.copytree(ROOT / "src", Path(folder) / "src"))
        for mutation in mutations:
            path, text = mutate(mutation, source)
            original = path.read_text(encoding="utf-8")
            path.write_text(text, encoding="utf-8")
            status, output = run_tests({mutation["test"]}, source)
            path.write_text(original, encoding="utf-8")
            outcome = {0: "SURVIVED", 1: "failed as expected"}.get(status, f"PYTEST ERROR {status}\n{output}")
            print(f"{mutation['file']}: {mutation['what']} ({mutation['test']}): {outcome}", flush=True)
            survived += status != 1
    sys.exit(f"{survived} of {len(mutations)} mutations were not noticed" if survived else 0)


if __name__ == "__main__":
    main()
