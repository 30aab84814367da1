"""Which evaluation's scores stand beside each other."""

from __future__ import annotations

import time

import pytest
from report_cases import evaluation, made_up

from vlmsft.report.scores import with_comparable_scores


def shown(runs, force=False):
    """[score of the task, notes] of each run"""
    return [[run.metrics.get("sample/rouge"), list(run.notes)] for run in with_comparable_scores(runs, force)]


def runs_with(*evaluations):
    return [made_up(id, evaluations=each) for id, each in zip("abcd", evaluations, strict=False)]


def test_scores_made_alike_are_compared():
    runs = runs_with([evaluation(1.0)], [evaluation(2.0, content=["other"], folder="/b")], [])
    assert shown(runs) == [[1.0, []], [2.0, []], [None, []]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engine": "vllm"}, "engine: vllm / vlmsft builtin"),
        ({"limit": 5}, "limit: 5 / null"),
        ({"temperature": 0.5}, "generation.temperature: 0.5 / 0.0"),
        ({"data": "other"}, "task.data.sha256: other / d"),
        ({"engine": "vllm", "limit": 5}, "engine: vllm / vlmsft builtin; limit: 5 / null"),
    ],
)
def test_a_score_made_otherwise_is_left_out_and_the_reason_said(change, said):
    runs = runs_with([evaluation(1.0)], [evaluation(2.0, **change)], [evaluation(3.0)])
    reason = f"made otherwise than those of demo/a ({said})"
    note = f"scores of sample not shown: {reason}; force=true shows them"
    assert shown(runs) == [[1.0, []], [None, [note]], [3.0, []]]
    forced = f"scores of sample shown although {reason}"
    assert shown(runs, force=True) == [[1.0, []], [2.0, [forced]], [3.0, []]]


def test_of_several_evaluations_the_one_like_the_others():
    runs = runs_with([evaluation(1.0), evaluation(9.0, limit=5)], [evaluation(9.5, limit=3), evaluation(2.0)])
    assert shown(runs) == shown(runs, force=True) == [[1.0, []], [2.0, []]]


def test_of_several_alike_the_newest():
    assert shown(runs_with([evaluation(1.0), evaluation(2.0)], [evaluation(3.0, limit=5), evaluation(4.0)])) == [
        [2.0, []],
        [4.0, []],
    ]
    assert shown(runs_with([evaluation(1.0), evaluation(2.0, limit=5)])) == [[2.0, []]], "nothing to compare it with"


def test_the_majority_counts_and_what_a_server_does_not_say_is_the_same():
    runs = runs_with([evaluation(1.0, limit=5)], [evaluation(2.0)], [evaluation(3.0, engine=None)])
    assert [score for score, _ in shown(runs)] == [None, 2.0, 3.0]


def test_tasks_are_apart_and_one_note_is_for_all_with_the_same_reason():
    runs = runs_with(
        [evaluation(1.0, tasks=("sample", "heron", "vqa"))],
        [evaluation(2.0, tasks=("heron", "sample"), limit=5), evaluation(3.0, tasks=("vqa",))],
    )
    found = with_comparable_scores(runs)[1]
    assert found.metrics == {"vqa/rouge": 3.0}
    (note,) = found.notes
    assert note.startswith("scores of heron, sample not shown: ")


def test_hundreds_of_runs_take_no_time():
    tasks = [f"t{n}" for n in range(10)]
    runs = [made_up(str(n), evaluations=[evaluation(1.0, tasks=tasks, limit=n % 3)] * 3) for n in range(200)]
    start = time.monotonic()
    assert sum(bool(run.notes) for run in with_comparable_scores(runs)) == 133
    assert time.monotonic() - start < 10
