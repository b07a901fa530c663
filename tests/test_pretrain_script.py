"""`scripts/pretrain.py`: commands of the package, only what is missing is made, and the best seed is shipped."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from hippoformer import cli
from hippoformer.model.configuration import HippoFormerConfig
from hippoformer.training.arguments import config_options, parse
from script_files import record_runs, script_at

SHIPPED = HippoFormerConfig.from_pretrained(
    Path(__file__).resolve().parents[1] / "src" / "hippoformer" / "pretrained" / "smollm2-135m"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return script_at("pretrain", tmp_path, monkeypatch)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    return record_runs(monkeypatch, "by hand", 7)


def _validated(root: Path, script: ModuleType, seed: int, novels: float, articles: float) -> None:
    for name, perplexity in (("novels", novels), ("articles", articles)):
        file = root / script.validation(seed, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"variants": [{"perplexity": perplexity}]}))


def test_every_seed_is_trained_alike_and_read_alike(script: ModuleType, ran: list[list[str]]) -> None:
    assert script.main(["--seeds", "42", "43"]) == 0
    assert [line[3] for line in ran] == ["train", *["eval"] * 5] * 2
    first, second = (parse(line[4:]) for line in ran if line[3] == "train")
    assert vars(first) | {"seed": 43, "output_dir": second.output_dir} == vars(second)
    root: Any = get_command(cli.app)
    for line in (line for line in ran if line[3] == "eval"):
        options = {o for p in root.commands["eval"].commands[line[4]].params for o in p.opts}
        assert {word for word in line if word.startswith("--")} <= options
        assert line[line.index("--model") + 1] in (first.output_dir, second.output_dir)
    assert len({line[-1] for line in ran if line[3] == "eval"}) == 10
    # Nothing that a figure is made of is chosen by: the reports that choose lie beside the weights.
    assert all(("test" in line[-1]) == ("test" in line[line.index("--text") + 1]) for line in ran if line[3] == "eval")


def test_it_is_trained_under_what_it_is_shipped_with(script: ModuleType) -> None:
    arguments = parse(script.training(42)[1:])
    trained = HippoFormerConfig(
        **config_options(arguments.set), base_model_name="smollm2-135m", use_lora=False
    ).to_dict()
    # What the base says of itself, and the rate and seed of that run.
    told = {"vocab_size", "hidden_size", "num_hidden_layers", "learning_rate", "seed", "transformers_version"}
    told |= {"bos_token_id", "eos_token_id", "pad_token_id", "freeze_base", "replay_rate", "memory_layer"}
    shipped = SHIPPED.to_dict()
    assert {n: v for n, v in trained.items() if n not in told} == {n: shipped[n] for n in trained if n not in told}


def test_what_is_there_is_not_made_again(script: ModuleType, ran: list[list[str]], tmp_path: Path) -> None:
    for made in ("runs/pretrained-42/config.json", "results/pretrained_42_novels_test.json"):
        (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / made).write_text("{}")
    assert script.main(["--seeds", "42"]) == 0
    kinds = [line[-1].rpartition("/")[2] for line in ran]
    assert kinds == [
        "novels.json",
        "articles.json",
        "pretrained_42_articles_test.json",
        "pretrained_42_recall_test.json",
    ]


def test_a_command_that_fails_ends_it(
    script: ModuleType, ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "reports", lambda seed: {Path("nothing.json"): ["eval", "by hand"]})
    assert script.main(["--seeds", "42", "43"]) == 7 and len(ran) == 2


def test_the_best_of_validation_texts_is_shipped(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no seed"):
        script.main(["--ship"])
    for seed, novels, articles in ((42, 30.0, 20.0), (43, 31.0, 18.0), (44, 29.0, 21.0)):
        _validated(tmp_path, script, seed, novels, articles)
        for name in ("config.json", "model.safetensors"):
            (tmp_path / script.folder(seed) / name).write_text(f"{name} of {seed}")
    (tmp_path / script.SHIPPED).mkdir(parents=True)
    assert script.main(["--ship"]) == 0
    shipped = {file.name: file.read_text() for file in (tmp_path / script.SHIPPED).iterdir()}
    assert shipped == {name: f"{name} of 43" for name in ("config.json", "model.safetensors")}
