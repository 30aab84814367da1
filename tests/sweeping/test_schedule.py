"""Scheduling with jobs that cost nothing: none lost, none twice, nothing left behind, whatever ends the launcher."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import sweep_toys

from vlmsft.errors import UserError
from vlmsft.runtime.processes import processes_with
from vlmsft.sweeping import local, show
from vlmsft.sweeping.control import cancel_jobs
from vlmsft.sweeping.ledger import Ledger
from vlmsft.sweeping.report import RUNS_ALREADY_EXIT_CODE, is_locked, read_report, take_lock
from vlmsft.sweeping.schedule import only_launcher, read_options

pytestmark = pytest.mark.nemo  # no NeMo, but nemo_run and many processes: too slow for the default tests


class Toys:
    """A sweep of toy jobs and launchers for it, each a process forked from this one: nemo_run is imported once."""

    def __init__(self, folder: Path, tasks: list[dict], **options):
        import vlmsft.sweeping.experiment  # noqa: F401

        self.folder = folder / "sweeps" / "s"
        sweep_toys.make_sweep(self.folder, tasks, **options)
        self.ledger = Ledger(self.folder)
        self.run_dirs = [row.run_dir for row in self.ledger.jobs()]
        self.launchers: list = []

    def launch(self, max_parallel: int = 8):
        context = multiprocessing.get_context("fork")
        launcher = context.Process(target=sweep_toys.launch, args=(str(self.folder), str(max_parallel)))
        launcher.start()
        self.launchers.append(launcher)
        return launcher

    def finish(self, max_parallel: int = 8) -> int | None:
        launcher = self.launch(max_parallel)
        launcher.join(100)
        return launcher.exitcode

    def wait_until(self, condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.ledger.jobs()
            time.sleep(0.05)

    def wait_for_running(self, number: int) -> None:
        self.wait_until(lambda: sum(Path(run_dir, "runs-now").exists() for run_dir in self.run_dirs) == number)

    def let_jobs(self, **task) -> None:
        for run_dir in self.run_dirs:
            Path(run_dir, "task.json").write_text(json.dumps(task))

    def states(self) -> Counter:
        return Counter(row.state for row in self.ledger.jobs())

    def num_starts(self) -> Counter:
        return Counter(len(sweep_toys.starts(run_dir)) for run_dir in self.run_dirs)

    def end(self) -> None:
        for launcher in self.launchers:
            launcher.kill()
            launcher.join()
        local.kill(self.run_dirs)


@pytest.fixture
def toys(tmp_path):
    made = []

    def make(tasks, **options) -> Toys:
        made.append(Toys(tmp_path, tasks, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_a_hundred_jobs_each_run_once(toys):
    """More than the 100 that NeMo-Run's own scheduler keeps, eight at a time; a failed one keeps no other back."""
    sweep = toys([{"code": 3 if num % 20 == 7 else 0} for num in range(101)])
    assert sweep.finish() == 0
    assert sweep.states() == {"done": 96, "failed": 5} and sweep.num_starts() == {1: 101}
    failed = sweep.ledger.job(27)
    assert failed.exit_code == 3 and failed.reason == "exit code 3" and failed.ended >= failed.started
    assert sweep.finish() == 0 and sweep.num_starts() == {1: 101}, "neither done nor failed ones run again"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupted_launcher_leaves_no_process_and_is_resumed(toys, number, code):
    sweep = toys([{"seconds": 60}] * 10)
    launcher = sweep.launch()
    sweep.wait_for_running(8)
    family = processes_with(local.RUN_DIR, sweep.run_dirs)
    assert len(family) == 8
    os.kill(launcher.pid, number)
    launcher.join(60)
    assert launcher.exitcode == code
    assert not [process for process in family if process.is_running() and process.status() != "zombie"]
    assert sweep.states() == {"pending": 10} and sweep.num_starts() == {1: 8, 0: 2}
    sweep.let_jobs(seconds=0)
    assert sweep.finish() == 0
    assert sweep.states() == {"done": 10} and sweep.num_starts() == {2: 8, 1: 2}


