"""The whole evaluation: every part leaves its file, nothing runs twice, and both commands start it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hippoformer
from evaluation.comprehensive_eval import app as original
from hippoformer.cli import app
from hippoformer.data import Document
from hippoformer.data.benchmarks import benchmark_documents, local_places
from hippoformer.errors import ConfigurationError, HippoFormerError, InputError, TextError
from hippoformer.evaluation import suite as suites
from hippoformer.evaluation.parts import PARTS, Part, Progress, Suite, SuiteSettings, smaller
from hippoformer.evaluation.seeds import aggregate
from hippoformer.evaluation.suite import SuiteReport, estimated_minutes, run_suite
from tiny_texts import documents, tiny_load

SETTINGS = SuiteSettings(
    part_documents=2,
    part_tokens=160,
    stream_tokens=200,
    prompts=2,
    context_tokens=80,
    new_tokens=6,
    recall_distances=(40,),
    recall_facts=1,
    recall_streams=1,
    resamples=20,
)
QUICK = ("perplexity", "long_range", "dynamics")


def loaded(name: str = "tiny", **options: Any) -> tuple[Any, Any]:
    return tiny_load(name, residual_readout=False, **options)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    texts = tuple(documents(400, 300, 260))
    return Suite(*loaded(), texts, texts, tmp_path / "states", SETTINGS, "a command")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that really ran."""
    ran: list[str] = []

    def watched(part: Part) -> Part:
        def run(suite: Suite, progress: Progress) -> Any:
            ran.append(part.name)
            return part.run(suite, progress)

        return replace(part, run=run)

    monkeypatch.setattr(suites, "PARTS", {name: watched(part) for name, part in PARTS.items()})
    return ran


def test_every_part_leaves_a_file_and_the_summary_holds_all(suite: Suite, runs: list[str], tmp_path: Path) -> None:
    bars: list[tuple[str, int, int]] = []

    class Bar:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Any:
            return lambda done, total: bars.append((self.name, done, total))

        def __exit__(self, *_: object) -> None:
            pass

    report = run_suite(suite, tmp_path / "out", progress=Bar)
    assert runs == list(PARTS) == list(report.parts)
    for name, part in PARTS.items():
        content = json.loads((tmp_path / "out" / part.file).read_text())
        assert content == report.parts[name] and content["format"].startswith("hippoformer.")
        assert content["provenance"]["command"] == "a command" and content["request"]["part"] == name
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert whole["format"] == "hippoformer.evaluation/1" and list(whole["parts"]) == list(PARTS)
    assert {row["part"] for row in whole["headline"]} == set(PARTS) - {"dynamics"}
    targets = {row["target"] for row in whole["headline"]} - {None}
    assert {2.11, 0.58, 4.9, 0.86, 6.95} == targets
    assert {name for name, _, _ in bars} == set(PARTS) - {"long_range"}, "its scores were there"
    assert all(0 <= done <= total for _, done, total in bars)
    assert "\\toprule" in (tmp_path / "out" / "results.tex").read_text()
    assert (tmp_path / "out" / "results.md").read_text().startswith("| figure")


def test_the_headline_is_what_the_parts_say(suite: Suite, tmp_path: Path) -> None:
    report = run_suite(suite, tmp_path, ("perplexity", "long_range"))
    rows = {row["name"]: row for row in report.headline}
    conditions = report.parts["perplexity"]["conditions"]
    assert rows["perplexity, memory"]["value"] == conditions["memory"]["token_perplexity"]["estimate"]
    assert rows["perplexity, memory"]["control"] == conditions["off"]["token_perplexity"]["estimate"]
    early = report.parts["long_range"]["early_late"]
    assert rows["first minus last quarter"]["value"] == early["memory"]["early_minus_late"]
    assert rows["first minus last quarter"]["control"] == early["off"]["early_minus_late"]
    assert report.to_table().row_count == len(report.headline)


