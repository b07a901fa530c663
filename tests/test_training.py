"""Training: what is read in which order, what enters a loss, and that a run is a function of its arguments."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hippoformer.training.checkpoints as checkpoints
from hippoformer import HippoFormer
from hippoformer.errors import CheckpointError, ConfigurationError, TextError
from hippoformer.model.base_models import load_base_model, load_tokenizer
from hippoformer.train import main
from hippoformer.training.arguments import config_options, parse
from hippoformer.training.credit import measure_credit, reconfigured, useful
from hippoformer.training.hidden_states import HiddenStateCache
from hippoformer.training.learning_rates import model_parameter_groups
from hippoformer.training.readers import CachedReader, LiveReader
from hippoformer.training.streams import Piece, TextStreams
from hippoformer.training.trainer import Trainer, TrainingOptions
from tiny import small_config, untrained
from tiny_training import arguments, small_base, texts

SEGMENT = 6  # of the small models


def model(**options: object) -> HippoFormer:
    return untrained("llama", **options)


# ---------------------------------------------------------------- the order of reading


def test_every_document_is_read_whole_and_from_its_beginning() -> None:
    lengths = [13, 5, 1, 20]  # the third has no prediction to learn from
    streams = TextStreams(lengths, rows=2, segment_len=6, seed=1)
    read: dict[int, list[tuple[int, int]]] = {0: [], 1: [], 3: []}
    for _ in range(40):
        piece = streams.next()
        for row, (document, start, n) in enumerate(zip(piece.documents, piece.start, piece.length, strict=True)):
            assert (start == 0) == (row in piece.fresh)
            assert 1 <= n <= 6 and start % 6 == 0
            read[document].append((start, n))
    for document, spans in read.items():
        whole = [(s, min(6, lengths[document] - s)) for s in range(0, lengths[document], 6)]
        assert len(spans) >= len(whole)
        # Up to the piece a row is in just now, what was read is whole passes in order.
        finished = [span for span in spans if span[0] == whole[-1][0]]
        assert len(finished) >= len(spans) // len(whole) - 2


def test_an_epoch_takes_every_document_once() -> None:
    streams = TextStreams([6] * 7, rows=1, segment_len=6, seed=5)
    taken = [streams.next().documents[0] for _ in range(14)]
    assert sorted(taken[:7]) == sorted(taken[7:]) == list(range(7))
    assert taken[:7] != taken[7:]


def test_schedule_resumes_exactly() -> None:
    streams = TextStreams([13, 40, 7, 22], rows=3, segment_len=6, seed=2)
    for _ in range(5):
        streams.next()
    state = json.loads(json.dumps(streams.state()))
    expected = [streams.next() for _ in range(20)]
    again = TextStreams([13, 40, 7, 22], rows=3, segment_len=6, seed=2)
    again.restore(state)
    assert [again.next() for _ in range(20)] == expected


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(TextError, match="two tokens"):
        TextStreams([1, 0], rows=1, segment_len=6, seed=0)


# ---------------------------------------------------------------- reading


def test_cached_and_live_reading_agree_and_match_scoring(tmp_path: Path) -> None:
    m = model()
    m.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    m.hippocampus.recall.null_proj.bias.data.fill_(1.0)
    documents = texts(40, 29)
    cached = CachedReader(m, HiddenStateCache(m, documents, tmp_path), 2)
    live = LiveReader(m, documents, 2)
    expected = [m.score(ids.unsqueeze(0))[0] for ids in documents]
    got: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for start in range(0, 29, SEGMENT):
            lengths = [min(SEGMENT, len(d) - start) for d in documents]
            piece = Piece([0, 1], [start, start], lengths, [0, 1] if start == 0 else [])
            one, other = cached.read(piece), live.read(piece)
            torch.testing.assert_close(one.target_log_prob, other.target_log_prob, rtol=1e-4, atol=1e-5)
            for row, n in enumerate(lengths):
                got[row].append(one.target_log_prob[row, :n])
    for row, n in ((0, 30), (1, 29)):
        torch.testing.assert_close(torch.cat(got[row])[1:n], expected[row][: n - 1], rtol=1e-4, atol=1e-5)


def test_a_fresh_row_knows_nothing_of_the_document_before(tmp_path: Path) -> None:
    m = model()
    m.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    documents = HiddenStateCache(m, texts(24, 12), tmp_path)
    used, new = CachedReader(m, documents, 1), CachedReader(m, documents, 1)
    with torch.no_grad():
        for start in range(0, 24, SEGMENT):
            used.read(Piece([0], [start], [SEGMENT], [0] if start == 0 else []))
        after = used.read(Piece([1], [0], [SEGMENT], [0]))
        alone = new.read(Piece([1], [0], [SEGMENT], [0]))
    assert torch.equal(after.target_log_prob, alone.target_log_prob)
    assert torch.equal(after.found.forecast, alone.found.forecast)


def test_padding_is_not_counted(tmp_path: Path) -> None:
    m = model()
    reader = CachedReader(m, HiddenStateCache(m, texts(24, 3), tmp_path), 2)
    reading = reader.read(Piece([0, 1], [0, 0], [SEGMENT, 3], [0, 1]))
    assert reading.counted.tolist() == [[False] + [True] * 5, [False, True, True, False, False, False]]
    assert (reading.target_log_prob[~reading.counted] == 0).all()


def test_hidden_states_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m, documents = model(), texts(20, 31)
    first = HiddenStateCache(m, documents, tmp_path)
    monkeypatch.setattr(m, "stream", None)  # a second computation would call it
    again = HiddenStateCache(m, documents, tmp_path)
    assert torch.equal(first[1].hidden, again[1].hidden) and torch.equal(again[1].tokens, documents[1])
    with m.memory_off():
        monkeypatch.undo()
        torch.testing.assert_close(again[1].log_prob[1:], m.score(documents[1].unsqueeze(0))[0])


def test_hidden_states_of_several_layers_serve_each_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents, options = texts(20, 31), {"residual_readout": False}
    both = HiddenStateCache(model(memory_layer=[1, -1], **options), documents, tmp_path / "both")
    for layer, place in ((1, 0), (-1, 1)):
        m = model(memory_layer=layer, **options)
        computed = HiddenStateCache(m, documents, tmp_path / "alone")
        monkeypatch.setattr(m, "stream", None)  # a computation would call it
        found = HiddenStateCache(m, documents, tmp_path / "both")
        for number, ids in enumerate(documents):
            assert torch.equal(found[number].hidden, computed[number].hidden)
            assert torch.equal(found[number].hidden, both[number].hidden.chunk(2, dim=-1)[place])
            assert torch.equal(found[number].tokens, ids)


# ---------------------------------------------------------------- credit


def test_credit_goes_to_what_foretold(tmp_path: Path) -> None:
    """In a text that repeats itself beyond the window, the first copy earns credit and noise does not."""
    m = model(window=6)
    m.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    m.hippocampus.recall.null_proj.bias.data.fill_(0.0)
    m.hippocampus.recall.log_scale.data.fill_(3.0)
    phrase, noise = torch.arange(8), torch.arange(20, 50)
    text = torch.cat((phrase, noise, phrase, torch.arange(50, 56)))
    (credit,) = measure_credit(m.hippocampus, [HiddenStateCache(m, [text], tmp_path)[0]])
    assert math.isnan(credit[0]) and credit[-1].isnan()
    assert credit[1:8].sum() > 5 * credit[8:38].sum()
    assert useful(torch.tensor([0.0, 0.3, 1.0, 2.5])).tolist() == pytest.approx([0.0, 0.3, 1.0, 1.0])
    assert torch.equal(useful(credit).isnan(), credit.isnan())


def test_credit_measured_side_by_side_is_that_of_each_alone(tmp_path: Path) -> None:
    """Of a text that ends within a segment, one that ends with one, and the longest."""
    m = model(window=6)
    m.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    m.hippocampus.recall.null_proj.bias.data.fill_(0.0)
    draws = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 12, (length,), generator=draws) for length in (45, 24, 64, 3)]
    states = HiddenStateCache(m, texts, tmp_path)
    together = measure_credit(m.hippocampus, [states[number] for number in range(len(texts))])
    assert sum(float(credit.nansum()) for credit in together) > 0.1
    for number, credit in enumerate(together):
        (alone,) = measure_credit(m.hippocampus, [states[number]])
        torch.testing.assert_close(credit, alone, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_a_row_that_is_done_waits_as_it_is(tmp_path: Path) -> None:
    """It ends with a segment, and must not sleep again while the other row reads on."""
    m = model(window=6)
    draws = torch.Generator().manual_seed(5)
    segment = m.config.segment_len
    texts = [torch.randint(0, 60, (length,), generator=draws) for length in (5 * segment, 9 * segment + 1)]
    states = HiddenStateCache(m, texts, tmp_path)
    together, alone = CachedReader(m, states, 2), CachedReader(m, states, 1)
    with torch.no_grad():
        for reader, numbers in ((together, [0, 1]), (alone, [0])):
            assert all(reading.counted.any() for reading in reader.through(numbers))
    for name, tensor in alone.memory.episodes.tensors().items():
        torch.testing.assert_close(together.memory.episodes.tensors()[name][0], tensor[0], rtol=1e-4, atol=1e-5)


def test_reconfigured_puts_the_options_back() -> None:
    m = model()
    before = m.hippocampus.config
    with pytest.raises(RuntimeError), reconfigured(m.hippocampus, selection="fifo") as config:
        assert m.hippocampus.config is config and config.selection == "fifo"
        raise RuntimeError
    assert m.hippocampus.config is before


# ---------------------------------------------------------------- what learns how fast


def test_the_base_learns_at_a_tenth_of_the_rate_and_adapters_are_float32(folder: Path) -> None:
    """Steps of a tenth of 1e-4 would be lost in bfloat16's three digits."""
    half = load_base_model(str(folder / "base"), dtype=torch.bfloat16)
    m = HippoFormer(small_config(use_lora=True, lora_r=2, learning_rate=1e-3), half)
    rates = {id(p): group["lr"] for group in model_parameter_groups(m) for p in group["params"]}
    adapters = [p for p in m.base.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} == {torch.float32} and m.dtype == torch.bfloat16
    assert {rates[id(p)] for p in adapters} == {1e-4}
    assert {rates[id(p)] for p in m.hippocampus.parameters() if p.dim() > 1} == {1e-3}
    assert len(rates) == sum(p.requires_grad for p in m.parameters())


