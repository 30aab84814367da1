"""Launching through a real Slurm: single runs on two nodes, failures, SSH, and a sweep that loses jobs and launcher.

A job on the cluster imports NeMo (10-40 s), so each test shows several things.
"""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import free_port
from conftest import ON_THIS_CLUSTER, PATIENCE_SECONDS, TINY, Launchpad
from launch_cases import SENTINELS, files_with, made_job
from sshd import SshServer

from vlmsft.runtime import job
from vlmsft.sweeping.ledger import JobRow, Ledger

pytestmark = pytest.mark.slurm
NUM_STEPS = 40  # of a sweep's job: time enough to lose it in the middle


def until(found: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.2)
    return value


def steps(run_dir: Path) -> list[int]:
    """Optimizer steps with a training loss, as metrics.csv has them."""
    if not (run_dir / "metrics.csv").exists():
        return []
    with open(run_dir / "metrics.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("reduced_train_loss")]


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_on_two_nodes(launchpad):
    """DP=2 over gloo below torchrun, followed to its end; what it leaves holds no token."""
    torchrun = f"{{_target_:nemo_run.Torchrun,rdzv_port:{free_port()}}}"
    overrides = ["trainer.num_nodes=2", f"launch.executor.launcher={torchrun}", "trainer.max_steps=2"]
    single = ["launch=slurm", "launch.follow=true", "id=two", "trainer.val_check_interval=2"]
    code, output = launchpad.run("train", *TINY, *ON_THIS_CLUSTER, *overrides, *single)
    run_dir = launchpad.folder / "runs" / "demo" / "two"
    assert code == 0 and "submitted " in output, output
    assert steps(run_dir) == [1, 2]
    assert (run_dir / "nemo-rank1.log").exists() and list((run_dir / "checkpoints").glob("*last"))
    nodes = {line.split()[-1] for line in launchpad.cluster.run("sacct", "-n", "-X", "-o", "NodeList").splitlines()}
    assert "n[1-2]" in nodes
    assert files_with(list(SENTINELS.values()), launchpad.folder / "runs") == []
    assert "SUCCEEDED" in how_it_is(launchpad, output)


def how_it_is(launchpad: Launchpad, output: str) -> str:
    """What the command says that a launch has printed."""
    command = output.split("how it is: ")[1].split(";")[0]
    environment = {**launchpad.environment, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.fixture
def launch_here(launchpad, monkeypatch):
    """job.launch in this process, with the launchpad's environment."""
    monkeypatch.chdir(launchpad.folder)
    for name, value in launchpad.environment.items():
        monkeypatch.setenv(name, value)
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)  # NeMo-Run's packager reads it, pytest's refuses
        yield launchpad


@pytest.mark.parametrize(
    ("function", "code", "said"),
    [("fail", 1, "ValueError: a bug in rank 1"), ("refuse", 2, "train.jsonl:3: found an unreadable image")],
)
def test_a_failed_job_is_explained(launch_here: Launchpad, function, code, said, capfd):
    run_dir = launch_here.folder / "runs" / "toys" / "one"
    made, executor = made_job("slurm", run_dir, *ON_THIS_CLUSTER, "trainer.devices=1", function=function)
    assert executor is not None and job.launch(made, executor, follow=True) == code
    output = capfd.readouterr().out
    assert said in output and ("Traceback" in output) == (function == "fail")
    number = output.split("submitted ")[1].split(";")[0]
    assert launch_here.cluster.wait_for(number, "FAILED", "COMPLETED")[0] == "FAILED"


def test_through_ssh(launch_here: Launchpad, tmp_path, monkeypatch, capfd):
    with SshServer(tmp_path / "ssh", launch_here.cluster.environment) as server:
        monkeypatch.setenv("PATH", f"{server.client_folder}:{os.environ['PATH']}")
        tunnel = [
            "launch.executor.tunnel.host=127.0.0.1",
            f"launch.executor.tunnel.port={server.port}",
            f"launch.executor.tunnel.user={server.user}",
            f"launch.executor.tunnel.identity={server.identity}",
            f"launch.executor.tunnel.job_dir={tmp_path / 'remote'}",
            f"+launch.executor.env_vars.PATH={os.path.dirname(sys.executable)}:$PATH",
            f"+launch.executor.env_vars.PYTHONPATH={launch_here.environment['PYTHONPATH']}",
        ]
        run_dir = tmp_path / "run"
        made, executor = made_job("slurm_ssh", run_dir, *ON_THIS_CLUSTER, "trainer.devices=1", *tunnel)
        assert executor is not None
        assert job.launch(made, executor, follow=True) == 0, capfd.readouterr().out
    assert (run_dir / "rank").read_text() == sys.executable
    assert list((tmp_path / "remote").rglob("log-*.out")), "NeMo-Run's files lie where the tunnel leads"


# --- a sweep ----------------------------------------------------------------------------------------------------------


def test_a_sweep_that_loses_jobs_and_launcher(launchpad: Launchpad):
    """LR x TP. One job is preempted, one is cancelled with scancel, the launcher is killed; `sweep resume` ends it."""
    points = ["optim.max_lr=1e-3,2e-3", "strategy.tensor_model_parallel_size=1,2"]
    sweep = ["launch=slurm", "sweep.id=lost", "trainer.devices=${strategy.tensor_model_parallel_size}"]
    long = [f"trainer.max_steps={NUM_STEPS}", f"trainer.val_check_interval={NUM_STEPS}"]
    launcher = launchpad.start("train", "-m", *points, *TINY, *ON_THIS_CLUSTER, *sweep, *long)
    try:
        _lose_two_jobs(launchpad)
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        output, _ = launcher.communicate()
    code, more = launchpad.run("sweep", "resume", "lost")
    rows = ledger_of(launchpad).jobs()
    assert code == 0 and [row.state for row in rows] == ["done"] * 4, output + more
    for row in rows:
        assert row.objective is not None, f"job {row.num} was validated at its end, wherever it was interrupted"
        assert steps(Path(row.run_dir)) == list(range(1, NUM_STEPS + 1)), f"job {row.num} did each step once"
    submissions = launchpad.cluster.jobs()
    assert sum(state == "CANCELLED" for state, _ in submissions.values()) == 1
    assert files_with(list(SENTINELS.values()), launchpad.folder / "runs") == []
    again, output = launchpad.run("sweep", "resume", "lost")
    assert again == 0 and launchpad.cluster.jobs().keys() == submissions.keys(), "nothing is left to do"


def ledger_of(launchpad: Launchpad) -> Ledger:
    return Ledger(launchpad.folder / "runs" / "sweeps" / "lost")


def _lose_two_jobs(launchpad: Launchpad) -> None:
    """The first job that trains is preempted, the next one gets scancel."""
    folder = launchpad.folder / "runs" / "sweeps" / "lost"
    until((folder / "ledger.sqlite").exists, PATIENCE_SECONDS, "the ledger")

    def training(but: int | None = None) -> list[JobRow]:
        rows = [row for row in ledger_of(launchpad).jobs() if row.num != but]
        return [row for row in rows if 2 <= len(steps(Path(row.run_dir))) < NUM_STEPS - 10]  # not just before its end

    (preempted, *_) = until(training, PATIENCE_SECONDS, "a job that trains")
    node = launchpad.cluster.run("squeue", "-h", "-j", number_of(preempted), "-o", "%N").strip()
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-A", "test", "-w", node, "--exclusive", "-o", "/dev/null"]
    number = launchpad.cluster.run(*urgent, "--wrap", "sleep 1").strip()
    launchpad.cluster.wait_for(number, "COMPLETED")
    assert job.newest_checkpoint(preempted.run_dir) is not None and len(steps(Path(preempted.run_dir))) < NUM_STEPS

    (cancelled, *_) = until(lambda: training(but=preempted.num), PATIENCE_SECONDS, "another job that trains")
    launchpad.cluster.run("scancel", number_of(cancelled))
    launchpad.cluster.wait_for(number_of(cancelled), "CANCELLED")


def number_of(row: JobRow) -> str:
    assert row.handle is not None
    return row.handle.rpartition("/")[2]