def test_what_is_there_is_not_run_again(suite: Suite, runs: list[str], tmp_path: Path) -> None:
    def again(suite: Suite, parts: tuple[str, ...] = QUICK) -> SuiteReport:
        runs.clear()
        return run_suite(suite, tmp_path, parts)

    first = again(suite)
    assert runs == list(QUICK)
    assert again(suite).parts == first.parts and runs == []
    (tmp_path / "dynamics.json").write_text('{"format": "hippoformer.dyn')  # a file cut off
    again(suite)
    assert runs == ["dynamics"]
    again(replace(suite, settings=replace(SETTINGS, stream_tokens=150)))
    assert runs == ["dynamics"], "only what depends on the setting"
    again(replace(suite, settings=replace(SETTINGS, limit_tokens=200)))
    assert runs == list(QUICK), "and the stream, whose file was for other settings"
    again(replace(suite, documents=tuple(documents(400))))
    assert runs == ["perplexity", "long_range"], "the stream is of the long texts"
    other, _ = loaded()
    other.hippocampus.fusion.gate_out.bias.data.add_(1.0)
    again(replace(suite, model=other, documents=tuple(documents(400))))
    assert runs == list(QUICK), "another model"


def test_an_interrupted_run_goes_on(
    suite: Suite, runs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(suite: Suite, progress: Progress) -> Any:
        raise KeyboardInterrupt

    whole = suites.PARTS["long_range"]
    monkeypatch.setitem(suites.PARTS, "long_range", replace(whole, run=stop))
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, tmp_path, QUICK)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setitem(suites.PARTS, "long_range", whole)
    runs.clear()
    run_suite(suite, tmp_path, QUICK)
    assert runs == ["long_range", "dynamics"]


def test_the_estimate_grows_with_what_is_read(suite: Suite) -> None:
    minutes = estimated_minutes(suite, tuple(PARTS))
    assert minutes["perplexity"] == pytest.approx(3 * 960 / 4 / 1000 / 60)
    twice = replace(suite, documents=suite.documents * 2)
    assert estimated_minutes(twice, ("perplexity",))["perplexity"] == pytest.approx(2 * minutes["perplexity"])
    assert estimated_minutes(suite, ("brain",), 500.0)["brain"] == pytest.approx(2 * minutes["brain"])


def test_the_defaults_fit_into_forty_minutes_for_wikitext_2() -> None:
    """60 documents of 21,500 characters: the size of the test set, at 1,000 tokens a second."""
    texts = (Document("article", 21_500 * "a", "made up"),) * 60
    suite = Suite(None, None, texts, texts, Path("unused"), SuiteSettings(), None)
    assert 15 < sum(estimated_minutes(suite, tuple(PARTS)).values()) < 35


def test_wrong_requests(suite: Suite, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="choose among perplexity"):
        run_suite(suite, tmp_path, ("speed",))
    with pytest.raises(ConfigurationError, match="at least 1"):
        smaller(SETTINGS, 0)
    assert smaller(SETTINGS, 1).part_documents == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(HippoFormerError, match="choose another folder"):
        run_suite(suite, tmp_path / "file", ("dynamics",))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hippoformer, "load", loaded)
    folder = tmp_path / "data" / "wikitext-2-raw"
    folder.mkdir(parents=True)
    for document in documents(400, 300):
        (folder / f"{document.title}.txt").write_text(document.text)
    (folder / "wiki.test.raw").write_text(documents(400)[0].text)
    return folder


def test_one_command_for_everything(texts: Path, tmp_path: Path) -> None:
    arguments = ["eval", "all", "--model", "tiny", "--text", str(texts), "--output-dir", str(tmp_path / "out")]
    arguments += ["--parts", "perplexity,dynamics", "--limit-tokens", "120", "--resamples", "10"]
    arguments += ["--cache-dir", str(tmp_path / "states"), "--stream-tokens", "100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "About 0 minutes at 1,000 tokens/s" in result.output and "perplexity, memory" in result.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())["request"]["parts"] == ["perplexity", "dynamics"]
    assert "is there already" in CliRunner().invoke(app, arguments).output
    result = CliRunner().invoke(app, ["eval", "all", "--model", "tiny", "--output-dir", str(tmp_path / "out")])
    assert result.exit_code == 2 and "No text was named" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("part", ["long-range", "dynamics", "ablations", "brain", "quality"])
def test_one_command_a_part(part: str, texts: Path, tmp_path: Path) -> None:
    arguments = ["eval", part, "--model", "tiny", "--dataset", "wikitext-2", "--data-dir", str(texts.parent)]
    arguments += ["--output", str(tmp_path / "part.json")]
    arguments += {
        "quality": ["--context-tokens", "80", "--new-tokens", "4", "--prompts", "1"],
        "ablations": ["--cache-dir", str(tmp_path / "states"), "--resamples", "10", "--limit-tokens", "80"],
        "brain": ["--cache-dir", str(tmp_path / "states"), "--tagger", "word list", "--resamples", "10"],
    }.get(part, [])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "part.json").read_text())["format"].startswith("hippoformer.")


