"""Jobs in this process and through NeMo-Run: exit codes, messages, interrupts, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import job_toys
import psutil
import pytest
from launch_cases import SENTINELS, files_with
from nemo_forks import Forked, environment


def toy_environment(home: Path) -> dict[str, str]:
    """A bare PATH, a HOME of its own and tokens."""
    kept = {name: value for name, value in environment().items() if name not in ("RANK", "LOCAL_RANK")}
    return {**kept, "PATH": "/usr/bin:/bin", "HOME": str(home), **SENTINELS}


class Started:
    """A process that runs a toy job in its toy environment."""

    def __init__(self, function: str, folder: Path, how: str):
        self.run_dir = folder / "runs" / "toys" / "one"
        self.run_dir.mkdir(parents=True)
        toys = (job_toys.start, function, str(self.run_dir), how)
        self.fork = Forked(*toys, folder=folder, environment=toy_environment(folder))
        self.process = psutil.Process(self.fork.process.pid)

    def end(self) -> tuple[int, str]:
        return self.fork.wait(120), self.fork.output()

    def workers(self, number: int) -> list[int]:
        """Ids of the working processes, once there are so many."""
        deadline = time.monotonic() + 100
        while len(found := [int(path.stem) for path in self.run_dir.glob("*.pid")]) < number:
            assert time.monotonic() < deadline and self.fork.process.is_alive(), "they did not start"
            time.sleep(0.1)
        return found


slow = pytest.mark.nemo  # no NeMo, but torch and nemo_run in up to four processes: too slow for the default tests


@pytest.fixture
def started(tmp_path):
    all_started = []

    def start(function: str, how: str) -> Started:
        all_started.append(Started(function, tmp_path, how))
        return all_started[-1]

    yield start
    for one in all_started:
        one.fork.kill()


@slow
def test_torchrun(tmp_path):
    """The environment's own python and torchrun, though PATH doesn't know them; all files below the run folder,
    and no token in one of them."""
    run_dir, home = tmp_path / "one", tmp_path / "home"
    run_dir.mkdir()
    home.mkdir()
    command = [sys.executable, job_toys.__file__, "write_rank", str(run_dir), "torchrun"]
    done = subprocess.run(command, env=toy_environment(home), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "progress of rank 0\n", done.stdout + done.stderr
    for rank in (0, 1):
        assert (run_dir / f"rank{rank}").read_text() == sys.executable
    assert (run_dir / "nemo.log").exists() and (run_dir / "nemo-rank1.log").exists()
    assert (run_dir / "nemo-run" / "experiments").is_dir()
    assert list(home.iterdir()) == [], "nothing in ~/.nemo_run"
    assert files_with(["job_toys"], run_dir), "the search finds what NeMo-Run has packed"
    assert files_with(list(SENTINELS.values()), run_dir) == []


@slow
def test_torchrun_failure(started):
    one = started("fail", "torchrun")
    code, output = one.end()
    assert code == 1
    assert "ValueError: a bug in rank 1" in output and "rank 1 failed" in output
    assert str(one.run_dir / "nemo.log") in output and str(one.run_dir / "nemo-run") in output


@slow
def test_torchrun_user_error(started):
    code, output = started("refuse", "torchrun").end()
    assert code == 2 and "Traceback" not in output
    assert output.count("train.jsonl:3: found an unreadable image") == 1 and "the run stopped" in output


@slow
def test_torchrun_worker_killed(started):
    one = started("die", "torchrun")
    code, output = one.end()
    assert code == 1 and "rank 1 was ended by SIGKILL" in output and "nemo.log" in output
    assert "Traceback" not in output, "of rank 0, which failed of it"
    assert "no checkpoint yet" in output
    assert json.loads((one.run_dir / "failure.json").read_text())["rank"] == 1
    (left,) = one.run_dir.glob("*.pid")
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie: this machine's first process hasn't looked yet
        assert psutil.Process(int(left.stem)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("failures", "killed"),
    [
        ({0: (1, "02"), 1: (-9, "02"), 2: (-15, "02")}, (1, "SIGKILL")),  # rank 0 fails of it in the same second
        ({0: (143, "03"), 1: (-11, "02")}, (1, "SIGSEGV")),
        ({0: (1, "03"), 1: (-35, "02")}, (1, "signal 35")),  # real-time, which Python has no name for
        ({0: (-9, "32"), 1: (1, "02"), 2: (-15, "02")}, None),  # by torchrun, which waited for it
        ({}, None),
    ],
)
def test_a_killed_rank_is_told_from_those_that_fail_of_it(tmp_path, failures, killed):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    from vlmsft.runtime.job import killed_rank

    text = ""
    if failures:
        made = {rank: ProcessFailure(rank, 1000 + rank, code, "none") for rank, (code, _) in failures.items()}
        for rank, (_, second) in failures.items():
            made[rank].timestamp = int(second)
        text = str(ChildFailedError("worker", made))
    log = tmp_path / "train" / "0" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"NCCL said\n{text}\n")
    assert killed_rank(str(tmp_path)) == killed


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_torchrun_leaves_no_process(started, number, code):
    one = started("sleep", "torchrun")
    workers = one.workers(2)
    family = one.process.children(recursive=True)
    assert {process.pid for process in family} > set(workers)
    one.process.send_signal(number)
    assert one.fork.wait(60) == code
    output = one.fork.output()
    assert "no checkpoint yet: the same command with id=one would start over" in output and "Traceback" not in output
    assert [process for process in family if process.is_running() and process.status() != "zombie"] == []


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_training_ends_between_two_steps(started, number, code):
    one = started("train_slowly", "here")
    one.workers(1)
    time.sleep(0.5)
    one.process.send_signal(number)
    found, output = one.end()
    assert found == code
    assert "no checkpoint yet: the same command with id=one would start over" in output and "Traceback" not in output
    assert (one.run_dir / "started").read_text() == (one.run_dir / "ended").read_text()


@slow
def test_interrupted_before_the_training(started):
    one = started("sleep", "here")
    one.workers(1)
    one.process.send_signal(signal.SIGINT)
    code, output = one.end()
    assert code == 130 and "Interrupted" in output and "Traceback" not in output


@slow
def test_second_interrupt_ends_at_once(started):
    one = started("train_slowly", "here")
    one.workers(1)
    for _ in range(2):
        one.process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    code, output = one.end()
    assert code == 130 and "Traceback" not in output


def test_how_to_go_on_names_the_step_that_a_resume_starts_from(tmp_path):
    from vlmsft.runtime.job import Job, how_to_go_on

    def checkpoint(name: str, time: float) -> Path:
        path = tmp_path / "checkpoints" / name
        path.mkdir(parents=True, exist_ok=True)
        os.utime(path, (time, time))
        return path

    job = Job(None, str(tmp_path), "toys", "one")
    nothing = "the training has stopped, no checkpoint yet: the same command with id=one would start over"
    assert how_to_go_on(job) == nothing
    first = checkpoint("model_name=0--val_loss=5.71-step=9-consumed_samples=20.0-last", 1e9)
    unfinished = first.with_name(f"{first.name}-unfinished")
    unfinished.touch()
    assert how_to_go_on(job) == nothing, "NeMo's marker: it was being written"
    unfinished.unlink()
    checkpoint("model_name=0--val_loss=5.63-step=99-consumed_samples=40.0", 3e9)  # no resume starts from these
    assert "To go on from step 10: the same command with id=one" in how_to_go_on(job)
    newest = checkpoint("model_name=0--val_loss=5.63-step=4-consumed_samples=10.0-last", 2e9)
    assert "from step 5:" in how_to_go_on(job)
    newest.rename(newest.with_name("mine-last"))
    assert "from mine-last:" in how_to_go_on(job)


@slow
def test_marker_is_that_of_nemo():
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from vlmsft.runtime.job import UNFINISHED_SUFFIX

    assert UNFINISHED_SUFFIX == ModelCheckpoint.UNFINISHED_CHECKPOINT_SUFFIX


def test_a_frozen_recipe_is_read_back(tmp_path):
    import nemo_run as run

    from vlmsft.runtime import job

    recipe = run.Partial(job_toys.write_rank, folder=str(tmp_path))
    (tmp_path / job.RECIPE_FILE).write_text(job.ZlibJSONSerializer().serialize(recipe))
    read = job.read_job(tmp_path)
    assert read.recipe == recipe and read.run_dir == str(tmp_path) and read.id == tmp_path.name