# ---------------------------------------------------------------- whole runs


# How a run may train: the hippocampus on hidden states of a frozen base, with adapters, with the base's own weights.
WAYS = [
    pytest.param([], marks=pytest.mark.supports(trainer="frozen")),
    pytest.param(["--lora_r", "2"], marks=pytest.mark.supports(trainer="lora")),
    pytest.param(["--train_base"], marks=[pytest.mark.supports(trainer="base"), pytest.mark.slow]),
    pytest.param(["--lora_r", "2", "--memory_off"], marks=pytest.mark.slow),
]


@pytest.mark.supports(precision="float32", mode="killed and resumed", architecture="llama")
@pytest.mark.parametrize("mode", WAYS)
def test_a_killed_run_resumes_to_the_same_weights(
    folder: Path, mode: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(folder, "whole", *mode)) == 0
    save = Trainer._save

    def killed(self: Trainer) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(folder, "parts", *mode))
    monkeypatch.undo()
    assert main(arguments(folder, "parts", *mode, "--resume_from_checkpoint", str(folder / "parts"))) == 0
    files = ["model.safetensors"] + (["base/model.safetensors"] if mode == ["--train_base"] else [])
    for file in files:
        whole, parts = load_file(folder / "whole" / file), load_file(folder / "parts" / file)
        assert whole.keys() == parts.keys()
        assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_training_lowers_the_loss_and_leaves_a_frozen_base_alone(folder: Path) -> None:
    from hippoformer.model.weights import base_fingerprint

    assert main(arguments(folder, "run", "--eval_text", str(folder / "text.txt"), "--eval_steps", "8")) == 0
    log = json.loads((folder / "run" / "training_log.json").read_text())
    evaluation = [entry for entry in log["history"] if "eval_perplexity" in entry]
    assert evaluation[-1]["eval_perplexity"] < evaluation[-1]["eval_base_perplexity"]
    model = HippoFormer.from_pretrained(folder / "run")
    assert base_fingerprint(model.base) == base_fingerprint(small_base())
    assert (folder / "run" / "README.md").is_file(), "a trained model has its card"
    assert log["run"]["seed"] == 42 and log["arguments"]["max_steps"] == 8


