"""Jobs on this machine: each a process with a session of its own, that holds its job's lock (vlmsft.sweeping.report).

NeMo-Run's local scheduler isn't used for this, only what it would start: it starts all jobs at once, keeps 100 of them,
leaves them running when it is ended, and tells no exit code to a process that comes after it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmsft.runtime.processes import kill_all, stop_all
from vlmsft.sweeping.report import LOCK_IS_HELD, take_lock

OUTPUT_FILE = "output.log"
"""What a job prints, in its run folder."""
RUN_DIR = "VLMSFT_SWEEP_RUN_DIR"
"""In the environment of each process of a job (vlmsft.runtime.processes)."""
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


def stop(run_dirs: Sequence[str], seconds: float = STOP_SECONDS) -> None:
    """SIGTERM to the workers of these jobs, which save a checkpoint and end; SIGKILL to all that is left then."""
    stop_all(RUN_DIR, run_dirs, seconds)


def kill(run_dirs: Sequence[str]) -> None:
    """SIGKILL to all processes of these jobs (see kill_all)."""
    kill_all(RUN_DIR, run_dirs)
