"""The ledger: several writers, states that change one way only, and what running jobs reported since."""

import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from vlmsft.errors import UserError
from vlmsft.sweeping.ledger import JobRow, Ledger, as_reported, ended, find_sweep
from vlmsft.sweeping.report import Report, read_report, reporting, take_lock


@pytest.fixture
def ledger(tmp_path):
    """Five pending jobs."""
    ledger = Ledger(tmp_path / "sweeps" / "s", create=True)
    ledger.add([JobRow(num, f"id{num}", [f"x={num}"], str(tmp_path / str(num))) for num in range(5)])
    return ledger


def test_what_is_added_is_read(ledger):
    row = JobRow(
        7, "id7", ["名前=猫"], "/r/7", "infeasible", "no", 3, 1.5, 2.5, 0.25, ["python"], "x", False, 2, 10, {"a": []}
    )
    ledger.add([row])
    assert ledger.job(7) == ledger.jobs()[-1] == row and Ledger(ledger.folder).jobs() == ledger.jobs()
    with pytest.raises(UserError, match="job: found 8"):
        ledger.job(8)
    ledger.note(options={"a": 1}, launched=2.5)
    assert ledger.facts() == {"options": {"a": 1}, "launched": 2.5}


def test_adding_again_leaves_what_runs_or_is_over(ledger):
    for num, state in enumerate(("running", "done", "failed", "cancelled")):
        assert ledger.move(num, state, ["pending"])
    ledger.add([replace(row, state="pending", max_steps=7) for row in ledger.written()])
    assert [row.state for row in ledger.written()] == ["running", "done", "failed", "pending", "pending"]
    assert [row.max_steps for row in ledger.written()] == [None, None, None, 7, 7]


def test_an_identity_is_there_once(ledger):
    with pytest.raises(sqlite3.IntegrityError):
        ledger.move(1, "pending", ["pending"], identity="id0")


def _claim_all(folder, number, barrier, won):
    ledger = Ledger(folder)
    barrier.wait()
    for row in ledger.written():
        if ledger.move(row.num, "running", ["pending"], host=str(number), started=time.time()):
            won.put((number, row.num))


def test_of_many_writers_one_gets_each_job(ledger):
    ledger.add([JobRow(num, f"id{num}", [], f"/r/{num}") for num in range(5, 40)])
    context = multiprocessing.get_context("fork")
    barrier, won = context.Barrier(6), context.Queue()
    writers = [context.Process(target=_claim_all, args=(ledger.folder, n, barrier, won)) for n in range(6)]
    for writer in writers:
        writer.start()
    claims = [won.get(timeout=60) for _ in range(40)]
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert won.empty() and sorted(num for _, num in claims) == list(range(40)), "none lost, none twice"
    assert {row.num: row.host for row in ledger.written()} == {num: str(number) for number, num in claims}


def test_a_writer_that_dies_leaves_the_ledger_as_it_was(ledger):
    code = (
        "import os, sys; from vlmsft.sweeping.ledger import Ledger\n"
        "with Ledger(sys.argv[1])._transaction() as c:\n"
        "    c.execute(\"UPDATE jobs SET state = 'done'\"); os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(ledger.folder)])
    assert {row.state for row in Ledger(ledger.folder).written()} == {"pending"}
    assert ledger.move(0, "running", ["pending"])


def test_a_running_job_is_as_it_reported(ledger):
    ledger.move(0, "running", ["pending"], started=time.time() - 60)
    row = ledger.written()[0]
    assert as_reported(row).state == "pending", "no process, no report: it is lost, and goes on"
    lock = take_lock(row.run_dir)
    assert as_reported(row).state == "running"
    os.close(lock)
    submitted = replace(row, is_local=False, handle="slurm_tunnel://nemo_run/7")
    assert as_reported(submitted).state == "running", "only the executor knows"
    assert as_reported(replace(row, host="elsewhere")).state == "running", "only that machine knows"
    assert as_reported(replace(row, started=time.time())).state == "running", "its process comes yet"
    assert as_reported(replace(row, started=time.time()), starting_seconds=0).state == "pending"
    with reporting(row.run_dir):
        pass
    assert (as_reported(row).state, as_reported(row).exit_code) == ("done", 0)
    with pytest.raises(SystemExit), reporting(row.run_dir):
        sys.exit(143)
    assert ledger.jobs()[0].state == "pending" and "last checkpoint" in ledger.jobs()[0].reason
    with pytest.raises(ValueError), reporting(row.run_dir):
        raise ValueError("a bug")
    assert (ledger.jobs()[0].state, ledger.jobs()[0].reason) == ("failed", "ValueError: a bug")
    assert ledger.written()[0].state == "running", "reading writes nothing"


@pytest.mark.parametrize(
    ("code", "state", "reason"),
    [
        (0, "done", ""),
        (130, "pending", "interrupted"),
        (143, "pending", "interrupted"),
        (137, "failed", "signal 9"),
        (2, "failed", "exit code 2"),
        (None, "failed", "without a word"),
    ],
)
def test_state_after_an_exit_code(code, state, reason):
    row = ended(JobRow(0, "id", [], "/r", "running"), code, when=5.0)
    assert (row.state, row.exit_code, row.ended) == (state, code, 5.0) and reason in row.reason


def test_a_report_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(ValueError), reporting(tmp_path):
        raise ValueError("refused 0123456789abcdef")
    assert "0123456789abcdef" not in (tmp_path / "job.json").read_text()
    assert json.loads((tmp_path / "job.json").read_text())["exit_code"] == read_report(tmp_path).exit_code == 1
    assert isinstance(read_report(tmp_path), Report)


def test_sweeps_are_found_by_the_beginning_of_their_id(tmp_path):
    root = tmp_path / "runs" / "sweeps"
    with pytest.raises(UserError, match="no sweep in"):
        find_sweep(root, None)
    for age, name in enumerate(("abc1", "abc2", "x", "xy")):
        path = Ledger(root / name, create=True).path
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_sweep(root, None).name == "abc1" and find_sweep(root, "abc2").name == "abc2"
    assert find_sweep(root, "x").name == "x", "an exact id before longer ones"
    with pytest.raises(UserError, match="id of one sweep: abc1, abc2"):
        find_sweep(root, "ab")
    with pytest.raises(UserError, match="Did you mean 'abc1'"):
        find_sweep(root, "abd1")
    with pytest.raises(UserError, match="a folder with a ledger"):
        Ledger(root / "none")


def test_reading_imports_neither_torch_nor_nemo(ledger):
    code = (
        "import sys; from vlmsft.sweeping.ledger import Ledger; assert len(Ledger(sys.argv[1]).jobs()) == 5\n"
        "assert not {'torch', 'nemo', 'nemo_run', 'hydra'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(ledger.folder)], check=True)
