"""A job's processes: found by their environment, told to end, killed until none is left."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlmsft.runtime import processes

NAME = "VLMSFT_TEST_JOB"
JOB = str(os.getpid())


@pytest.fixture
def start() -> Iterator:
    """Starts a process of the job."""
    started: list[subprocess.Popen] = []

    def start(*command: str, job: str = JOB) -> subprocess.Popen:
        started.append(subprocess.Popen(command, env={**os.environ, NAME: job}, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_processes_are_found_by_their_environment(start):
    one, _ = start("sleep", "60"), start("sleep", "60", job="another")
    assert [process.pid for process in processes.processes_with(NAME, [JOB])] == [one.pid]


def test_a_process_that_is_started_while_others_are_killed_is_killed_too(start, monkeypatch):
    first, second = start("sleep", "60"), []
    find = processes.processes_with

    def find_then_start(*arguments):
        found = find(*arguments)
        if not second:
            second.append(start("sleep", "60"))
        return found

    monkeypatch.setattr(processes, "processes_with", find_then_start)
    processes.kill_all(NAME, [JOB])
    assert [process.wait(10) for process in (first, *second)] == [-9, -9], "and their exit codes are left to be read"


AGENT = """
trap 'echo agent >> "$1"; exit' TERM
sh -c 'trap "echo worker >> $1; exit" TERM; touch $1; sleep 60 & wait' worker "$1" &
wait
"""


def test_torchruns_workers_are_told_and_not_torchrun(start, tmp_path):
    torchrun, told = tmp_path / "torchrun", tmp_path / "told"
    torchrun.write_text(AGENT)
    agent = start("sh", str(torchrun), str(told))
    wait_for(told)
    processes.stop_all(NAME, [JOB], 3)
    agent.wait(10)
    assert told.read_text() == "worker\n"
    assert processes.processes_with(NAME, [JOB]) == [], "the worker's child too, which nobody told"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
