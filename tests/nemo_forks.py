"""Processes that have imported NeMo when they begin: forked from one that did, which takes 30 s of CPU time.

Where there is a GPU, each imports it itself: what is imported may talk to the driver, and no fork survives that.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg")


class Forked:
    """A process that calls `function`, one of a module's, in `folder` and in a session of its own. Its streams go to a
    file.

    environment: all that it has
    """

    def __init__(self, function: Callable, *arguments: object, folder: Path, environment: dict[str, str]):
        handle, self._output = tempfile.mkstemp(suffix=".log", dir=folder)
        os.close(handle)
        self.process = _context().Process(
            target=_call, args=(function, arguments, str(folder), environment, self._output)
        )
        self.process.start()

    def output(self) -> str:
        return Path(self._output).read_text(encoding="utf-8", errors="replace")

    def wait(self, seconds: float) -> int:
        """Its exit code, that of a signal negative. One that isn't done by then is killed."""
        try:
            self.process.join(seconds)
            assert self.process.exitcode is not None, f"not done after {seconds} s:\n{self.output()[-6000:]}"
        except BaseException:  # Ctrl-C too: at pytest's end multiprocessing would wait for it
            self.kill()
            raise
        return self.process.exitcode

    def kill(self) -> None:
        """With its session: what it started itself would keep the server."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()  # where it had no session of its own yet
        self.process.join()


def wait_for_all(started: Sequence[Forked], seconds: float) -> None:
    """Until all have ended well. One that fails ends the others, which would wait for it."""
    end = time.monotonic() + seconds
    try:
        running = list(started)
        while running:
            ended = multiprocessing.connection.wait(
                [one.process.sentinel for one in running], max(0.0, end - time.monotonic())
            )
            failed = [one for one in running if one.process.exitcode not in (None, 0)]
            assert ended and not failed, "\n\n".join(one.output()[-6000:] for one in started)
            running = [one for one in running if one.process.exitcode is None]
    finally:
        for one in started:
            one.kill()


def run_module(module: str, *arguments: str) -> None:
    """What `python -m MODULE ARGUMENTS` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_in_fork(command: Sequence[str], env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
    """subprocess.run of a `python -m MODULE ARGUMENTS` whose paths are absolute; both its streams as stderr."""
    assert command[:2] == [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        fork = Forked(run_module, *command[2:], folder=Path(folder), environment=env)
        try:
            return subprocess.CompletedProcess(command, fork.wait(600), "", fork.output())
        finally:
            fork.kill()


def environment(**variables: str) -> dict[str, str]:
    """This process', with the tests and what they test on the path of what the other one starts."""
    paths = [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}


@functools.cache
def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([] if any(map(os.path.exists, GPU_DEVICES)) else ["nemo_imported"])
    # one thread: those of OpenMP don't survive a fork either
    with mock.patch.dict(os.environ, environment(OMP_NUM_THREADS="1")):
        forkserver.ensure_running()
    return context


def _call(function: Callable, arguments: tuple, folder: str, environment: dict[str, str], output: str) -> None:
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as anywhere else
    _leave_the_servers_ends_to_it()
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # multiprocessing's processes end without them


def _leave_the_servers_ends_to_it() -> None:
    """What the process that this one was forked from does when it ends, such as removing wandb's folder of media."""
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
