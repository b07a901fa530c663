"""The store of passages: cut where the text pauses, whatever the chunks; bounded; rows and copies apart."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hippoformer.errors import InputError
from hippoformer.hippocampus.passages import LONGEST, RULES, Passages
from hippoformer.hippocampus.spelling import Spelling

BYTES = Spelling([bytes([byte]) for byte in range(256)] + [b""])
CONTROL = 256
PROSE = (
    "Mr. Smith met Dr. J. Brown at 3.15 in St. Ives. They spoke of the harbour!\n\n"
    "Ann: I went to the shop\nBob: What did you buy? Nothing, e.g. no bread, I hope.\n"
    "今天天气很好。我们去公园吧！那里有很多花，很多树，还有一个小湖。\n"
    "😀 👩‍👩‍👧 and 🎉, all in one line without an end " + "word, " * 40 + "\n" + "x" * 200 + "\n"
)


def split(text: str) -> list[str]:
    pieces: list[str] = []
    for word in text.replace("\n", " \n ").split(" "):
        pieces.append(word if word == "\n" or not pieces else " " + word)
    return pieces


def read(text: str | list[int], chunks: list[int] | None = None, **options: object) -> Passages:
    """One row of bytes in chunks of the given sizes, over and over."""
    ids = list(text.encode()) if isinstance(text, str) else text
    store, done, turn = Passages(1, BYTES, **options), 0, 0  # type: ignore[arg-type]
    sizes = chunks or [len(ids)]
    while done < len(ids):
        piece = torch.tensor([ids[done : done + sizes[turn % len(sizes)]]])
        store.append(piece, salience=(torch.arange(done, done + piece.shape[1]) % 7)[None] / 8)
        done, turn = done + piece.shape[1], turn + 1
    return store


def shown(store: Passages, row: int = 0) -> list[tuple[object, ...]]:
    return [(p.start, p.token_ids.tolist(), p.salience, str(p.priority), p.rehearsed) for p in store.of_row(row)]


def passages_of(text: str) -> list[str]:
    """Passages of a text in tokens of a word each, with the space in front of it, and line ends."""
    pieces = split(text)
    spelling = Spelling([piece.encode() for piece in pieces])
    store = Passages(1, spelling)
    store.append(torch.arange(len(pieces))[None])
    return [spelling.text(passage.token_ids) for passage in store.of_row(0)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 400), st.integers(0, 400))
def test_chunks_make_no_difference(chunks: list[int], skip: int, repeat: int) -> None:
    ids = list((PROSE * 2).encode())[skip : skip + 900]
    ids[repeat % len(ids)] = CONTROL
    assert shown(read(ids, chunks)) == shown(read(ids))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=600), st.text(max_size=300))
def test_passages_are_the_text_in_whole_characters(noise: bytes, text: str) -> None:
    for ids in (list(noise), list(text.encode())):
        passages = read(ids).of_row(0) if ids else []
        assert [token for passage in passages for token in passage.token_ids] == ids
        assert all(left.stop == right.start for left, right in pairwise(passages))
        assert all(0 < len(passage) <= LONGEST for passage in passages[:-1])
    assert "\ufffd" not in "".join(BYTES.text(p.token_ids) for p in passages).replace(
        "\ufffd", "", text.count("\ufffd")
    )


@pytest.mark.parametrize("letters", ["猫" * 300, "🎉" * 300, "é" * 300])
def test_no_character_is_cut_where_none_pauses(letters: str) -> None:
    assert all("\ufffd" not in BYTES.text(passage.token_ids) for passage in read(letters).of_row(0))


def test_abbreviations_initials_and_numbers_end_no_sentence() -> None:
    filler = "and so they went on and on about it for a good long while until at last they saw the man"
    for name in ("Mr. Darcy", "Dr. Brown", "J. R. Hartley", "St. Ives", "3.14 m", "No. 7"):
        text = f"{filler} {filler} called {name} of the town. Then it was over. But {filler} {filler}."
        first = passages_of(text)[0]
        assert first.endswith("Then it was over."), (name, first)


@pytest.mark.parametrize("stop", ["。", "！", "؟", "।", ". ", "? ", "…\n"])
def test_sentences_end_in_every_script(stop: str) -> None:
    text = "".join("词" * 12 + stop for _ in range(4)) if stop != ". " else "Abcdefgh ijklm nopq. " * 6
    for passage in read(text).of_row(0)[:-1]:
        assert BYTES.text(passage.token_ids).strip().endswith(stop.strip())


def test_a_turn_stays_whole_and_a_wrapped_line_is_no_end() -> None:
    talk = "Ann: I went to the shop. It was shut\nBob: What a pity. Did you ring them\nAnn: No I did not"
    assert [passage.strip() for passage in passages_of(talk)] == talk.split("\n")
    wrapped = "It was late when the two of them came to the house of old Mr.\nDarcy and {} of the Bennets were\nin bed."
    assert len(passages_of(wrapped.format("all of the others and most"))) == 1
    assert len(passages_of(wrapped.format("all"))) == 2  # a line too short to have been broken for its length


def test_a_control_token_ends_a_line() -> None:
    ids = [*b"Who is there?", CONTROL, *b"Nobody at all", CONTROL]
    assert [BYTES.text(p.token_ids) for p in read(ids).of_row(0)] == ["Who is there?", "Nobody at all"]


def test_rows_never_meet() -> None:
    first, second = list(PROSE.encode())[:500], list((PROSE[::-1]).encode())[:300]
    store = Passages(2, BYTES)
    for at in range(0, 500, 50):
        ids = torch.full((2, 50), 120)
        ids[0] = torch.tensor(first[at : at + 50])
        mine = second[at : at + 50]
        ids[1, : len(mine)] = torch.tensor(mine, dtype=torch.long)
        store.append(ids, [50, len(mine)])
    for row, alone in enumerate((first, second)):
        one = Passages(1, BYTES)
        one.append(torch.tensor([alone]))
        assert shown(store, row) == shown(one)
    swapped = store.select_rows([1, 0, 1])
    assert [shown(swapped, row) for row in range(3)] == [shown(store, row) for row in (1, 0, 1)]
    with pytest.raises(InputError, match="2 rows, from 0"):
        store.of_row(2)
    with pytest.raises(InputError, match="3 rows of tokens"):
        store.append(torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("rule", RULES)
def test_a_full_store_keeps_the_best_whole(rule: str) -> None:
    store = read(PROSE * 8, capacity=300, rule=rule)
    everything = read(PROSE * 8, capacity=10**6, rule=rule).of_row(0)
    kept = store.of_row(0)
    assert 300 - LONGEST <= sum(map(len, kept[:-1])) <= 300
    assert {(p.start, p.stop) for p in kept} <= {(p.start, p.stop) for p in everything}
    assert [p.start for p in kept] == sorted(p.start for p in kept)
    if rule == "fifo":
        assert [p.start for p in kept] == [p.start for p in everything[-len(kept) :]]
    assert shown(store) == shown(read(PROSE * 8, [37], capacity=300, rule=rule))
    with pytest.raises(InputError, match="at least"):
        Passages(1, BYTES, capacity=10)
    with pytest.raises(InputError, match="novelty"):
        Passages(1, BYTES, rule="rule")


def test_what_was_never_said_before_stays() -> None:
    """Of a text that goes on about the same things a full store keeps what is new, wherever it stood."""
    dull, fact = (
        "The cat sat on the mat and the dog lay by the door.\n",
        "Mrs. Olafsson keeps 17 parrots in Trondheim.\n",
    )
    for before in (2, 40, 75):
        text = dull * before + fact + dull * (80 - before)
        kept = "".join(BYTES.text(p.token_ids) for p in read(text, capacity=300).of_row(0))
        assert "parrots in Trondheim" in kept
        assert (
            "parrots" in "".join(BYTES.text(p.token_ids) for p in read(text, capacity=300, rule="fifo").of_row(0))
        ) == (before == 75)


def test_what_an_answer_stood_on_stays() -> None:
    store = read(PROSE, capacity=400)
    lowest = min(store.of_row(0)[:-1], key=lambda passage: passage.priority)
    for _ in range(9):
        store.rehearse(0, [lowest])
    store.append(torch.tensor([list((PROSE * 3).encode())]))
    stayed = [p for p in store.of_row(0) if p.start == lowest.start]
    assert [p.rehearsed for p in stayed] == [9]


def test_copies_go_on_by_themselves() -> None:
    store = read(PROSE)
    before = shown(store)
    copy = store.copy()
    copy.append(torch.tensor([list(PROSE.encode())]))
    copy.rehearse(0, copy.of_row(0)[:1])
    assert shown(store) == before and len(shown(copy)) > len(before)
    assert store.of_row(0)[1] is copy.of_row(0)[1]
    copy.forget(0, lambda passage: True)
    copy.reset()
    assert shown(copy) == [] and shown(store) == before


def test_what_is_forgotten_is_gone_and_reading_goes_on() -> None:
    store, text = read("Alpha beta.\nGamma delta.\nEpsilon"), "Alpha beta.\nGamma delta.\nEpsilon"
    assert len(store.forget(0, lambda passage: passage.start <= 3 < passage.stop)) == 1
    assert [BYTES.text(p.token_ids) for p in store.of_row(0)] == ["Gamma delta.\n", "Epsilon"]
    assert len(store.forget(0, lambda passage: passage.stop == len(text))) == 1  # the open one
    store.append(torch.tensor([list(b" zeta.\n")]))
    assert [(p.start, BYTES.text(p.token_ids)) for p in store.of_row(0)] == [
        (12, "Gamma delta.\n"),
        (len(text), " zeta.\n"),
    ]


def test_saved_and_loaded_it_goes_on_the_same() -> None:
    store = Passages(2, BYTES, capacity=500)
    ids = torch.tensor([list((PROSE * 2).encode())[at : at + 600] for at in (0, 200)])
    store.append(ids, [600, 450], torch.rand(2, 600, generator=torch.Generator().manual_seed(0)))
    store.rehearse(1, store.of_row(1)[:2])
    again = Passages(0, BYTES, capacity=500)
    again.restore({name: tensor.clone() for name, tensor in store.tensors().items()})
    for each in (store, again):
        each.append(ids)
    assert [shown(again, row) for row in (0, 1)] == [shown(store, row) for row in (0, 1)]
    assert all(
        torch.equal(tensor.nan_to_num(), again.tensors()[name].nan_to_num()) for name, tensor in store.tensors().items()
    )
    empty = Passages(0, BYTES)
    empty.restore(Passages(2, BYTES).tensors())
    assert [empty.of_row(row) for row in (0, 1)] == [[], []]


def test_the_state_is_bounded() -> None:
    pieces = split("The cat sat on the mat while it rained, and nobody came to see it. " * 600 + "\n")
    ids, store = torch.arange(len(pieces))[None], Passages(1, Spelling([p.encode() for p in pieces]), 4096)
    for part in ids.split(256, dim=1):
        store.append(part)
    store.settle()
    assert store.nbytes < 4096 * 4 + 100 * LONGEST + (4096 // 16) * 64 + 2**16
