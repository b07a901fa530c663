"""The README tells the truth: its Python prints what it promises, its tree is the tree, its results the files'."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hippoformer
from pages import make_readers_folder, run_page, standing_in
from script_files import load_script
from tiny_texts import tiny_load

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("readme_results")


FOUND = r"perplexity ([\d.]+) with memory, ([\d.]+) without; ([\d,]+) bytes"


def test_the_python_says_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_readers_folder(tmp_path)
    with standing_in(tmp_path):
        assert run_page(ROOT / "README.md") != []
        found = re.search(FOUND, capsys.readouterr().out)
        assert found and found[1] != found[2]
        model, _ = hippoformer.load("smollm2-135m", window=512, buffer_size=2048)
        cache = hippoformer.HippoCache.load(tmp_path / "readme.memory.safetensors", model)
        assert cache.lengths[0] > 1000


@pytest.mark.real
def test_the_python_runs_with_the_real_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "README.md")
    found = re.search(FOUND, capsys.readouterr().out)
    assert found and 5 < float(found[1]) < 100 and 5 < float(found[2]) < 100
    assert (tmp_path / "readme.memory.safetensors").stat().st_size > 1_000_000


def tree_paths() -> list[str]:
    """Every path the tree names: two spaces a level, folders end in a slash."""
    (block,) = re.findall(r"<!-- tree:begin -->\n```\n(.*?)```\n<!-- tree:end -->", README, flags=re.DOTALL)
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        del folders[level:]
        paths.append("".join(folders) + name)
        if name.endswith("/"):
            folders.append(name)
    return paths


def test_the_tree_names_only_what_exists() -> None:
    paths = tree_paths()
    assert len(paths) > 40 and len(set(paths)) == len(paths)
    wrong = [path for path in paths if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())]
    assert wrong == []


def test_the_tree_names_every_module_of_the_package() -> None:
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "src" / "hippoformer").rglob("*.py")}
    assert sorted(modules - set(tree_paths())) == []


def test_every_file_of_the_tree_is_explained() -> None:
    (block,) = re.findall(r"<!-- tree:begin -->\n```\n(.*?)```", README, flags=re.DOTALL)
    bare = [line.split()[0] for line in block.splitlines() if len(line.split()) == 1]
    assert set(bare) <= {
        "src/hippoformer/",
        "training/",
        "evaluation/",
        "benchmarks/",
        "notebooks/",
        "scripts/",
        "docs/",
        "__init__.py",
    }


def test_the_results_are_those_of_the_files(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0, "run python scripts/readme_results.py"


# ---------------------------------------------------------------- the script itself

PROVENANCE = {
    "command": "hippoformer eval | more",
    "commit": "0123456789abcdef",
    "dirty": False,
    "cpu": "Some CPU",
    "cpus": 2,
    "torch_threads": 2,
    "gpu": None,
    "date": "2030-01-02T03:04:05+00:00",
}
MODEL = {"dtype": "bfloat16", "window": 512, "buffer_size": 2048}


def perplexity_report() -> dict[str, Any]:
    memory = {
        "tokens_scored": 12345,
        "token_perplexity": {"estimate": 19.5, "low": 18.25, "high": 21.0},
        "bits_per_byte": 0.98765,
        "window_nbytes": 17_800_000,
        "memory_nbytes": 3_300_000,
        "against_off": {"ratio": {"estimate": 0.925, "low": 0.915, "high": None}},
    }
    off = memory | {"against_off": None, "memory_nbytes": 0, "bits_per_byte": None}
    return {
        "format": "hippoformer.perplexity/1",
        "model": MODEL,
        "conditions": {"memory": memory, "off": off},
        "documents": [{}, {}, {}],
        "provenance": PROVENANCE,
    }


def speed_report() -> dict[str, Any]:
    scoring = {
        "measure": "scoring",
        "unit": "tokens/s",
        "value": 900.0,
        "reference": 1000.0,
        "ratio": 0.9,
        "tokens": 64,
    }
    write = {"measure": "write", "unit": "µs/token", "value": 9.876, "reference": None, "ratio": None, "tokens": 128}
    origin = PROVENANCE | {"dirty": True, "gpu": "Some GPU"}
    return {"format": "hippoformer.speed/1", "settings": MODEL, "results": [scoring, write], "provenance": origin}


def test_rows_say_figures_and_where_they_come_from(script: ModuleType) -> None:
    block = script.render(
        {"wiki.json": perplexity_report(), "speed.json": speed_report(), "other.json": {"format": "?"}},
        (script.PERPLEXITY, script.RECALL, script.SPEED),
    )
    lines = block.splitlines()
    memory = (
        "| [wiki](results/wiki.json) | memory | 3 | 12,345 | 19.50 [18.25, 21.00] | -7.5 % | 0.9877 | 17.8 + 3.3 MB |"
    )
    assert memory in lines
    assert "| [wiki](results/wiki.json) | off | 3 | 12,345 | 19.50 [18.25, 21.00] |  |  | 17.8 + 0.0 MB |" in lines
    assert "| [speed](results/speed.json) | scoring | 900.0 tokens/s | 1,000.0 tokens/s | 0.900 | 64 |" in lines
    assert "| [speed](results/speed.json) | write | 9.88 µs/token |  |  | 128 |" in lines
    assert (
        "| [wiki](results/wiki.json) | `hippoformer eval \\| more` | bfloat16, window 512, buffer 2048 "
        "| Some CPU, 2 CPUs, 2 threads | `0123456789ab` | 2030-01-02 |"
    ) in lines
    assert "Some GPU | `0123456789ab` with uncommitted changes |" in block
    assert "other" not in block


def test_filling_replaces_the_block_and_nothing_else(script: ModuleType) -> None:
    readme = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.fill(readme, "new") == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter\n"
    assert script.fill(script.fill(readme, "new"), "new") == script.fill(readme, "new")
    for broken in ("no markers", readme + script.BEGIN, f"{script.END}\n{script.BEGIN}"):
        with pytest.raises(ValueError, match="once each"):
            script.fill(broken, "new")


def test_the_check_tells_an_old_block_from_a_new_one(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    for file in script.BLOCKS:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{script.BEGIN}\n{script.END}\n", encoding="utf-8")
    arguments = ["--root", str(tmp_path)]
    assert script.main(arguments) == 0
    assert script.EMPTY in readme.read_text(encoding="utf-8")
    results.mkdir()
    (results / "wiki.json").write_text(json.dumps(perplexity_report()), encoding="utf-8")
    assert script.main([*arguments, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert script.EMPTY in readme.read_text(encoding="utf-8")  # checking changes nothing
    assert script.main(arguments) == 0
    assert script.main([*arguments, "--check"]) == 0
    assert "19.50" in readme.read_text(encoding="utf-8")
    card = tmp_path / "src/hippoformer/pretrained/smollm2-135m/README.md"
    assert "](../../../../results/wiki.json)" in card.read_text(encoding="utf-8")


def test_a_report_of_the_package_is_understood(script: ModuleType, tmp_path: Path) -> None:
    """The files as `hippoformer eval` writes them, not as this test imagines them."""
    from hippoformer.data import Document
    from hippoformer.evaluation import evaluate_perplexity
    from hippoformer.evaluation.babilong import BabilongReport, Told
    from hippoformer.evaluation.baselines import contestants
    from hippoformer.evaluation.comparison import compare
    from hippoformer.evaluation.recall import evaluate_recall
    from hippoformer.evaluation.recall_variants import evaluate_recall_variants
    from hippoformer.evaluation.scoring import describe
    from hippoformer.evaluation.variants import evaluate_variants

    model, tokenizer = tiny_load()
    documents = [Document(f"text {i}", "some words come again, " * 20, "made up") for i in range(2)]
    report = evaluate_perplexity(model, tokenizer, documents, conditions=("memory", "off"), resamples=20)
    report.save(tmp_path / "tiny.json")
    recall = evaluate_recall(model, tokenizer, documents, distances=(100,), facts=1)
    recall.save(tmp_path / "recall.json")
    variants = evaluate_variants(
        model, tokenizer, documents, {"gate": {}, "fifo": {"selection": "fifo"}}, tmp_path / "states", resamples=20
    )
    variants.save(tmp_path / "variants.json")
    everybody = contestants(model, tokenizer, windows=[20], buffers=[], selections=[])
    compared = compare(everybody, documents, describe(model), limit_characters=200, seed=0, resamples=20)
    compared.save(tmp_path / "bytes.json")
    two = {"gate": {}, "fifo": {"selection": "fifo"}}
    evaluate_recall_variants(model, tokenizer, documents, two, distances=(100,), facts=1, resamples=20).save(
        tmp_path / "asked.json"
    )
    said, nats = {"memory": "garden", "off": "it"}, {"memory": 0.5, "off": 2.0}
    told = [Told(f"q{i}", "qa1", 4000, 4010, 1.0, 0.5, {"memory": i < 3, "off": False}, said, nats) for i in range(4)]
    settings = {"tasks": ["qa1"], "lengths": [4000]}
    BabilongReport(describe(model), settings, ("memory", "off"), tuple(told), report.provenance).save(
        tmp_path / "hidden.json"
    )
    kinds = (script.PERPLEXITY, script.RECALL, script.VARIANTS, script.RECALL_VARIANTS, script.COMPARISON)
    kinds += (script.BABILONG,)
    block = script.render(script.read_results(tmp_path), kinds)
    for who in compared.contestants:
        assert f"| {who.name} | {who.state_nbytes / 1e6:.1f} MB | {who.token_perplexity:.2f} | " in block
    assert "| [recall](results/recall.json) | home | 100 | 2 |" in block
    assert f"| fifo | {variants.variants[1].perplexity:.2f} | " in block
    assert "| [asked](results/asked.json) | gate | 100 | 6 | 0 % [0 %, 0 %] |  |" in block
    assert "| [hidden](results/hidden.json) | qa1 | 4,000 | memory | 4 | 75 % [30, 95] | 0.50 |" in block
    assert "| [hidden](results/hidden.json) | qa1 | 4,000 | off | 4 | 0 % [0, 49] | 2.00 |" in block
    assert f"| {report['memory'].tokens_scored:,} | {report['memory'].token_perplexity.estimate:.2f} [" in block
    assert f"{100 * (report['memory'].against_off.ratio.estimate - 1):+.1f} %" in block
