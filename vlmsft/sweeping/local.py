"""Jobs on this machine: each a process with a session of its own, that holds its job's lock (vlmsft.sweeping.report).

NeMo-Run's local scheduler isn't used for this, only what it would start: it starts all jobs at once, keeps 100 of them,
leaves them running when it is ended, and tells no exit code to a process that comes after it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from vlmsft.sweeping.report import LOCK_IS_HELD, take_lock

OUTPUT_FILE = "output.log"
"""What a job prints, in its run folder."""
RUN_DIR = "VLMSFT_SWEEP_RUN_DIR"
"""In the environment of each process of a job: tells them apart from all others, whatever their parents."""
STOP_SECONDS = 120.0
"""Time for trainings to end their step and to save a checkpoint."""
_NOT_INHERITED = ("VLMSFT_CONSOLE", "HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "VLMSFT_RUN_ID")


def start(
    run_dir: str, command: Sequence[str], environment: Mapping[str, str], output: str | None = None
) -> subprocess.Popen | None:
    """Starts a job's process; None where another process has its lock.

    environment: beside that of this process
    """
    lock = take_lock(run_dir)
    if lock is None:
        return None
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    environment = {**inherited, **environment, RUN_DIR: run_dir, LOCK_IS_HELD: "1"}
    try:
        with open(output or Path(run_dir, OUTPUT_FILE), "ab") as file:
            return subprocess.Popen(
                list(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C in the launcher's terminal is the launcher's alone
            )
    finally:
        os.close(lock)


def exit_code(process: subprocess.Popen) -> int | None:
    """128 + signal where one ended it; None while it runs."""
    code = process.poll()
    return code if code is None or code >= 0 else 128 - code


def processes_of(run_dirs: Iterable[str]) -> list[psutil.Process]:
    """All processes of these jobs on this machine, also those whose parent is gone."""
    wanted, found = set(run_dirs), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(RUN_DIR) in wanted:
                found.append(process)
    return found


def stop(run_dirs: Sequence[str], seconds: float = STOP_SECONDS) -> None:
    """SIGTERM to the workers of these jobs, which save a checkpoint and end; SIGKILL to all that is left then.

    seconds: before what is still alive is killed
    """
    family = processes_of(run_dirs)
    for process in _workers(family):
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(_runs(process) for process in family):
        time.sleep(0.1)
    kill(run_dirs)


def _workers(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The first process of each job; of torchrun, which would kill its workers after 30 s, its children."""
    members, agents, first = {process.pid for process in family}, set(), []
    for process in family:
        with contextlib.suppress(psutil.Error):
            if any(os.path.basename(word) == "torchrun" for word in process.cmdline()[:2]):
                agents.add(process.pid)
    for process in family:
        with contextlib.suppress(psutil.Error):
            parent = process.ppid()
            if process.pid not in agents and (parent not in members or parent in agents):
                first.append(process)
    return first or list(family)


def kill(run_dirs: Sequence[str]) -> None:
    """SIGKILL to all processes of these jobs, until none is left."""
    while left := [process for process in processes_of(run_dirs) if _runs(process)]:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
