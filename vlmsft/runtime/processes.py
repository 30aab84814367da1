"""A job's processes on this machine, told from all others by a variable in their environment, whatever their parents.

Megatron's checkpoints have a process of their own beside each rank, which for ever outlives a rank that is killed, and
has no parent then; torchrun's workers, when torchrun is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Collection, Sequence

import psutil

logger = logging.getLogger(__name__)

KILL_SECONDS = 60.0
"""Before a killed process is given up: one that waits for a device ends only when that answers."""
POLL_SECONDS = 0.05


def processes_with(name: str, values: Collection[str]) -> list[psutil.Process]:
    """All that were started with one of these values in environment variable `name`, without this process."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(name) in values:
                found.append(process)
    return found


def stop_all(name: str, values: Collection[str], seconds: float) -> None:
    """SIGTERM to the workers of jobs, which save a checkpoint and end; SIGKILL to all that is left then.

    Not to torchrun: it would kill its workers after 30 s, whether they have saved or not.

    seconds: before what is still alive is killed
    """
    family = processes_with(name, values)
    for worker in _workers(family):
        with contextlib.suppress(psutil.Error):
            worker.send_signal(signal.SIGTERM)
    _wait(family, seconds)
    kill_all(name, values)


def kill_all(name: str, values: Collection[str]) -> None:
    """SIGKILL until none is left, also to those that are started meanwhile. What a driver holds is named and left."""
    deadline = time.monotonic() + KILL_SECONDS
    while (left := processes_with(name, values)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _wait(left, 1.0)
    if left:
        pids = ", ".join(str(process.pid) for process in left)
        logger.warning("SIGKILL didn't end processes %s within %.0f s", pids, KILL_SECONDS)


def _workers(family: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The first process of each job; of torchrun its children, where it has some."""
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


def _wait(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Until they have ended. psutil.wait_procs would take children's exit codes from those who started them."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(_runs(process) for process in processes):
        time.sleep(POLL_SECONDS)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
