"""`scripts/ablations.py`: its commands are those of the package; means over seeds, paired with those of `shipped`."""

import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from hippoformer import HippoFormerConfig, cli
from hippoformer.training.arguments import config_options, parse
from script_files import load_script, script_at

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"dtype": "bfloat16", "window": 512, "buffer_size": 2048}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return script_at("ablations", tmp_path, monkeypatch)


def test_every_variant_is_a_command_of_the_package(script: ModuleType) -> None:
    evaluations: Any = get_command(cli.app).commands["eval"]
    assert len({variant.name for variant in script.VARIANTS}) == len(script.VARIANTS)
    for variant in script.VARIANTS:
        run = script.Run(variant, 2)
        command, *words = run.training()
        arguments = parse(words)
        assert command == "train" and arguments.seed == 2 and Path(arguments.output_dir) == run.folder
        HippoFormerConfig(**config_options(arguments.set))
        for report in (*run.reports().values(), script.recall([run, script.Run(script.VARIANTS[0], 2)])):
            known = {option for p in evaluations.commands[report[1]].params for option in p.opts}
            assert {word for word in report if word.startswith("--")} <= known


def report(script: ModuleType, run: Any, nats: list[float], right: list[bool]) -> None:
    """The three reports of a run, with the numbers that count."""
    shared = {"model": MODEL, "settings": {}, "provenance": {"commit": "abc", "dirty": False, "seed": 0}}
    variant = {"name": "trained", "options": {}, "nll": nats, "memory_nbytes": 7}
    perplexity = {"documents": ["a", "b"], "tokens": [10, 10], "base_nll": [30.0, 30.0], "base_perplexity": 20.0}
    asked = [{"right": one, "asked_distance": 2000} for one in right]
    contents = {
        "novels": {"format": "hippoformer.variants/1", **perplexity, "variants": [variant]},
        "articles": {"format": "hippoformer.variants/1", **perplexity, "variants": [variant]},
        "recall": {"format": "hippoformer.recall_variants/1", "variants": [{"asked": asked}]},
    }
    for name, content in contents.items():
        path = script.ROOT / run.report(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(shared | content))


def test_seeds_are_averaged_and_paired(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variants = {variant.name: variant for variant in script.VARIANTS}
    (tmp_path / "results").mkdir()
    runs = [script.Run(variants[name], seed) for name in ("shipped", "fifo") for seed in (1, 2, 3)]
    for run in runs[:5]:  # the third seed of fifo is not there yet, and so does not count
        worse = 2.0 if run.variant.name == "fifo" else 0.0
        nats = [20.0 + worse + run.seed, 22.0 + worse]
        report(script, run, nats, [True, run.seed > 1, run.variant.name == "shipped"])
    script.collect(runs)
    novels = json.loads((tmp_path / "results" / "retrained_novels.json").read_text())
    shipped, fifo = novels["variants"]
    made = novels["provenance"]["runs"]
    assert sorted(made) == ["fifo-1", "fifo-2", "shipped-1", "shipped-2", "shipped-3"]
    assert made["fifo-2"] == {"commit": "abc", "cpu": None, "gpu": None}
    assert (shipped["name"], fifo["name"]) == ("shipped, 3 seeds", "fifo, 2 seeds")
    assert shipped["nll"] == pytest.approx([22.0, 22.0]) and fifo["nll"] == pytest.approx([23.5, 24.0])
    assert fifo["against"]["ratio"]["estimate"] == pytest.approx(2.718281828 ** (4.0 / 20))
    assert fifo["ratio_of_each_seed"] == pytest.approx([2.718281828 ** (4.0 / 20)] * 2)
    answers = json.loads((tmp_path / "results" / "retrained_recall.json").read_text())["variants"]
    assert answers[0]["right"]["2000"]["estimate"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert answers[1]["against"]["2000"]["estimate"] == pytest.approx(-1 / 3)
    rendered = load_script("readme_results")
    tables = rendered.render(rendered.read_results(tmp_path / "results"), (rendered.VARIANTS, rendered.RECALL_VARIANTS))
    assert "fifo, 2 seeds" in tables and "; seeds +22.14, +22.14 |" in tables
    assert "| -33 [" in tables, tables


def test_what_is_measured_is_not_made_again(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fails = True
    lines: list[list[str]] = []

    def run(line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
        lines.append(line[3:])
        if "recall-variants" in line and not fails:
            asked = [{"name": name, "asked": []} for name in ("fifo-1", "no-gate-1")]
            (tmp_path / line[-1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / line[-1]).write_text(json.dumps({"reference": "fifo-1", "variants": asked}))
        return subprocess.CompletedProcess(line, int(fails and "recall-variants" in line))

    monkeypatch.setattr(subprocess, "run", run)
    collected: list[list[Any]] = []
    monkeypatch.setattr(script, "collect", lambda runs: collected.append(list(runs)))
    variants = {variant.name: variant for variant in script.VARIANTS}
    done, missing, other = (script.Run(variants[name], 1) for name in ("shipped", "fifo", "no-gate"))
    report(script, done, [1.0, 1.0], [True])
    names = [run.variant.name for run in (done, missing, other)]
    assert script.main(["--list", "--seeds", "1", "--only", *names]) == 0
    said = capsys.readouterr().out
    assert f"measured {done.folder}" in said and f"missing  {missing.folder}" in said and not lines
    assert script.main(["--seeds", "1", "--only", *names]) == 1, "the last command fails"
    assert [len(runs) for runs in collected] == [len(script.VARIANTS) * 3] * 2, "a table after every run"
    made = [["train", "--text"], ["eval", "variants"], ["eval", "variants"]]
    assert [line[:2] for line in lines] == [*made, *made, *made, ["eval", "recall-variants"]], (
        "all layers are read first"
    )
    assert not any(str(done.folder) in word for line in lines for word in line)
    fails = False
    (tmp_path / other.folder).mkdir(parents=True)
    script.ask([done, missing, other])
    assert f"no-gate-1={other.folder}" in lines[-1] and lines[-1] == [*script.recall([missing, other]), *lines[-1][-2:]]
    told = json.loads((tmp_path / other.report("recall")).read_text())
    assert told == {"reference": "no-gate-1", "variants": [{"name": "no-gate-1", "asked": []}]}
    count = len(lines)
    script.ask([done, missing, other])
    assert len(lines) == count, "nobody is asked twice"


def test_one_reading_serves_runs_whose_base_predicts_alike(script: ModuleType) -> None:
    runs = [script.Run(variant, 1) for variant in script.VARIANTS]
    without, with_marginals = script.read_alike(runs)
    assert [run.variant.name for run in with_marginals] == ["marginals"] and len(without) == len(runs) - 1
    assert script.read_alike([]) == []
