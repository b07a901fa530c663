"""The parts of training: the order of reading, the readers, the losses, credit, and what the gate learns from it."""

import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from hippoformer import ConsolidationRScore, HippoFormer, HippoFormerLoss
from hippoformer.errors import TextError
from hippoformer.training.arguments import TrainArguments
from hippoformer.training.credit import measure_credit, teach_gate
from hippoformer.training.readers import CachedReader, HiddenStateCache, LiveReader, score_documents
from hippoformer.training.streams import Piece, TextStreams, whole_documents
from tiny import untrained as fresh
from tiny_training import SEGMENT, texts


def listening(**options: object) -> HippoFormer:
    """A model whose recall is heard."""
    model = fresh("llama", **{"residual_readout": False} | options)
    model.hippocampus.fusion.gate_out.bias.data.fill_(-1.0)
    model.hippocampus.recall.null_proj.bias.data.fill_(0.0)
    return model


# ---------------------------------------------------------------- the order of reading


def test_every_document_is_read_whole_and_from_its_beginning() -> None:
    lengths = [13, 5, 1, 20]  # the third has no prediction to learn from
    streams = TextStreams(lengths, rows=2, segment_len=6, seed=1)
    read: list[list[int]] = [[], []]
    for _ in range(40):
        piece = streams.next()
        assert all(1 <= n <= 6 for n in piece.new)
        for row, (document, span) in enumerate(zip(piece.documents, piece.spans, strict=True)):
            assert (span.start == 0) == (row in piece.fresh)
            if span.start == 0:
                assert not read[row] or read[row][-1] in lengths, "a document was left in its middle"
            else:
                assert span.start == read[row][-1]
            assert span.stop <= lengths[document] and document != 2
            read[row].append(span.stop)


def test_an_epoch_takes_every_document_once() -> None:
    streams = TextStreams([6] * 7, rows=1, segment_len=6, seed=5)
    taken = [streams.next().documents[0] for _ in range(14)]
    assert sorted(taken[:7]) == sorted(taken[7:]) == list(range(7))
    assert taken[:7] != taken[7:]


def test_schedule_resumes_exactly() -> None:
    streams, again = (TextStreams([13, 40, 7, 22], rows=3, segment_len=6, seed=2) for _ in range(2))
    for _ in range(5):
        streams.next()
    again.restore(json.loads(json.dumps(streams.state())))
    assert [again.next() for _ in range(20)] == [streams.next() for _ in range(20)]


def test_nothing_to_train_on_is_said() -> None:
    with pytest.raises(TextError, match="two tokens"):
        TextStreams([1, 0], rows=1, segment_len=6, seed=0)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("residual", [False, True])
@torch.no_grad()
def test_cached_and_live_reading_agree_with_scoring(tmp_path: Path, residual: bool) -> None:
    model, documents = listening(residual_readout=residual), texts(40, 29)
    states = HiddenStateCache(model, documents, tmp_path)
    expected = [-float(model.score(ids.unsqueeze(0)).double().sum()) for ids in documents]
    with model.memory_off():
        base = [-float(model.score(ids.unsqueeze(0)).double().sum()) for ids in documents]
    for read in (states, documents):
        for number, (tokens, fused, alone) in enumerate(score_documents(model, read, [0, 1], rows=2).tolist()):
            assert tokens == len(documents[number]) - 1
            assert -fused == pytest.approx(expected[number], rel=1e-4) != pytest.approx(base[number], rel=1e-4)
            assert -alone == pytest.approx(base[number], rel=1e-4)


@torch.no_grad()
def test_a_fresh_row_knows_nothing_of_the_document_before(tmp_path: Path) -> None:
    model = listening()
    documents = HiddenStateCache(model, texts(24, 12), tmp_path)
    used, new = CachedReader(model, documents, 1), CachedReader(model, documents, 1)
    for piece in whole_documents([0], [24], SEGMENT):
        used.read(piece)
    piece = Piece([1], [0], [SEGMENT])
    after, alone = used.read(piece), new.read(piece)
    assert torch.equal(after.target_log_prob, alone.target_log_prob)
    assert torch.equal(after.found.forecast, alone.found.forecast)


def test_padding_is_not_counted(tmp_path: Path) -> None:
    model = listening()
    for reader in (
        CachedReader(model, HiddenStateCache(model, texts(24, 3), tmp_path), 2),
        LiveReader(model, texts(24, 3), 2),
    ):
        reading = reader.read(Piece([0, 1], [0, 0], [SEGMENT, 3]))
        assert reading.counted.tolist() == [[False] + [True] * 5, [False, True, True, False, False, False]]
        assert (reading.target_log_prob[~reading.counted] == 0).all()


