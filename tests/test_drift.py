"""What drift costs a memory: where nothing drifted, where the code was turned, and the readers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import hippoformer
from evaluation.__main__ import main
from evaluation.common.results import Result
from evaluation.drift import run as drift
from hippoformer import HippoFormer
from hippoformer.errors import ConfigurationError
from tiny import tiny_base
from tiny_texts import documents, tiny_load

FAST: dict[str, Any] = {"facts": 1, "spacing": 40, "distance": 100, "continuation": 64}


def awake() -> HippoFormer:
    """A model that recalls by its keys, and loudly."""
    model, _ = tiny_load(buffer_size=256, residual_readout=False)
    with torch.no_grad():
        model.hippocampus.recall.null_proj.bias.zero_()
        model.hippocampus.recall.log_scale.fill_(3.0)
        model.hippocampus.fusion.gate_out.bias.fill_(3.0)
    return model


def drifted(monkeypatch: pytest.MonkeyPatch, reader: HippoFormer) -> Result:
    monkeypatch.setattr(drift, "_reader", lambda model, options: reader)
    options = drift.Options(reader="given", **FAST)
    return drift.run(awake(), tiny_load()[1], documents(900, 700), options)


def figure(result: Result, condition: str, metric: str) -> float:
    (row,) = [row for row in result.rows if (row.condition, row.metric) == (condition, metric)]
    assert row.value is not None
    return row.value


def test_without_drift_every_memory_is_the_readers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    result = drifted(monkeypatch, awake())
    streams = result.details["streams"]
    assert streams["as written"] == streams["calibrated"] and len(streams["own"][0]) == 2
    for metric in ("nats/answer", "perplexity of the continuation"):
        own, written, off = (figure(result, condition, metric) for condition in ("own", "as written", "off"))
        assert own == pytest.approx(written, rel=1e-5) and abs(own - off) > 1e-3
    assert figure(result, "drift of anchors", "keys") == 0.0
    assert figure(result, "cost of drift", "nats/answer") == pytest.approx(0.0, abs=1e-4)


def test_a_turned_code_costs_and_is_turned_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and queries turn together, so the reader's own memory is as good as ever and the old one is not."""
    turned = awake()
    skew = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    turn = torch.block_diag(*[torch.linalg.matrix_exp(0.2 * (skew - skew.T))] * 2)
    with torch.no_grad():
        for projection in (turned.hippocampus.recall.key_proj, turned.hippocampus.recall.query_proj):
            projection.weight.copy_(turn @ projection.weight)
    result = drifted(monkeypatch, turned)
    moved, calibrated = (figure(result, "drift of anchors", name) for name in ("keys", "keys_calibrated"))
    assert moved > 0.3 and calibrated < 0.1 * moved
    nll = {name: sum(of[2]) for name, of in result.details["streams"].items()}
    recovered = 100 * (nll["as written"] - nll["calibrated"]) / (nll["as written"] - nll["own"])
    assert recovered > 80 and figure(result, "recovered, %", "nats/token") == pytest.approx(recovered)


def test_rounded_weights_are_few_values_a_group_and_leave_the_head() -> None:
    base, rough, fine = (tiny_base() for _ in range(3))
    drift.round_weights(rough, 2)
    drift.round_weights(fine, 8)
    assert torch.equal(rough.get_output_embeddings().weight, base.get_output_embeddings().weight)
    names = [name for name, tensor in base.state_dict().items() if "proj.weight" in name and tensor.dim() == 2]
    assert names
    for name in names:
        before, after = base.state_dict()[name], rough.state_dict()[name]
        assert all(len(row[:32].unique()) <= 4 for row in after)
        assert (fine.state_dict()[name] - before).abs().max() < 0.05 * (after - before).abs().max()
    with pytest.raises(ConfigurationError, match="1 to 8"):
        drift.round_weights(base, 9)


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hippoformer, "load", tiny_load)
    (tmp_path / "text.txt").write_text(documents(2000)[0].text, encoding="utf-8")
    tiny_load()[0].base.save_pretrained(tmp_path / "base")
    words = ["drift", "--model", "any", "--text", str(tmp_path / "text.txt")]
    words += [f"--{name}={value}" for name, value in FAST.items()]
    tiny_base().save_pretrained(tmp_path / "wider")
    for reader in (["--quantise_bits", "2"], ["--reader", str(tmp_path / "base")]):
        assert main([*words, *reader]) == 0
        assert "as written" in capsys.readouterr().out
    for wrong in ([], ["--quantise_bits", "2", "--reader", "base"], ["--reader", str(tmp_path / "wider")]):
        assert main([*words, *wrong]) == 2
