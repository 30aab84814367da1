"""From a multirun's command line to its jobs' ends: one sweep whatever the sweeper, resumed when it is typed again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nemo_forks import Forked, environment, run_module
from sweep_toys import starts

from vlmsft.config_files import root
from vlmsft.sweeping.ledger import Ledger, find_sweep

HERE = Path(__file__).resolve().parent
DEMO = ["-m", "experiment=demo", "hydra.launcher.max_parallel=2"]


@pytest.fixture
def run(tmp_path):
    """Runs a command in a folder of its own: exit code, and what it prints."""

    def run(*words: str) -> tuple[int, str]:
        command = Forked(run_module, *words, folder=tmp_path, environment=variables())
        return command.wait(300), command.output()

    return run


def variables() -> dict[str, str]:
    secret = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
    return environment(PYTHONPATH=os.pathsep.join([str(HERE), str(root())]), **secret)


def train(run, *words: str) -> tuple[int, str]:
    return run("launch_toys", *DEMO, *words)


def the_sweep(tmp_path: Path) -> Ledger:
    return Ledger(find_sweep(tmp_path / "runs" / "sweeps", None))


@pytest.mark.nemo
def test_a_sweep_to_its_end_and_typed_again(run, tmp_path):
    """No NeMo, but nemo_run in several processes."""
    points = ["seed=1,13", "optim.max_lr=1.0"]
    code, output = train(run, *points, "strategy.tensor_model_parallel_size=1,3")
    assert code == 1 and "Traceback" not in output
    ledger = the_sweep(tmp_path)
    rows = ledger.jobs()
    assert [row.state for row in rows] == ["done", "infeasible", "failed", "infeasible"], output
    assert [row.overrides[0] for row in rows] == ["seed=1", "seed=1", "seed=13", "seed=13"]
    assert rows[0].objective == 4.0 and rows[2].exit_code == 1 and rows[2].reason == "ValueError: a bug"
    assert "tensor_model_parallel_size: found 3" in rows[1].reason
    assert rows[0].run_dir == str(tmp_path / "runs" / "demo" / f"{ledger.id}-0")
    for name in ("config.yaml", "provenance.json", "recipe.json", "job.json", "output.log"):
        assert (Path(rows[0].run_dir) / name).is_file()
    assert f"id: {ledger.id}\n  num: 0" in (Path(rows[0].run_dir) / "config.yaml").read_text()
    assert len(list((ledger.folder / "nemo-run" / "experiments").glob("*/*"))) == 1, "one Experiment"
    assert not (tmp_path / "runs" / "multirun").exists()

    code, output = train(run, *points, "strategy.tensor_model_parallel_size=1,3")
    assert code == 1 and [len(starts(row.run_dir)) for row in rows] == [1, 0, 1, 0], "nothing runs again"
    code, output = run("vlmsft.sweep", "retry", ledger.id[:4], "job=2")
    assert code == 1 and [len(starts(row.run_dir)) for row in rows] == [1, 0, 2, 0], output
    code, output = run("vlmsft.sweep", "logs", ledger.id, "job=2")
    assert code == 0 and "ValueError: a bug" in output
    code, output = run("vlmsft.sweep", "status")
    assert code == 0 and output.startswith(f"sweep {ledger.id}: 1 done, 1 failed, 2 infeasible\n")

    secret = "0123456789abcdef0123456789abcdef01234567"
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert secret.encode() not in path.read_bytes(), path


@pytest.mark.nemo
def test_a_sweeper_that_reads_what_jobs_returned(run, tmp_path):
    sweeper = "hydra.sweeper._target_=hydra_plugins.toy_sweeper.ToySweeper"
    code, output = train(run, sweeper)
    assert code == 0, output
    assert json.loads((tmp_path / "tried.json").read_text()) == {"1.0": 4.0, "4.0": 1.0, "3.5": 0.25, "4.5": 2.25}
    ledger = the_sweep(tmp_path)
    assert [row.objective for row in ledger.jobs()] == [4.0, 1.0, 0.25, 2.25], "two batches are one sweep"
    assert [row.overrides for row in ledger.jobs()][2:] == [["optim.max_lr=3.5"], ["optim.max_lr=4.5"]]


@pytest.mark.nemo
def test_a_dry_run_starts_nothing_and_a_resume_does(run, tmp_path):
    code, output = train(run, "seed=1,2", "hydra.launcher.dryrun=true", "sweep.id=mine")
    assert code == 0 and "nothing was started: 2 pending" in output and "resume mine" in output
    ledger = the_sweep(tmp_path)
    assert ledger.id == "mine" and [row.state for row in ledger.jobs()] == ["pending"] * 2
    code, output = run("vlmsft.sweep", "cancel", "mine", "job=1")
    assert code == 0 and [row.state for row in ledger.jobs()] == ["pending", "cancelled"], output
    code, output = run("vlmsft.sweep", "resume", "mine")
    assert code == 0 and [row.state for row in ledger.jobs()] == ["done"] * 2, output


@pytest.mark.nemo
def test_a_detached_sweep_goes_on_in_the_background(run, tmp_path):
    (tmp_path / "hold").touch()
    code, output = train(run, "seed=1,2,3", "hydra.launcher.detach=true", "sweep.id=mine")
    assert code == 0 and "sweep mine runs in the background" in output, output
    ledger = the_sweep(tmp_path)
    try:
        wait_until(lambda: states_of(ledger) == ["running", "running", "pending"], ledger)
        code, output = run("vlmsft.sweep", "status")
        assert code == 0 and output.startswith("sweep mine: 1 pending, 2 running\n"), output
        code, output = run("vlmsft.sweep", "resume", "mine")
        assert code == 2 and "sweep: found mine, which process" in output, output
        wait_until(lambda: starts(ledger.job(1).run_dir), ledger)  # a claimed job needs its time to start
        code, output = run("vlmsft.sweep", "cancel", "mine", "job=1")
        assert code == 0, output
        (tmp_path / "hold").unlink()
        wait_until(lambda: states_of(ledger) == ["done", "cancelled", "done"], ledger)
        assert [len(starts(row.run_dir)) for row in ledger.jobs()] == [1, 1, 1]
    finally:
        run("vlmsft.sweep", "cancel", "mine")


def states_of(ledger: Ledger) -> list[str]:
    return [row.state for row in ledger.jobs()]


def wait_until(condition, ledger: Ledger) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        log = ledger.folder / "launcher.log"
        assert time.monotonic() < deadline, (ledger.jobs(), log.read_text())
        time.sleep(0.1)


@pytest.mark.nemo
def test_a_sweep_of_which_no_job_can_run(run, tmp_path):
    code, output = train(run, "strategy.tensor_model_parallel_size=3,5", "hydra.launcher.detach=true")
    assert code == 1 and "Traceback" not in output, output
    assert "no job was started, since none can run:" in output
    assert "job 1 (strategy.tensor_model_parallel_size=5): infeasible, strategy.tensor_model_parallel_size" in output
    assert states_of(the_sweep(tmp_path)) == ["infeasible"] * 2 and not (tmp_path / "runs" / "demo").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.max_lrr=1,2"], "Did you mean 'optim.max_lr'?"),
        (["seed=1,2", "hydra.launcher.max_parallel=none", "hydra.launcher.on_failure=halt"], "2 problems"),
        (["seed=1,2", "hydra.launcher.max_paralel=2"], "max_paralel"),
        (["seed=1,2", "hydra/launcher=basic"], "hydra/launcher: found basic, expected nemo_run"),
    ],
)
def test_what_is_wrong_starts_nothing(tmp_path, words, expected):
    command = [sys.executable, "-m", "vlmsft.train", *DEMO[:2], *words]
    done = subprocess.run(command, cwd=tmp_path, env=variables(), capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and expected in output and "Traceback" not in output, output
    assert not (tmp_path / "runs" / "sweeps").exists() and not (tmp_path / "runs" / "demo").exists()
