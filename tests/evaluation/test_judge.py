"""A judge that fails, takes too long and answers nonsense: missing, counted, asked again; never a zero."""

from __future__ import annotations

import json
import re
import time

import pytest
from evaluation_toys import defaults, judge_settings, last_text, scripted
from hydra.utils import instantiate

from vlmsft.evaluation.judge import ask_judge, num_uncached
from vlmsft.evaluation.store import Sample


def requests(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


def of_reply(reply):
    match = re.search(r"\d", reply)
    return float(match[0]) if match else None


def test_each_kind_of_failure_is_missing_and_the_next_start_asks_again(tmp_path):
    is_broken = True

    def reply(body, number):
        text = last_text(body)
        if not is_broken or text == "good":
            return "4"
        return {"fails": 500, "hangs": None, "refused": 400, "nonsense": "a fine answer"}[text]

    with scripted(reply) as judge:
        settings = judge_settings(judge.url, tmp_path / "cache.sqlite", timeout_seconds=0.3)
        asked = requests("good", "fails", "hangs", "refused", "nonsense")
        verdicts = ask_judge(asked, of_reply, settings)
        assert [verdict.score for verdict in verdicts] == [4, None, None, None, None]
        told = [verdict.error or "" for verdict in verdicts]
        assert "InternalServerError" in told[1] and "APITimeoutError" in told[2] and "scripted 400" in told[3]
        assert "no verdict in the judge's reply: 'a fine answer'" in told[4]
        counts = {
            text: sum(last_text(body) == text for body in judge.asked) for text in map(lambda r: r[0]["content"], asked)
        }
        assert counts == {"good": 1, "fails": 2, "hangs": 2, "refused": 1, "nonsense": 2}

        is_broken = False
        judge.asked.clear()
        assert num_uncached(asked, settings) == 4
        again = ask_judge(asked, of_reply, settings)
        assert [verdict.score for verdict in again] == [4] * 5 and again[0].cached
        assert sorted(map(last_text, judge.asked)) == ["fails", "hangs", "nonsense", "refused"]

        judge.asked.clear()
        assert all(verdict.cached for verdict in ask_judge(asked, of_reply, settings))
        assert judge.asked == [] and num_uncached(asked, settings) == 0


def test_a_failure_that_passes_costs_nothing(tmp_path):
    with scripted(lambda body, number: (500, "hm", "3")[number]) as judge:
        settings = judge_settings(judge.url, tmp_path / "cache.sqlite", num_attempts=3)
        (verdict,) = ask_judge(requests("x"), of_reply, settings)
    assert (verdict.score, verdict.reply, verdict.error) == (3, "3", None)


@pytest.mark.parametrize("change", [{"model": "other"}, {"temperature": 1.0}, {"seed": 1}, {"max_tokens": 9}])
def test_the_cache_is_keyed_on_judge_prompt_and_parameters(tmp_path, change):
    with scripted(lambda body, number: "5") as judge:
        settings = judge_settings(judge.url, tmp_path / "cache.sqlite")
        ask_judge(requests("x", "x"), of_reply, settings)
        assert len(judge.asked) == 1, "equal requests are made once"
        ask_judge(requests("x"), of_reply, judge_settings(judge.url, tmp_path / "cache.sqlite", **change))
        ask_judge(requests("y"), of_reply, settings)
        assert len(judge.asked) == 3
        with scripted(lambda body, number: "1") as other:
            (verdict,) = ask_judge(requests("x"), of_reply, judge_settings(other.url, tmp_path / "cache.sqlite"))
            assert verdict.score == 1
        assert ask_judge(requests("x"), of_reply, settings)[0].cached


def test_concurrency_is_kept(tmp_path):
    at_once, most = 0, 0

    def reply(body, number):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1
        return "1"

    with scripted(reply) as judge:
        settings = judge_settings(judge.url, tmp_path / "cache.sqlite", concurrency=3)
        ask_judge(requests(*map(str, range(12))), of_reply, settings)
    assert most == 3


def test_a_verdict_off_the_scale_is_none(tmp_path):
    scorer = instantiate(defaults("scorers")["judge"])
    sample = Sample("x", "?", references=("犬",))
    with scripted(lambda body, number: "9 of 10") as judge:
        settings = judge_settings(judge.url, tmp_path / "cache.sqlite")
        (outcome,) = scorer.score([(sample, "猫")], settings)
    assert outcome.score is None and "9 of 10" in outcome.reason


def test_what_is_sent_is_what_the_settings_say(tmp_path):
    with scripted(lambda body, number: "5") as judge:
        ask_judge(requests("x"), of_reply, judge_settings(judge.url, tmp_path / "c", temperature=0.5, seed=3))
    (body,) = judge.asked
    assert json.dumps(body, sort_keys=True) == json.dumps(
        {"model": "toy", "messages": requests("x")[0], "temperature": 0.5, "max_tokens": 16, "seed": 3}, sort_keys=True
    )