@torch.no_grad()
def test_a_row_that_is_done_waits_as_it_is(tmp_path: Path) -> None:
    """It ends with a segment, and must not be consolidated again while the other row reads on."""
    model = fresh("llama", window=6)
    states = HiddenStateCache(model, texts(5 * SEGMENT, 9 * SEGMENT + 1), tmp_path)
    together, alone = CachedReader(model, states, 2), CachedReader(model, states, 1)
    for reader, numbers in ((together, [0, 1]), (alone, [0])):
        for piece in whole_documents(numbers, [states.lengths[number] for number in numbers], SEGMENT):
            assert reader.read(piece).counted.any()
    for name, tensor in alone.cache.memory.episodes.tensors().items():
        got = together.cache.memory.episodes.tensors()[name][0]
        torch.testing.assert_close(got, tensor[0], rtol=1e-4, atol=1e-5)


def test_hidden_states_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = fresh("llama"), texts(20, 31)
    first = HiddenStateCache(model, documents, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(model, "stream", None)  # a second computation would call it
        again = HiddenStateCache(model, documents, tmp_path)
    assert torch.equal(first[1].hidden, again[1].hidden) and torch.equal(again[1].tokens, documents[1])
    with model.memory_off():
        torch.testing.assert_close(again[1].log_prob[1:], model.score(documents[1].unsqueeze(0))[0])


# ---------------------------------------------------------------- losses


def loss_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(3, 7, generator=generator) for _ in range(6))
    log_prob, counted, salience, forecast, useful, unknown = draws
    inputs = {"target_log_prob": -3 * log_prob, "counted": counted > 0.3, "salience": salience}
    return inputs | {"forecast": 4 * forecast - 1, "useful": torch.where(unknown > 0.4, useful, torch.nan)}


def test_every_term_by_hand() -> None:
    terms = HippoFormerLoss(lm=1.3, credit=0.9, sparsity=0.2, target_tagged_share=0.25)(**loss_inputs())
    log_prob, counted, salience, forecast, useful = (tensor.tolist() for tensor in loss_inputs().values())
    tokens = [(r, t) for r in range(3) for t in range(7) if counted[r][t]]
    known = [(r, t) for r, t in tokens if not math.isnan(useful[r][t])]
    error = 0.0
    for r, t in known:
        share = 1 / (1 + math.exp(-forecast[r][t]))
        error -= useful[r][t] * math.log(share) + (1 - useful[r][t]) * math.log(1 - share)
    expected = {
        "lm": sum(-log_prob[r][t] for r, t in tokens) / len(tokens),
        "sparsity": max(0.0, sum(salience[r][t] for r, t in tokens) / len(tokens) - 0.25) ** 2,
        "credit": error / len(known),
    }
    assert expected["sparsity"] > 0
    expected["total"] = 1.3 * expected["lm"] + 0.2 * expected["sparsity"] + 0.9 * expected["credit"]
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_padding_never_counts(garbage: float) -> None:
    """Whatever stands where nothing is counted: values and gradients stay as they are."""
    inputs, results = loss_inputs(), []
    counted = inputs.pop("counted")
    for fill in (0.0, garbage):
        own = {name: torch.where(counted, tensor, fill).requires_grad_() for name, tensor in inputs.items()}
        terms = HippoFormerLoss()(**own, counted=counted)
        terms["total"].backward()
        grads = [own[name].grad for name in ("target_log_prob", "salience", "forecast")]
        assert not any(grad[~counted].any() for grad in grads)
        results.append((float(terms["total"].detach()), [grad[counted].tolist() for grad in grads]))
    assert results[0] == results[1]
    nothing = HippoFormerLoss()(**inputs, counted=torch.zeros_like(counted))
    assert set(map(float, nothing.values())) == {0.0}


def test_consolidation_r_is_pearsons() -> None:
    score, generator = ConsolidationRScore(), numpy.random.default_rng(0)
    assert math.isnan(score.compute())
    salience, quality = generator.random(300), generator.random(300)
    quality += 0.8 * salience
    counted = generator.random(300) > 0.2
    for part in numpy.array_split(numpy.arange(300), 4):
        score.update(*(torch.tensor(values[part]) for values in (salience, quality, counted)))
    assert score.compute() == pytest.approx(numpy.corrcoef(salience[counted], quality[counted])[0, 1], abs=1e-9)
    constant = ConsolidationRScore()
    constant.update(torch.ones(5), torch.rand(5), torch.ones(5, dtype=torch.bool))
    assert math.isnan(constant.compute())


