"""Submitting many jobs at once: what the ledger has while some submissions fail, or the launcher is interrupted."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from vlmsft.errors import Problem, UserError
from vlmsft.sweeping.ledger import JobRow, Ledger
from vlmsft.sweeping.schedule import SUBMITTING_THREADS, Interrupted, Loop, Options, Watcher

NUM_JOBS = 3 * SUBMITTING_THREADS


class Cluster:
    """Stands for NeMo-Run and Slurm; `at` has what happens in a job's submission."""

    def __init__(self, at: dict | None = None):
        self.at = at or {}
        self.submitted, self.noted, self.cancelled = [], [], []

    def connect(self) -> None:
        assert self.submitted == []

    def submit(self, num: int) -> str:
        self.at.get(num, lambda: None)()
        self.submitted.append(num)
        return f"slurm_tunnel://nemo_run/{num}"

    def note(self, nums) -> None:
        self.noted = list(nums)

    def cancel(self, rows) -> None:
        self.cancelled += [row.handle for row in rows]


def loop_of(folder, cluster: Cluster, **options) -> Loop:
    ledger = Ledger(folder / "s", create=True)
    ledger.add([JobRow(num, str(num), [], str(folder / str(num)), is_local=False) for num in range(NUM_JOBS)])
    loop = Loop(ledger, Options(**options), ledger.written(), cluster, Watcher())  # type: ignore[arg-type]
    loop._submitted = cluster
    return loop


def refuse() -> None:
    raise UserError(Problem("launch.executor", "no such account", "one of Slurm's"))


def test_all_handles_are_in_the_ledger(tmp_path):
    """Several submissions wait for each other here, so they do run at once."""
    together = threading.Barrier(SUBMITTING_THREADS, timeout=30)
    cluster = Cluster(dict.fromkeys(range(SUBMITTING_THREADS), together.wait))
    loop = loop_of(tmp_path, cluster)
    loop.start_what_fits()
    rows = loop.ledger.written()
    assert [row.handle for row in rows] == [f"slurm_tunnel://nemo_run/{num}" for num in range(NUM_JOBS)]
    assert sorted(cluster.submitted) == cluster.noted == list(loop.running) and loop.pending == []
    assert all(loop.running[row.num] == row for row in rows)


def test_max_parallel_holds(tmp_path):
    cluster = Cluster()
    loop = loop_of(tmp_path, cluster, max_parallel=5)
    loop.start_what_fits()
    loop.start_what_fits()
    assert sorted(cluster.submitted) == [0, 1, 2, 3, 4] and len(loop.pending) == NUM_JOBS - 5


@pytest.mark.parametrize(("on_failure", "all_others"), [("continue", True), ("stop", False)])
def test_a_submission_that_fails(tmp_path, on_failure, all_others):
    cluster = Cluster({1: refuse})
    loop = loop_of(tmp_path, cluster, on_failure=on_failure, max_parallel=None if all_others else 2)
    loop.start_what_fits()
    loop.start_what_fits()
    failed = loop.ledger.job(1)
    assert failed.state == "failed" and "no such account" in failed.reason and 1 not in loop.running
    others = [row.state for row in loop.ledger.written() if row.num > 1]
    assert set(others) == ({"running"} if all_others else {"pending"})


def test_a_job_that_is_cancelled_while_it_is_submitted(tmp_path):
    cluster = Cluster({2: lambda: loop.ledger.move(2, "cancelled", ["running"])})
    loop = loop_of(tmp_path, cluster)
    loop.start_what_fits()
    assert loop.ledger.job(2).state == "cancelled" and 2 not in loop.running
    assert cluster.cancelled == ["slurm_tunnel://nemo_run/2"]


def test_interrupted_what_is_under_way_gets_its_handle_and_the_rest_stays_pending(tmp_path):
    interrupted = threading.Event()

    def interrupt(number, frame):
        interrupted.set()
        raise Interrupted(number)

    def send() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def wait() -> None:
        interrupted.wait(30)
        time.sleep(0.5)  # in which the main thread comes to hear of it

    cluster = Cluster({**dict.fromkeys(range(NUM_JOBS), wait), 0: send})
    loop = loop_of(tmp_path, cluster)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(Interrupted):
            loop.start_what_fits()
    finally:
        signal.signal(signal.SIGUSR1, before)
    rows = loop.ledger.written()
    assert {row.state for row in rows if row.handle is not None} == {"running"}
    assert sorted(row.num for row in rows if row.handle is not None) == sorted(cluster.submitted)
    left = [row for row in rows if row.handle is None]
    assert len(left) >= SUBMITTING_THREADS // 2 and {row.state for row in left} == {"pending"}
