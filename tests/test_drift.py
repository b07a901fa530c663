"""What drift costs a memory: the protocol where nothing drifted, where the code was turned, from the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hippoformer
from hippoformer import HippoFormer, cli
from hippoformer.errors import CheckpointError, ConfigurationError
from hippoformer.evaluation.drift import evaluate_drift
from hippoformer.evaluation.drift_report import CONDITIONS, DriftReport
from hippoformer.evaluation.other_weights import over_another_base, round_weights
from tiny import fresh, tiny_base
from tiny_texts import documents, tiny_load

FAST: dict[str, Any] = {"facts": 1, "spacing": 40, "distance": 100, "continuation": 64, "resamples": 100}


def awake() -> HippoFormer:
    """A model that recalls by its keys, and loudly."""
    model, _ = tiny_load(buffer_size=256, merge_threshold=2.0, priority_threshold=0.0, residual_readout=False)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(3.0)
        model.hippocampus.fusion.gate_out.bias.fill_(3.0)
    return model


def drifted(model: HippoFormer) -> DriftReport:
    _, tokenizer = tiny_load()
    return evaluate_drift(awake(), model, tokenizer, documents(900, 700), "a test", **FAST)


def reads(report: DriftReport, condition: str) -> list[tuple[float, float]]:
    return [(read.answer_nats, read.nll) for read in report.reads if read.condition == condition]


@pytest.fixture(scope="module")
def undrifted() -> DriftReport:
    return drifted(awake())


def test_without_drift_every_code_is_the_readers_own(undrifted: DriftReport) -> None:
    report = undrifted
    assert len(report.reads) == len(CONDITIONS) * 2
    assert reads(report, "as written") == reads(report, "calibrated") == reads(report, "re-encoded")
    for own, ceiling in zip(reads(report, "own"), reads(report, "re-encoded"), strict=True):
        assert own == pytest.approx(ceiling, rel=1e-5)
    assert all(abs(a[1] - b[1]) > 1e-3 for a, b in zip(reads(report, "own"), reads(report, "off"), strict=True))
    assert set(report.drift.values()) == {0.0} and not report.calibrates
    assert report.regained()["answers"]["share"] is None, "of nothing no share can be regained"
    assert all(read.questions == 3 and read.tokens == 63 for read in report.reads)


def test_a_turned_code_costs_and_is_turned_back(undrifted: DriftReport) -> None:
    """Keys and queries turn together, so the reader's own memory is as good as ever and the old one is not."""
    turned = awake()
    skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    turn = torch.block_diag(*[torch.linalg.matrix_exp(0.2 * (skew - skew.T))] * 2)
    with torch.no_grad():
        for projection in (turned.hippocampus.recall.key_proj, turned.hippocampus.recall.query_proj):
            projection.weight.copy_(turn @ projection.weight)
    report = drifted(turned)
    assert report.calibrates and report.drift["episodes"] > 0.3
    assert report.drift["episodes_calibrated"] < 0.1 * report.drift["episodes"]
    assert report.drift["keys_calibrated"] < 0.1 * report.drift["keys"]
    regained = report.regained()["continuation"]
    assert regained["cost"]["estimate"] > 0 and regained["share"]["estimate"] > 0.8
    assert report.regained()["continuation"]["share"]["estimate"] == pytest.approx(
        (sum(n for _, n in reads(report, "as written")) - sum(n for _, n in reads(report, "calibrated")))
        / (sum(n for _, n in reads(report, "as written")) - sum(n for _, n in reads(report, "re-encoded")))
    )
    assert [n for _, n in reads(report, "re-encoded")] == pytest.approx(
        [n for _, n in reads(undrifted, "own")], rel=1e-4
    )


def test_what_cannot_be_measured_is_refused() -> None:
    model, tokenizer = tiny_load()
    for options in ({"facts": 0}, {"continuation": 1}, {"streams": 0}, {"distance": 0}):
        with pytest.raises(ConfigurationError, match="positive"):
            evaluate_drift(model, model, tokenizer, documents(500), "itself", **(FAST | options))


def test_rounded_weights_lie_on_a_grid_and_the_head_is_left() -> None:
    rough, fine, base = tiny_base(), tiny_base(), tiny_base()
    round_weights(rough, 2)
    round_weights(fine, 8)
    names = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, rough.state_dict()[name])]
    assert names and all(name.endswith("_proj.weight") for name in names)
    assert torch.equal(rough.get_output_embeddings().weight, base.get_output_embeddings().weight)
    for name in names:
        before, after = base.state_dict()[name], rough.state_dict()[name]
        assert all(len(row[:32].unique()) <= 4 for row in after)
        assert after.amax() == pytest.approx(before.amax().item()) and after.amin() == pytest.approx(
            before.amin().item()
        )
        assert (fine.state_dict()[name] - before).abs().max() < 0.05 * (after - before).abs().max()
    with pytest.raises(ConfigurationError, match="1 to 8"):
        round_weights(base, 9)


def test_a_hippocampus_over_another_base() -> None:
    model, base = fresh(model_seed=0), tiny_base(seed=3)
    other = over_another_base(model, base)
    assert other.base is base and other.config is not model.config
    for name, tensor in model.hippocampus.state_dict().items():
        assert torch.equal(other.hippocampus.state_dict()[name], tensor)
    with pytest.raises(CheckpointError, match="does not fit"):
        over_another_base(model, tiny_load()[0].base)


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    (tmp_path / "text.txt").write_text(documents(2000)[0].text, encoding="utf-8")
    base, output = tmp_path / "base", tmp_path / "drift.json"
    tiny_load()[0].base.save_pretrained(base)
    fixed = ["eval", "drift", "--model", "any", "--text", str(tmp_path / "text.txt"), "--output", str(output)]
    fixed += [f"--{name}={value}" for name, value in FAST.items()]
    for reader, name in ((["--quantise-bits", "2"], "rounded to 2 bits"), (["--drifted", str(base)], str(base))):
        result = CliRunner().invoke(cli.app, [*fixed, *reader])
        assert result.exit_code == 0, result.output
        written = json.loads(output.read_text())
        assert name in written["drifted"]["from"] and written["format"] == "hippoformer.drift/1"
        assert [row["condition"] for row in written["conditions"]] == list(CONDITIONS)
        assert (written["drift"]["keys"] > 0) == (reader[0] == "--quantise-bits")
        assert "re-encoded" in result.output and "regained" in result.output
    for wrong in ([], ["--quantise-bits", "2", "--drifted", str(base)]):
        assert CliRunner().invoke(cli.app, [*fixed, *wrong]).exit_code == 2
