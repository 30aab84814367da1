"""What a job says of itself in its run folder, that it started and how it ended; and the lock it holds while it runs.

    job.json   {"started", "ended", "exit_code", "reason", "host", "pid"}
    job.lock   an empty file, locked (flock) for as long as a process of the job lives

A worker writes here and never into the ledger: one writer for each file, written aside and renamed, which is safe on
NFS as well, and a container needs to see no folder but its run's. So a launcher that was killed loses nothing.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlmsft.errors import USER_ERROR_EXIT_CODE, UserError, format_problems
from vlmsft.runtime.metrics_rows import FAILURE_FILE

REPORT_FILE = "job.json"
LOCK_FILE = "job.lock"
LOCK_IS_HELD = "VLMSFT_JOB_LOCK_IS_HELD"
"""Set for a worker that inherited the lock from the launcher that started it."""
RUNS_ALREADY_EXIT_CODE = 75
"""sysexits.h: EX_TEMPFAIL. Another worker holds the job's lock."""


@dataclass(frozen=True)
class Report:
    """started, ended: seconds since the epoch; ended and exit_code are None while it runs, or when it was killed"""

    started: float
    host: str
    pid: int
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""


def read_report(run_dir: str | os.PathLike[str]) -> Report | None:
    """What the job last said; None before its worker was up."""
    try:
        return Report(**json.loads(Path(run_dir, REPORT_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def forget_report(run_dir: str | os.PathLike[str]) -> None:
    """Before another start, so that what is read later is of that one. Makes the run folder where there is none."""
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    for name in (REPORT_FILE, FAILURE_FILE):
        Path(run_dir, name).unlink(missing_ok=True)


@contextlib.contextmanager
def reporting(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Reports the start of what runs inside, and its end with the exit code that this process is about to have."""
    report = Report(time.time(), socket.gethostname(), os.getpid())
    _write(run_dir, report)
    code, reason = 0, ""
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    except UserError as error:
        code, reason = USER_ERROR_EXIT_CODE, format_problems(error)
        raise
    except BaseException as error:
        code, reason = 1, f"{type(error).__name__}: {error}"
        raise
    finally:
        _write(run_dir, replace(report, ended=time.time(), exit_code=code, reason=_safe(reason)))


def _safe(reason: str) -> str:
    from vlmsft.runtime.provenance import Scrubber

    return Scrubber.from_environment().text(reason) if reason else ""


def _write(run_dir: str | os.PathLike[str], report: Report) -> None:
    path = Path(run_dir, REPORT_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{report.pid}.partial")
    partial.write_text(json.dumps(asdict(report)), encoding="utf-8")
    os.replace(partial, path)


# --- the lock ---------------------------------------------------------------------------------------------------------


def take_lock(run_dir: str | os.PathLike[str], wait_seconds: float = 1.0) -> int | None:
    """A file descriptor that holds the job's lock, None where another process holds it.

    The lock ends with the last process that has the descriptor: the worker that inherits it, and what that forks.
    wait_seconds: for one who only looks whether it is held (see is_locked)
    """
    Path(run_dir).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(Path(run_dir, LOCK_FILE), os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + wait_seconds
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > deadline:
            os.close(descriptor)
            return None
        time.sleep(0.02)
    return descriptor


def is_locked(run_dir: str | os.PathLike[str]) -> bool:
    """Whether a process of the job lives, on any host that shares locks with this one."""
    try:
        descriptor = os.open(Path(run_dir, LOCK_FILE), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # a file system without locks: nobody holds one
            return True
        raise
    return True
