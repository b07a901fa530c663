"""The speed benchmark on a tiny model: it alternates, compares what it says, and writes rows."""

import importlib.util
import json
from pathlib import Path

import pytest

import hippoformer
from tiny import awake

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"
spec = importlib.util.spec_from_file_location("speed", PATH)
assert spec is not None and spec.loader is not None
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)


def test_every_condition_scores_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the window memory off is the base, whose own cache gives the same sum."""
    model = awake(window=12, segment_len=6, buffer_size=16)
    ids = speed.random_ids(model, 9, seed=0)
    off = speed.score(model, "off", ids, model.new_cache(1))
    base = model.base(ids).logits.float().log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).sum()
    assert off == pytest.approx(float(base.detach()), rel=1e-5)
    last = model.base(ids).logits.float().log_softmax(-1)[0, -1, ids[0, 0]]
    own = speed.score(model, "transformers", ids, speed.DynamicCache())
    assert own == pytest.approx(float((base + last).detach()), rel=1e-5)
    assert speed.score(model, "memory", ids, model.new_cache(1)) != off


def test_the_script_prints_a_table_and_writes_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = awake(window=12, segment_len=6, buffer_size=16)
    assert speed.full_store(model) == 34
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: (model, None))
    monkeypatch.setattr(speed, "PLACES", (5, 50))
    output, few = tmp_path / "speed.json", ["--repeats", "1", "--score_tokens", "7", "--new_tokens", "3"]
    speed.main(["--model", "x", *few, "--output", str(output)])
    rows = {(row["condition"], row["metric"]): row for row in json.loads(output.read_text(encoding="utf-8"))["rows"]}
    for metric in ("scoring", "generating from token 5", "generating from token 50"):
        ratio = rows["memory / off", f"{metric}, tokens/s"]["value"]
        values = [rows[condition, f"{metric}, tokens/s"]["value"] for condition in ("memory", "off")]
        assert ratio == pytest.approx(values[0] / values[1])
    for batch in (1, 8):
        metric = f"memory without recall, rows: {batch}, µs/token"
        stages = [rows[f"of which {stage}", metric]["value"] for stage in speed.STAGES]
        assert rows["memory", metric]["value"] == pytest.approx(sum(stages)) and min(stages) > 0
        assert rows["memory", metric]["n"] == batch * 12
    assert "memory / transformers" in capsys.readouterr().out
    assert speed.Episodes.write.__name__ == "write"  # the functions that were timed are as they were
