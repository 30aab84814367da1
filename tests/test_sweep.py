"""The words of `vlmsft.sweep`, and what it says of what it doesn't know."""

import pytest

from vlmsft import sweep


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["status"], ["action='status'"]),
        (["resume", "12345678", "max_parallel=2"], ["action='resume'", "sweep='12345678'", "max_parallel=2"]),
        (["watch=true", "status", "1e12"], ["watch=true", "action='status'", "sweep='1e12'"]),
        (["logs", "--cfg", "job", "3f2a"], ["action='logs'", "--cfg", "job", "sweep='3f2a'"]),
        (["action=logs"], ["action=logs"]),
        (["a", "b", "c"], ["action='a'", "sweep='b'", "c"]),
    ],
)
def test_words_are_keys(words, keys):
    assert sweep.with_keys(words) == keys


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["statsu"],
            "action: found statsu, expected one of status, resume, retry, cancel, logs. Did you mean 'status'?",
        ),
        (["status", "12"], "sweep: found no sweep in"),
        (["status", "12", "job=1", "jobb=2"], "Did you mean 'job'?"),
    ],
)
def test_what_is_wrong_is_named(words, expected, run_main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, _, message = run_main(sweep.main, *sweep.with_keys(words))
    assert code == 2 and expected in message
