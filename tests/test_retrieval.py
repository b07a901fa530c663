"""Passages found by the words of a question: inflected, rare, in any script; of equals the newest; within bounds."""

import pytest
import torch

from hippoformer.errors import InputError
from hippoformer.hippocampus.passages import Passages
from hippoformer.hippocampus.retrieval import mentions, retrieve, terms
from hippoformer.hippocampus.spelling import Spelling

BYTES = Spelling([bytes([byte]) for byte in range(256)])
FILLER = ["The weather was mild that day.", "Nobody came to the gate.", "A cart went by in the lane."]


def store_of(lines: list[str]) -> Passages:
    """A line a passage, in bytes; lines of up to 64."""
    store = Passages(1, BYTES)
    store.append(torch.tensor([list("".join(line + "\n" for line in lines).encode())]))
    return store


def found(lines: list[str], query: str, n_tokens: int = 64) -> list[str]:
    passages = retrieve(store_of(lines).of_row(0), query, n_tokens, BYTES)
    return [BYTES.text(passage.token_ids).strip() for passage in passages]


def test_inflected_words_and_capitals_make_no_difference() -> None:
    lines = [*FILLER * 5, "ANNA'S sisters were painting chairs.", *FILLER * 5]
    assert found(lines, "Which chair did Anna's sister paint?")[0] == lines[15]


def test_a_rare_word_outweighs_common_ones() -> None:
    lines = ["the old gate by the lane", *FILLER * 5, "the gate of zinc", *FILLER * 5]
    assert found(lines, "which gate is of zinc?")[0] == "the gate of zinc"


def test_the_later_of_equals_comes_first() -> None:
    lines = [*FILLER, "Tom lives in Rome.", *FILLER * 20, "Tom lives in Rome.", *FILLER]
    passages = retrieve(store_of(lines).of_row(0), "Where does Tom live?", 40, BYTES)
    twice = [p.start for p in store_of(lines).of_row(0) if b"Tom" in bytes(p.token_ids.tolist())]
    assert len(twice) == 2 and [p.start for p in passages][:2] == twice[::-1]


def test_a_neighbour_is_brought_along() -> None:
    lines = [*FILLER * 9, "Where did you put the spare key, Ann?", "Under the third pot.", *FILLER * 9]
    assert found(lines, "Where is the spare key?", 60)[:2] == [
        "Where did you put the spare key, Ann?",
        "Under the third pot.",
    ]


@pytest.mark.parametrize(
    ("lines", "query", "right"),
    [
        (["我每天早上喝绿茶。", "他的妹妹住在上海。", "图书馆星期一关门。", "这只猫叫小白。"], "妹妹住在哪里？", 1),
        (["彼は毎朝公園を走ります。", "母は京都で生まれました。", "駅前の店は安いです。"], "母はどこで生まれた？", 1),
        (
            ["Мой брат работает врачом.", "Кошка спит на диване.", "Ключи лежат под ковриком."],
            "Где лежал ключ?",
            2,
        ),
        (["تعمل أختي في المستشفى.", "المكتبة مغلقة يوم الجمعة.", "يحب أحمد القهوة."], "متى تغلق المكتبات؟", 1),
        (["แมวนอนบนเตียง", "น้องสาวอยู่เชียงใหม่", "ร้านปิดวันจันทร์"], "น้องสาวอยู่ที่ไหน", 1),
        (["Le café est fermé.", "Ma sœur habite à Lyon."], "Quel CAFE est ferme?", 0),
    ],
)  # fmt: skip
def test_every_script_has_words(lines: list[str], query: str, right: int) -> None:
    assert found(lines, query, 120)[0] == lines[right]


def test_numbers_and_full_width_letters_are_words_and_nothing_in_common_brings_nothing() -> None:
    assert (
        found([*FILLER, "Room 4711 is taken.", "Room 4712 is free."], "Ｒｏｏｍ ４７１１?")[0] == "Room 4711 is taken."
    )
    assert terms("The of and") == [] and len(terms("Smith's 3.5")) == 3
    assert found(FILLER, "xylophone") == found(FILLER, "") == found(FILLER, "the of?") == found([], "cart") == []
    assert found(FILLER, "cart", 0) == []


@pytest.mark.parametrize("n_tokens", [1, 30, 64, 100, 1000])
def test_together_they_fit_and_are_what_was_read(n_tokens: int) -> None:
    store = store_of(FILLER * 12)
    stream = [token for passage in store.of_row(0) for token in passage.token_ids]
    passages = retrieve(store.of_row(0), "Who came by the gate with a cart in mild weather?", n_tokens, BYTES)
    assert sum(map(len, passages)) <= n_tokens
    assert all(stream[p.start : p.stop] == p.token_ids.tolist() for p in passages)
    assert len({p.start for p in passages}) == len(passages)
    assert [p.score for p in passages] == sorted((p.score for p in passages), reverse=True)


def test_forgotten_by_its_words() -> None:
    store = store_of(["Anna's number is 55 12.", *FILLER, "Anna likes tea."])
    assert len(store.forget(0, mentions("Anna number", BYTES))) == 1
    assert retrieve(store.of_row(0), "What is the number?", 64, BYTES) == []
    assert len(store.of_row(0)) == 4
    with pytest.raises(InputError, match="no word"):
        mentions("the of", BYTES)
