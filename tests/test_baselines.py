"""Everybody by one protocol: each way to read a long text against a slow reading of the same text."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

import hippoformer
from hippoformer.cli import app
from hippoformer.data import Document
from hippoformer.errors import (
    BaseModelNotFoundError,
    CausalityError,
    ConfigurationError,
    HippoFormerError,
    NonFiniteError,
    TextError,
)
from hippoformer.evaluation import evaluate_perplexity
from hippoformer.evaluation.baselines import Foreign, Streamed, contestants, foreign
from hippoformer.evaluation.causality import check
from hippoformer.evaluation.comparison import Scored, compare
from hippoformer.evaluation.scoring import describe
from hippoformer.evaluation.views import with_options
from tiny_texts import LETTERS, byte_tokenizer, documents, tiny_load, tiny_tokenizer

TEXTS = [*documents(300, 170), Document("empty", "", "made up"), *documents(0, 0, 120)[2:]]
SIZES = {"vocab_size": len(LETTERS) + 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family in a folder, one of them with a tokenizer of its own, and an adapter."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **(SIZES | {"vocab_size": len(LETTERS) + 3}))
        ),
        "llama": LlamaForCausalLM(LlamaConfig(**llama, max_position_embeddings=128, **SIZES)),
        "mamba": MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, **SIZES)),
    }
    merging = byte_tokenizer(["<end>"], merges=[("a", "b"), ("c", "d")], bos_token="<end>", eos_token="<end>")
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(root / name)
        (merging if name == "gpt2" else tiny_tokenizer()).save_pretrained(root / name)
    adapted = LlamaForCausalLM.from_pretrained(root / "llama")
    adapted.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(root / "adapter")
    config = json.loads((root / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(root / "llama")
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return {name: root / name for name in (*models, "adapter")}


@torch.no_grad()
def alone(model: Any, ids: Tensor, start: int, token: int) -> float:
    """log p of a token by everything from `start` to the one before it, in one plain call."""
    logits = model(input_ids=ids[None, start:token]).logits[0, -1]
    return float(torch.log_softmax(logits.float(), -1)[ids[token]])


@pytest.mark.parametrize("overlap", [0, 7, 15])
def test_a_window_that_slides_with_overlap(folders: dict[str, Path], overlap: int) -> None:
    baseline = foreign(str(folders["llama"]), 20, overlap)
    ids = torch.randint(1, 200, (93,), generator=torch.Generator().manual_seed(0))
    scored = baseline.score(ids)
    expected = []
    for token in range(1, len(ids)):
        # The window in which the token before was read for the first time foretells it.
        reader, start = token - 1, 0
        while reader >= start + 20:
            start += 20 - overlap
        expected.append(alone(baseline.model, ids, start, token))
    assert baseline.scores(ids).tolist() == pytest.approx(expected, abs=1e-4)
    assert scored.nll == pytest.approx(-sum(expected), rel=1e-5)
    # Keys and values: 2 layers, 2 heads of 8, 20 tokens, 4 bytes.
    assert (scored.window_nbytes, scored.memory_nbytes) == (2 * 2 * 2 * 8 * 20 * 4, 0)


@pytest.mark.parametrize("piece", [1, 512])
def test_a_recurrent_state_carries_everything(folders: dict[str, Path], piece: int) -> None:
    baseline = foreign(str(folders["mamba"]))
    assert baseline.window is None and baseline.options == {"recurrent": True}
    baseline._piece = min(piece, baseline._piece)
    ids = torch.randint(1, 200, (40,), generator=torch.Generator().manual_seed(0))
    expected = [alone(baseline.model, ids, 0, token) for token in range(1, 40)]
    assert baseline.scores(ids).tolist() == pytest.approx(expected, abs=1e-4)
    scored = baseline.score(ids)
    assert scored.nll == pytest.approx(-sum(expected), rel=1e-5)
    assert scored.window_nbytes == baseline.score(ids[:10]).window_nbytes > 0


def test_an_adapter_is_its_base_and_more(folders: dict[str, Path]) -> None:
    base, adapted = foreign(str(folders["llama"])), foreign(str(folders["adapter"]))
    assert (base.kind, adapted.kind) == ("model", "adapter")
    ids = torch.randint(1, 200, (30,), generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(base.scores(ids), adapted.scores(ids), atol=1e-3)


def test_all_of_them_look_at_the_past_alone(folders: dict[str, Path]) -> None:
    for name, options in (("gpt2", {"window": 16}), ("llama", {"window": 16, "overlap": 3}), ("mamba", {})):
        assert check(foreign(str(folders[name]), **options)).future == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"window": 32},
        {"buffer_size": 16},
        {"window": 64, "buffer_size": 8},
        {"match_power": 0.0},
        {"recall_top_k": 2},
        {"distribution_readout": False},
    ],
    ids=str,
)
def test_a_view_is_the_model_as_if_built_with_other_options(options: dict[str, Any]) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    ids = tokenizer(TEXTS[0].text, return_tensors="pt").input_ids
    before = model.score(ids)
    view, built = with_options(model, **options), tiny_load(residual_readout=False, **options)[0]
    built.load_state_dict(model.state_dict())
    assert torch.equal(view.score(ids), built.score(ids)) and not torch.equal(view.score(ids), before)
    with view.memory_off(), built.memory_off():
        assert torch.equal(view.score(ids), built.score(ids))
    assert torch.equal(model.score(ids), before), "the model itself stays as it is"
    assert all(mine is its for mine, its in zip(view.parameters(), model.parameters(), strict=True))


def test_figures_are_those_of_the_text(folders: dict[str, Path]) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    everybody = contestants(model, tokenizer, [64], [16], [("h2o", 8)], [str(folders["gpt2"])], 32)
    report = compare(everybody, TEXTS, describe(model), resamples=50)
    assert [(c.name.replace(str(folders["gpt2"]), "gpt2"), c.kind) for c in report.contestants] == [
        ("hippoformer", "hippoformer"),
        ("base, window 48", "window"),
        ("base, window 64", "window"),
        ("hippoformer, buffer 16", "hippoformer"),
        ("base, window 48 + 8 by h2o", "kv selection"),
        ("gpt2", "model"),
    ]
    streamed = evaluate_perplexity(model, tokenizer, TEXTS, ("memory", "off"), resamples=10)
    for name, condition in (("hippoformer", "memory"), ("base, window 48", "off")):
        mine, theirs = report[name], streamed[condition]
        assert mine.nll == pytest.approx(theirs.nll, rel=1e-5)
        assert mine.bits_per_byte.estimate == pytest.approx(theirs.bits_per_byte, rel=1e-5)
        assert mine.word_perplexity == pytest.approx(theirs.word_perplexity, rel=1e-4)
        assert (mine.window_nbytes, mine.memory_nbytes) == (theirs.window_nbytes, theirs.memory_nbytes)
    other = report[str(folders["gpt2"])]
    assert other.tokens_scored < report["hippoformer"].tokens_scored, "its tokens are longer"
    text_bytes = [len(text.text) for text in TEXTS if text.text]
    for document, whole in zip(other.documents, text_bytes, strict=True):
        assert whole - 2 <= document["utf8_bytes"] < whole, "all but the first token"
    bits = sum(d["nll"] for d in other.documents) / math.log(2) / sum(d["utf8_bytes"] for d in other.documents)
    assert other.bits_per_byte.estimate == pytest.approx(bits)
    ratio = bits / report["hippoformer"].bits_per_byte.estimate
    assert other.against.bits_ratio.estimate == pytest.approx(ratio)
    assert report["hippoformer"].against is None and other.against.documents == 3
    assert report["base, window 64"].window_nbytes > report["base, window 48"].window_nbytes
    assert report["hippoformer, buffer 16"].memory_nbytes < report["hippoformer"].memory_nbytes
    assert report.to_table().row_count == 6
    with pytest.raises(KeyError):
        report["nobody"]


class Cheat(Foreign):
    """A model whose scores know the answer."""

    def scores(self, ids: Tensor) -> Tensor:
        return torch.full((len(ids) - 1,), -0.01)


def test_whoever_cheats_or_breaks_is_refused(folders: dict[str, Path]) -> None:
    model, tokenizer = tiny_load(residual_readout=False)
    honest = foreign(str(folders["llama"]))
    cheat = Cheat("cheat", honest.tokenizer, honest.model, 20, 10)
    with pytest.raises(CausalityError, match="scores differ"):
        compare([honest, cheat], TEXTS, {}, resamples=10)

    class Broken(Streamed):
        def score(self, ids: Tensor) -> Scored:
            return Scored(math.nan, 0, 0, 1.0)

    with pytest.raises(NonFiniteError, match=r"'text 0'.*broken"):
        compare([Broken("broken", "model", {}, tokenizer, model)], TEXTS, {}, resamples=10)
    with pytest.raises(ConfigurationError, match="names that differ"):
        compare([honest, honest], TEXTS, {})
    with pytest.raises(TextError, match="two tokens for everybody"):
        compare([honest], documents(1), {})
    with pytest.raises(ConfigurationError, match="overlap below the window"):
        foreign(str(folders["llama"]), 20, 20)
    with pytest.raises(ConfigurationError, match="2 to 64 tokens"):
        foreign(str(folders["gpt2"]), 65)
    (folders["adapter"] / "adapter_model.safetensors").rename(folders["adapter"] / "gone")
    with pytest.raises(BaseModelNotFoundError, match="adapter"):
        foreign(str(folders["adapter"]))


class Counted:
    """A contestant that notes what it reads, takes one second a document, and may be stopped."""

    def __init__(self, inner: Any, readings: list[tuple[str, int]], limit: int | None = None) -> None:
        self.inner, self.readings, self.limit = inner, readings, limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def check(self, ids: Tensor) -> None:
        """Elsewhere; here it would take longer than everything else."""

    def score(self, ids: Tensor) -> Scored:
        if len(self.readings) == self.limit:
            raise KeyboardInterrupt
        self.readings.append((self.inner.name, len(ids)))
        return replace(self.inner.score(ids), seconds=1.0)


def everybody(folders: dict[str, Path], **more: Any) -> list[Any]:
    model, tokenizer = tiny_load(residual_readout=False)
    asked = {"buffers": [16], "selections": [("h2o", 8)], "models": [str(folders["mamba"])]} | more
    return contestants(model, tokenizer, **asked)


def test_an_interrupted_comparison_goes_on(folders: dict[str, Path], tmp_path: Path) -> None:
    bars: list[tuple[int, int]] = []

    def run(keep: Path | None, limit: int | None = None) -> tuple[dict[str, Any], list[tuple[str, int]]]:
        readings: list[tuple[str, int]] = []
        bars.clear()
        everyone: list[Any] = [Counted(one, readings, limit) for one in everybody(folders)]
        try:
            report = compare(everyone, TEXTS, {}, resamples=20, progress=lambda *at: bars.append(at), keep=keep)
        except KeyboardInterrupt:
            return {}, readings
        return report.to_dict() | {"provenance": None}, readings

    whole, order = run(None)
    assert [name for name, _ in order[:5]] == [c["name"] for c in whole["contestants"]], "all read the first text first"
    keep = tmp_path / "finished.jsonl"
    _, before = run(keep, limit=7)
    with open(keep, "a") as file:
        file.write('\n{"key": "cut o')
    report, after = run(keep, limit=None)
    assert before + after == order and len(before) == 7
    assert bars[0] == (sum(n for _, n in before), sum(n for _, n in order)) and bars[-1][0] == bars[-1][1]
    assert report == whole
    report, nothing = run(keep)
    assert nothing == [] and report == whole, "also what came after the line that was cut off"


@pytest.mark.slow
def test_only_what_is_the_same_is_taken_over(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "finished.jsonl"

    def read(everyone: list[Any], texts: list[Document] = TEXTS, limit: int | None = None) -> set[str]:
        readings: list[tuple[str, int]] = []
        compare([Counted(one, readings) for one in everyone], texts, {}, limit, resamples=10, keep=keep)
        return {name for name, _ in readings}

    names = {one.name for one in everybody(folders)}
    assert read(everybody(folders)) == names and read(everybody(folders)) == set()
    assert read(everybody(folders, buffers=[8])) == {"hippoformer, buffer 8"}
    assert read(everybody(folders, selections=[("h2o", 9)])) == {"base, window 48 + 9 by h2o"}
    assert read(everybody(folders), limit=100) == names
    assert read(everybody(folders), [TEXTS[1]]) == set(), "a text by itself"

    def changed(part: str) -> list[Any]:
        everyone = everybody(folders)
        model = everyone[-1].model if part == "other" else getattr(everyone[0].model, part)
        next(iter(model.parameters())).data.add_(1.0)
        return everyone

    memories = {"hippoformer", "hippoformer, buffer 16"}
    assert memories <= read(changed("hippocampus")) < names
    assert read(changed("base")) == names - {str(folders["mamba"])}
    assert read(changed("other")) == {str(folders["mamba"])}
    monkeypatch.setattr("hippoformer.evaluation.comparison.code_sha256", lambda: "other code")
    assert read(everybody(folders)) == names


def test_where_nothing_can_be_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(HippoFormerError, match="could not be written"):
        compare(everybody(folders)[:1], TEXTS, {}, resamples=10, keep=tmp_path / "nowhere" / "finished.jsonl")


def test_from_the_command_line(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(name, residual_readout=False, **options))
    (tmp_path / "text.txt").write_text(TEXTS[0].text)
    arguments = ["--model", "tiny", "--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out.json")]
    arguments += ["--limit-characters", "200", "--resamples", "10"]
    baselines = ["--baseline", str(folders["gpt2"]), "--baseline-window", "32", "--windows", "32"]
    for command, more, number in (
        ("baselines", baselines, 4),
        ("bytes", ["--windows", "64", "--buffers", "0", "--kv", "random:8"], 5),
    ):
        result = CliRunner().invoke(app, ["eval", command, *arguments, *more])
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "out.json").read_text())
        assert content["format"] == "hippoformer.comparison/1" and len(content["contestants"]) == number
        assert content["contestants"][0]["utf8_bytes"] == 199
    assert not list(tmp_path.glob("out.json?*")), "what was kept until the report was there"
    wrong = CliRunner().invoke(app, ["eval", "bytes", *arguments, "--kv", "h2o"])
    assert wrong.exit_code == 2 and "METHOD:BUDGET" in wrong.output


@pytest.mark.slow
def test_the_command_goes_on_beside_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippoformer, "load", lambda name, **options: tiny_load(name, residual_readout=False, **options))
    (tmp_path / "text.txt").write_text(TEXTS[0].text)
    arguments = ["eval", "bytes", "--model", "tiny", "--text", str(tmp_path / "text.txt"), "--resamples", "10"]
    arguments += ["--windows", "64", "--buffers", "0", "--kv", "random:8", "--output", str(tmp_path / "out.json")]
    score, readings = Streamed.score, list[str]()

    def stopped(self: Streamed, ids: Tensor) -> Scored:
        if len(readings) == 2:
            raise HippoFormerError("stopped")
        readings.append(self.name)
        return score(self, ids)

    monkeypatch.setattr(Streamed, "score", stopped)
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert [path.name for path in tmp_path.glob("out.json*")] == ["out.json.finished.jsonl"]
    first = readings.copy()
    readings[:] = ["nobody"] * 3
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert not set(first) & set(readings) and [path.name for path in tmp_path.glob("out.json*")] == ["out.json"]