def test_jobs_outlive_a_killed_launcher_and_are_followed_by_the_next(toys):
    sweep = toys([{"seconds": 5}] * 10)
    launcher = sweep.launch()
    sweep.wait_for_running(8)
    launcher.kill()
    launcher.join()
    assert sweep.states() == {"running": 8, "pending": 2}
    assert sweep.finish() == 0
    assert sweep.states() == {"done": 10} and sweep.num_starts() == {1: 10}


def test_after_a_reboot_what_ran_goes_on(toys):
    sweep = toys([{"seconds": 0}, *[{"seconds": 60}] * 7])
    launcher = sweep.launch()
    sweep.wait_until(lambda: sweep.states() == {"done": 1, "running": 7})
    sweep.wait_for_running(7)
    launcher.kill()
    local.kill(sweep.run_dirs)
    sweep.wait_until(lambda: sweep.states() == {"done": 1, "pending": 7})
    for run_dir in sweep.run_dirs:
        Path(run_dir, "runs-now").unlink(missing_ok=True)
    sweep.let_jobs(seconds=0)
    assert sweep.finish() == 0
    assert sweep.states() == {"done": 8} and sweep.num_starts() == {1: 1, 2: 7}


def test_a_job_that_is_killed_has_failed(toys):
    sweep = toys([{"seconds": 60}])
    launcher = sweep.launch()
    sweep.wait_for_running(1)
    os.kill(int(sweep_toys.starts(sweep.run_dirs[0])[0]), signal.SIGKILL)
    launcher.join(30)
    row = sweep.ledger.job(0)
    assert (row.state, row.exit_code) == ("failed", 137) and "signal 9" in row.reason


def test_what_a_failed_job_leaves_behind_is_killed(toys):
    sweep = toys([{"code": 1, "leaves": True}])
    assert sweep.finish() == 0 and sweep.states() == {"failed": 1}
    assert not processes_with(local.RUN_DIR, sweep.run_dirs)


def test_stop_on_failure_starts_nothing_more(toys):
    sweep = toys([{"code": 1}, {}, {}], on_failure="stop")
    assert sweep.finish(1) == 0
    assert sweep.states() == {"failed": 1, "pending": 2}


def test_cancel_by_another_process(toys):
    sweep = toys([{"seconds": 60}] * 4)
    launcher = sweep.launch(2)
    sweep.wait_for_running(2)
    assert cancel_jobs(sweep.ledger, sweep.ledger.written()) == []
    launcher.join(30)
    assert launcher.exitcode == 0 and sweep.states() == {"cancelled": 4} and sweep.num_starts() == {1: 2, 0: 2}
    assert not processes_with(local.RUN_DIR, sweep.run_dirs)


def test_a_sweep_has_one_launcher(toys):
    sweep = toys([{}])
    busy = pytest.raises(UserError, match=f"process {os.getpid()} on")
    with only_launcher(sweep.folder), busy, only_launcher(sweep.folder):
        pass
    with only_launcher(sweep.folder), busy:
        show.detach(sweep.ledger)
    assert sweep.finish() == 0 and read_options(sweep.ledger).on_failure == "continue"


def test_a_worker_that_finds_another_at_its_job_leaves_it_alone(tmp_path):
    from vlmsft.sweeping.worker import reported

    lock = take_lock(tmp_path)
    assert is_locked(tmp_path) and take_lock(tmp_path, wait_seconds=0) is None
    with pytest.raises(SystemExit) as end, reported(str(tmp_path)):
        raise AssertionError("it runs")
    assert end.value.code == RUNS_ALREADY_EXIT_CODE and read_report(tmp_path) is None
    os.close(lock)
    assert not is_locked(tmp_path)
    with reported(str(tmp_path)):
        assert is_locked(tmp_path) and read_report(tmp_path).ended is None
    assert read_report(tmp_path).exit_code == 0


def test_children_of_a_killed_job_are_killed(tmp_path):
    """torchrun's workers sit in sessions of their own: when it is killed, they would go on."""
    command = ["sh", "-c", "setsid sleep 60 & sleep 60"]
    process = local.start(str(tmp_path), command, {})
    while len(family := psutil.Process(process.pid).children()) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    local.kill([str(tmp_path)])
    psutil.wait_procs(family, timeout=5)
    assert not [child for child in family if child.is_running() and child.status() != "zombie"]
    assert not is_locked(tmp_path)