@pytest.mark.slow
def test_the_original_s_command(texts: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", "tiny", "--output", str(tmp_path / "results.json"), "--device", "cpu"]
    arguments += ["--samples", "1", "--data-dir", str(texts.parent), "--parts", "perplexity,salience"]
    arguments += ["--max-seq-length", "300"]
    result = CliRunner().invoke(original, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "results.json").read_text())
    assert list(content["parts"]) == ["perplexity", "salience"]
    assert len(content["parts"]["perplexity"]["documents"]) == 1
    assert (tmp_path / "results" / "salience.json").is_file()


def test_the_original_s_command_without_its_data(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> Any:
        raise TextError("no network")

    monkeypatch.setattr("hippoformer.data.benchmarks.dataset_documents", unreachable)
    arguments = ["--checkpoint", "tiny", "--output", str(tmp_path / "results.json"), "--datasets", "pg19"]
    result = CliRunner().invoke(original, arguments)
    assert result.exit_code == 2 and "pg19 (test) is not at hand" in result.output
    assert not (tmp_path / "results.json").exists()


def test_a_data_set_is_local_or_on_the_hub_or_an_error(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = benchmark_documents("wikitext-2", "test", texts.parent)
    assert found.text == documents(400)[0].text
    assert local_places("wikitext-103", "test", texts.parent)[-1] == texts.parent / "wikitext-103" / "test.jsonl"
    assert benchmark_documents("wikitext-103", "test", texts.parent) == [found], "its test set is the same"
    (tmp_path / "mine" / "test").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "mine" / "test" / f"{name}.txt").write_text("some text")
    assert len(benchmark_documents("mine", "test", tmp_path, max_samples=1)) == 1
    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "hippoformer.data.benchmarks.dataset_documents", lambda name, **o: iter([asked.append((name, o["split"]))])
    )
    assert len(benchmark_documents("pg19", "test", tmp_path)) == 1 and asked == [("pg19", "test")]

    def unreachable(*_: object, **__: object) -> Any:
        raise TextError("the hub cannot be reached")

    monkeypatch.setattr("hippoformer.data.benchmarks.dataset_documents", unreachable)
    with pytest.raises(TextError, match=r"pg19 \(test\) is not at hand: no .*pg19.*; and the hub cannot be reached"):
        benchmark_documents("pg19", "test", tmp_path)
    with pytest.raises(ConfigurationError, match="at least 1"):
        benchmark_documents("pg19", max_samples=0)


def test_seeds_are_put_together(suite: Suite, tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        model, _ = loaded()
        model.hippocampus.fusion.gate_out.bias.data.add_(0.5 * seed)
        run_suite(replace(suite, model=model), tmp_path / str(seed), ("perplexity",))
        files.append(tmp_path / str(seed) / "perplexity.json")
    values = [json.loads(file.read_text())["conditions"]["memory"]["token_perplexity"]["estimate"] for file in files]
    report = aggregate(files)
    row = next(row for row in report.rows if row.name == "perplexity, memory")
    assert row.values == values and len(set(values)) == 3
    assert row.summary.mean == pytest.approx(sum(values) / 3) and row.summary.seeds == 3
    whole = aggregate([file.with_name("results.json") for file in files])
    assert whole.rows == report.rows
    arguments = ["eval", "seeds", *map(str, files), "--output", str(tmp_path / "seeds.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "perplexity, memory" in result.output, result.output
    assert json.loads((tmp_path / "seeds.json").read_text())["rows"][0]["summary"]["seeds"] == 3
    (tmp_path / "other.json").write_text('{"format": "hippoformer.speed/1"}')
    with pytest.raises(InputError, match="no result file"):
        aggregate([files[0], tmp_path / "other.json"])
    with pytest.raises(InputError, match="in common"):
        aggregate([])