def test_a_run_can_go_on_from_a_saved_hippocampus(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second run that learns nothing ends with the weights of the first; another shape is refused."""
    first, short = folder / "first", ["--recall_share", "1.0", "--max_steps"]
    assert main(arguments(folder, "first", *short, "2")) == 0
    monkeypatch.setattr("hippoformer.train.shipped_hippocampus", {"the-short-name": first}.get)
    shipped = ["--hippocampus", "the-short-name", *short, "1"]
    assert main(arguments(folder, "second", *shipped, "--learning_rate", "1e-12")) == 0
    more = ["--hippocampus", str(first), *short, "1"]
    saved = [load_file(path / "model.safetensors") for path in (first, folder / "second")]
    for name, tensor in saved[0].items():
        if "anchor" not in name:
            torch.testing.assert_close(saved[1][name], tensor, rtol=0.0, atol=1e-6)
    assert main([*arguments(folder, "third", *more), "--set", "segment_len=6", "recall_n_heads=8"]) == 2
    assert "does not fit" in capsys.readouterr().err
    words = arguments(folder, "fourth", *more, "--learning_rate", "1e-12", "--seed", "5")
    assert main([*words[: words.index("--set")], "--set", "decay_rate=0.7"]) == 0, (
        "shapes and segments are those of the first"
    )
    went_on, before = (json.loads((path / "config.json").read_text()) for path in (folder / "fourth", first))
    assert {name for name in before if went_on[name] != before[name]} == {"decay_rate", "seed", "learning_rate"}


def test_with_the_memory_off_the_base_learns_alone(folder: Path) -> None:
    """Its loss is the base's own; the hippocampus, its anchors and its options are carried along to the last bit."""
    assert main([*arguments(folder, "first", "--max_steps", "4"), "decay_rate=0.7"]) == 0
    short = ["--max_steps", "30", "--lora_r", "4", "--learning_rate", "0.05", "--logging_steps", "1"]
    sizes = ["--window", "12", "--buffer_size", "16"]  # what was given stays given
    words = arguments(folder, "alone", "--hippocampus", str(folder / "first"), "--memory_off", *short, *sizes)
    assert main(words[: words.index("--set")]) == 0
    first, alone = (load_file(folder / name / "model.safetensors") for name in ("first", "alone"))
    assert [name for name in first if not torch.equal(first[name], alone[name])] == []
    assert any(tensor.any() for name, tensor in alone.items() if "lora_B" in name)
    trained = HippoFormer.from_pretrained(folder / "alone")
    assert trained.config.use_lora and trained.config.decay_rate == 0.7 and trained.config.segment_len == SEGMENT
    history = json.loads((folder / "alone" / "training_log.json").read_text())["history"]
    assert all(entry["perplexity"] == pytest.approx(entry["base_perplexity"]) for entry in history)
    assert history[-1]["perplexity"] < 0.9 * history[0]["perplexity"]
    assert history[-1]["drift"] > 0 and "salience_mean" not in history[0]
    ids = torch.tensor(load_tokenizer(str(folder / "base"))((folder / "text.txt").read_text()).input_ids)
    with trained.memory_off():
        after = trained.score(ids.unsqueeze(0)).mean()
    untrained = HippoFormer(small_config(), small_base())
    with untrained.memory_off():
        assert after > untrained.score(ids.unsqueeze(0)).mean() + 0.1


def test_memory_off_over_a_frozen_base_has_nothing_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to train"):
        Trainer(model(), TrainingOptions(tmp_path, rows=1, memory_off=True), texts(20))


def test_a_disk_that_fills_up_during_a_checkpoint_leaves_the_one_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(arguments(folder, "run")) == 0
    output = folder / "run"
    before = checkpoints.whole(output)
    m = HippoFormer.from_pretrained(output)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hippoformer.model.checkpoint.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.save(output, 99, m, {"x": torch.zeros(1)}, {}, keep=2)
    assert checkpoints.whole(output) == before
    assert checkpoints.load(output)[2]["step"] == 8
    assert not list(output.glob("*99*")) and not list(output.glob(".*99*"))


def test_a_half_written_checkpoint_is_not_a_checkpoint(folder: Path) -> None:
    assert main(arguments(folder, "run")) == 0
    broken = folder / "run" / "checkpoint-00000099"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"\x00" * 10)
    assert checkpoints.load(folder / "run")[2]["step"] == 8
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.load(broken)


