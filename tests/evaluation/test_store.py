"""The folder of an evaluation: what was written is read back, and what was half written goes."""

from __future__ import annotations

import threading

import pytest

from vlmsft.errors import UserError
from vlmsft.evaluation.store import Answer, Sample, Score, Store

SAMPLE = Sample(
    "1", "<image>何？", ("a.png",), ("犬", "いぬ"), {"A": "犬"}, ({"role": "user", "text": "<image>何？"},), {"n": 1}
)


def test_round_trip(tmp_path):
    store = Store(tmp_path)
    scores = [Score("m", "t", "1", 0, "x", None, "no answer"), Score("m", "t", "2", 0, "x", 1.5)]
    store.write_samples("t", [SAMPLE])
    store.write_scores(scores)
    assert store.samples("t") == [SAMPLE] and store.scores() == scores
    store.write_scores(scores[:1])
    assert store.scores() == scores[:1], "in place of those of before"
    assert Store(tmp_path / "empty").samples("t") == [] and store.answers("m", "other") == {}


def test_the_last_answer_holds_and_none_is_lost(tmp_path):
    store = Store(tmp_path)
    store.add_answer("m", "t", Answer("1", 0, None, "timed out"))
    store.add_answer("m", "t", Answer("1", 1, "b"))
    store.add_answer("m", "t", Answer("1", 0, "a"))
    assert {place: answer.answer for place, answer in store.answers("m", "t").items()} == {("1", 0): "a", ("1", 1): "b"}
    assert store.answers_path("m", "t").read_text().count("\n") == 3


@pytest.mark.parametrize("torn", [b'{"id": "2", "rep', b'{"id": "2", "repeat": 0, "answer": "x"}', "犬".encode()[:2]])
def test_a_torn_last_line_goes(tmp_path, torn):
    store = Store(tmp_path)
    store.add_answer("m", "t", Answer("1", 0, "a"))
    with open(store.answers_path("m", "t"), "ab") as file:
        file.write(torn)
    again = Store(tmp_path)
    assert set(again.answers("m", "t")) == {("1", 0)}
    again.add_answer("m", "t", Answer("3", 0, "c"))
    assert set(again.answers("m", "t")) == {("1", 0), ("3", 0)}


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    store = Store(tmp_path)
    path = store.answers_path("m", "t")
    path.parent.mkdir(parents=True)
    path.write_text('{"id": "1", "repeat": 0, "answer": "a"}\nbroken\n')
    with pytest.raises(UserError, match=r"t.jsonl:2: found no JSON"):
        store.answers("m", "t")


def test_any_text_can_be_stored(tmp_path):
    store = Store(tmp_path)
    text = "half a surrogate \ud83d, \u2028, \x00, \x85 and a newline\n"
    store.add_answer("m", "t", Answer("1", 0, text))
    assert store.answers("m", "t")["1", 0].answer == text


def test_threads_do_not_mix_their_lines(tmp_path):
    store = Store(tmp_path)

    def add(number):
        for index in range(50):
            store.add_answer("m", "t", Answer(f"{number}-{index}", 0, "x" * 1000))

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.answers("m", "t")) == 200
