"""The jobs of `vlmsft.train -m`: a run folder each, and what is said of them at the end."""

from types import SimpleNamespace

import pytest

from vlmsft import train
from vlmsft.errors import UserError
from vlmsft.runtime import logging as run_logging


def start(run_dir: str, is_submitted: bool = False, dry_run: bool = False) -> train.Start:
    job = SimpleNamespace(run_dir=run_dir)
    return train.Start(job, None, is_submitted, dry_run, 1, "", [f"id={run_dir}"], {})


@pytest.fixture
def start_all(monkeypatch):
    """Gives start_all its jobs and their exit codes; returns the run folders that were started."""
    monkeypatch.setattr(run_logging, "_console", None)
    started = []

    def start_all(starts, codes):
        left = iter(codes)
        monkeypatch.setattr(train, "_multirun", list(starts))
        monkeypatch.setattr(train, "start_one", lambda one, in_child: started.append(one.job.run_dir) or next(left))
        train.start_all()

    start_all.started = started
    return start_all


def test_jobs_that_share_a_run_folder_are_refused_before_any_starts(start_all):
    with pytest.raises(UserError, match=r"run_dir: found runs/a in jobs 0, 2, expected .*id=a-\$\{hydra:job\.num\}"):
        start_all([start("runs/a"), start("runs/b"), start("runs/a")], [])
    assert start_all.started == []


def test_each_job_is_told_with_its_own_outcome(start_all, capsys):
    starts = [start("a"), start("b"), start("c", is_submitted=True), start("d", is_submitted=True, dry_run=True)]
    with pytest.raises(SystemExit) as end:
        start_all(starts, [0, 1, 0, 0])
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-4:] == [
        "done: a",
        "failed with exit code 1: b",
        "submitted: c",
        "dry run: d",
    ]


def test_jobs_after_an_interrupt_are_not_started(start_all, capsys):
    with pytest.raises(SystemExit) as end:
        start_all([start("a"), start("b")], [130])
    assert end.value.code == 130 and start_all.started == ["a"]
    assert capsys.readouterr().out.splitlines()[-2:] == ["interrupted: a", "not started: b"]