# ---------------------------------------------------------------- credit


def test_credit_goes_to_what_predicted(tmp_path: Path) -> None:
    """In a text that repeats itself beyond the window, the first copy earns credit and noise does not."""
    model = listening(window=6)
    model.hippocampus.recall.log_scale.data.fill_(3.0)
    phrase = torch.arange(8)
    text = torch.cat((phrase, torch.arange(20, 50), phrase, torch.arange(50, 56)))
    document = HiddenStateCache(model, [text], tmp_path)[0]
    (credit,) = measure_credit(model.hippocampus, [document])
    assert math.isnan(credit[0]) and credit[-1].isnan()
    assert credit[1:8].sum() > 5 * credit[8:38].sum()


def test_credit_measured_side_by_side_is_that_of_each_alone(tmp_path: Path) -> None:
    """Of a text that ends within a segment, one that ends with one, and the longest."""
    model, draws = listening(window=6), torch.Generator().manual_seed(3)
    states = HiddenStateCache(
        model, [torch.randint(0, 12, (length,), generator=draws) for length in (45, 24, 64, 3)], tmp_path
    )
    together = measure_credit(model.hippocampus, [*states])
    assert sum(float(credit.nansum()) for credit in together) > 0.1
    for number, credit in enumerate(together):
        (alone,) = measure_credit(model.hippocampus, [states[number]])
        torch.testing.assert_close(credit, alone, rtol=1e-4, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------- the gate

WORTH = 7  # transitions into this token turn out to be useful, all others useless


def lesson(tmp_path: Path) -> tuple[HippoFormer, HiddenStateCache, dict[int, Tensor]]:
    torch.manual_seed(5)
    model, draws = fresh("llama", residual_readout=False), torch.Generator().manual_seed(1)
    states = HiddenStateCache(
        model, [torch.randint(0, 12, (length,), generator=draws) for length in (700, 300, 90)], tmp_path
    )
    useful = {number: (states.texts[number] == WORTH).float() for number in range(2)}
    useful[0][:50] = torch.nan
    return model, states, useful


@torch.no_grad()
def forecast(model: HippoFormer, states: HiddenStateCache, number: int) -> Tensor:
    """(T - 1,) of the local pathway, for the transitions of a document."""
    read, hippocampus = states[number], model.hippocampus
    hidden = hippocampus.normed(read.hidden.float()).unsqueeze(0)
    return hippocampus.salience_gate.at_a_glance(hidden[:, :-1], hidden[:, 1:], -read.log_prob[None, 1:])[0]


def test_the_gate_learns_what_can_be_predicted(tmp_path: Path) -> None:
    """Also in a document that was not measured; nothing but the gate changes, and the target share is tagged."""
    model, states, useful = lesson(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.hippocampus.state_dict().items()}
    first = teach_gate(model.hippocampus, states, useful, TrainArguments(foresight_passes=1, learning_rate=1e-3))
    last = teach_gate(model.hippocampus, states, useful, TrainArguments(foresight_passes=40, learning_rate=1e-2))
    assert last < first / 2
    salience, worth = torch.sigmoid(forecast(model, states, 2)), states.texts[2][1:] == WORTH
    assert salience[worth].mean() > 2 * salience[~worth].mean()
    changed = {n for n, tensor in model.hippocampus.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed and all(name.startswith("salience_gate.") for name in changed)
    tagged = forecast(model, states, 0) > model.hippocampus.salience_gate.tagging_threshold
    assert tagged.float().mean().item() == pytest.approx(0.3, abs=0.1), "however rarely anything is useful"


def test_the_gate_is_a_function_of_the_seed(tmp_path: Path) -> None:
    weights = []
    for seed in (0, 0, 1):
        model, states, useful = lesson(tmp_path)
        torch.manual_seed(seed + len(weights))  # what else was drawn must not matter
        teach_gate(model.hippocampus, states, useful, TrainArguments(foresight_passes=2, seed=seed))
        weights.append(model.hippocampus.salience_gate.local_in.weight.clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_nothing_known_teaches_nothing(tmp_path: Path) -> None:
    model, states, useful = lesson(tmp_path)
    before = model.hippocampus.salience_gate.local_in.weight.clone()
    for nothing in ({}, {number: torch.full_like(target, torch.nan) for number, target in useful.items()}):
        assert math.isnan(teach_gate(model.hippocampus, states, nothing, TrainArguments(foresight_passes=2)))
    assert torch.equal(model.hippocampus.salience_gate.local_in.weight, before)