def test_checkpoints_hold_no_pickle(folder: Path) -> None:
    assert main(arguments(folder, "run")) == 0
    for file in (folder / "run").rglob("*"):
        assert file.is_dir() or file.suffix in {".safetensors", ".json", ".md"}, file


# ---------------------------------------------------------------- arguments


def test_flags_are_accepted_with_either_dash() -> None:
    one = parse(["--text", "a", "--max_seq_length", "512", "--lora_r", "4", "--no_wandb"])
    other = parse(["--text", "a", "--max-seq-length", "512", "--lora-r", "4", "--no-wandb"])
    assert one == other and one.max_seq_length == 512 and one.no_wandb


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--text"),
        (["--text", "a", "--dataset", "wikitext"], "either"),
        (["--text", "a", "--max_steps", "3", "--num_epochs", "1"], "one of them"),
        (["--text", "a", "--lora_r", "4", "--train_base"], "choose"),
        (["--text", "a", "--gradient_checkpointing"], "frozen"),
        (["--text", "a", "--memory_off"], "only the base"),
    ],
)
def test_contradicting_flags_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse(argv)


def test_config_options_are_json_or_text() -> None:
    assert config_options(["a=1", "b=[1, 2]", "c=fifo"]) == {"a": 1, "b": [1, 2], "c": "fifo"}
    with pytest.raises(ConfigurationError, match="name=value"):
        config_options(["a"])


def test_errors_are_explained_not_raised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base_model", str(folder / "base"), "--text", str(folder / "missing.txt")]) == 2
    assert "missing.txt" in capsys.readouterr().err
    assert main(arguments(folder, "run", "--max-seq-length", "7")) == 2
    assert "multiple of segment_len" in capsys.readouterr().err
