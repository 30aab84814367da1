"""A sweep's jobs as tasks of one NeMo-Run Experiment, each to be started by itself.

Experiment.run starts all tasks at once, which leaves no room for `max_parallel`, and waits for them in a way that can't
be interrupted. So this takes the steps of it one by one: all tasks are added, packaged and written down (NeMo-Run's
files, sbatch scripts), and then a task is submitted when its turn comes. A task for this machine isn't submitted at
all: `command` and `environment` are what NeMo-Run would start (see vlmsft.sweeping.local).

NeMo-Run's files lie in the sweep's folder, below nemo-run/.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.config import set_nemorun_home
from nemo_run.core.execution.base import Executor
from nemo_run.core.execution.slurm import SlurmExecutor
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from nemo_run.core.tunnel.client import SSHTunnel
from nemo_run.core.tunnel.rsync import rsync
from torchx.specs.api import AppState, is_terminal

from vlmsft.runtime.job import HOME, as_user_errors, build_executor
from vlmsft.runtime.logging import CONSOLE_PATH
from vlmsft.sweeping import slurm
from vlmsft.sweeping.ledger import JobRow


class SweepExperiment:
    """The tasks of `rows`; a context manager, to be used inside `with`.

    folder: the sweep's
    """

    def __init__(self, folder: Path, rows: Sequence[JobRow]):
        self._home = folder / HOME
        set_nemorun_home(str(self._home))
        self._experiment = run.Experiment(
            re.sub(r"[^\w.-]", "_", folder.name),
            base_dir=str(self._home),
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        self._rows = rows
        self._jobs: dict[int, Any] = {}

    @contextlib.contextmanager
    def prepared(self) -> Iterator[SweepExperiment]:
        """All tasks added and written down. Raises UserError where an executor or packager refuses one."""
        with self._experiment:
            for row in self._rows:
                self._experiment.add(script_of(row), executor=executor_of(row), name=task_name(row.num))
            self._jobs = {row.num: job for row, job in zip(self._rows, self._experiment.jobs, strict=True)}
            with as_user_errors():
                self._experiment.dryrun(log=False, exist_ok=True, delete_exp_dir=False)
            yield self

    @property
    def folder(self) -> str:
        return self._experiment._exp_dir

    def scripts(self) -> list[str]:
        """What would be submitted."""
        return sorted(str(path) for path in Path(self.folder).glob("*_sbatch.sh"))

    # -- on this machine

    def command(self, num: int) -> tuple[list[str], dict[str, str]]:
        """What NeMo-Run would start for a task of this machine, and its environment beside that of this process."""
        request = self._jobs[num]._dryrun_info.request
        (replicas,) = request.role_params.values()
        return list(replicas[0].args), dict(replicas[0].env)

    # -- elsewhere

    def connect(self) -> None:
        """Brings the files to where the executors' tunnels lead. Needed before `submit`."""
        for tunnel in self._experiment.tunnels.values():
            if isinstance(tunnel, SSHTunnel):
                tunnel.connect()
                rsync(tunnel.session, self.folder, os.path.dirname(tunnel.job_dir))  # type: ignore[arg-type]
            links = [job.symlink_cmd() for job in tunnel.packaging_jobs.values() if job.symlink]
            if links:
                tunnel.run(" && ".join(links))
        self._experiment._save_tunnels()

    def submit(self, num: int, after: str | None = None) -> str:
        """Submits a task; gives its handle. May be called in several threads, each in a copy of the caller's context
        (contextvars). `note` must follow.

        after: handle of a task after whose end (however it ends) Slurm is to start this one
        """
        job = self._jobs[num]
        if job.launched:  # NeMo-Run's request is good for one submission
            job.launch(wait=False, runner=self._experiment._runner, dryrun=True)
        if after is not None:
            job.executor.dependencies, job.executor.dependency_type = [after], "afterany"
        os.environ.pop(CONSOLE_PATH, None)  # a submitted job inherits the environment, but not this process's files
        with as_user_errors():
            job.launch(wait=False, runner=self._experiment._runner)
        return job.handle

    def note(self, nums: Sequence[int]) -> None:
        """Writes the handles of submitted tasks into NeMo-Run's own file, for `nemorun experiment`. (Experiment's
        _save_jobs would serialize all tasks each time.)"""
        path = Path(self.folder, run.Experiment._TASK_FILE)
        tasks = json.loads(path.read_text(encoding="utf-8"))
        places = {num: place for place, num in enumerate(self._jobs)}
        for num in nums:
            tasks[places[num]] = self._jobs[num].serialize()
        aside = path.with_name(f"{path.name}.new")
        aside.write_text(json.dumps(tasks), encoding="utf-8")
        aside.replace(path)


def task_name(num: int) -> str:
    return f"job_{num}"


def script_of(row: JobRow) -> run.Script:
    """The worker's command as NeMo-Run's task; torchrun and srun can multiply it."""
    entrypoint, *words = row.command
    if words[:1] == ["-m"]:
        return run.Script(path=words[1], args=words[2:], entrypoint=entrypoint, m=True)
    return run.Script(path=words[0], args=words[1:], entrypoint=entrypoint)


def executor_of(row: JobRow) -> Executor:
    config = run.Config(run.LocalExecutor) if row.executor is None else ZlibJSONSerializer().deserialize(row.executor)
    return build_executor(config)  # type: ignore[arg-type]


def is_here(executor: run.Config | None) -> bool:
    """Whether its jobs are processes of this machine, which a launcher starts itself."""
    target = run.LocalExecutor if executor is None else fdl.get_callable(executor)
    return isinstance(target, type) and issubclass(target, run.LocalExecutor)


def frozen(executor: run.Config | None) -> str | None:
    return None if executor is None else ZlibJSONSerializer().serialize(executor)


# --- jobs that were submitted, from any process -----------------------------------------------------------------------


def app_id(handle: str) -> str:
    """slurm_tunnel://nemo_run/1234: 1234"""
    return handle.rpartition("/")[2]


class Submitted:
    """Asks after jobs that an executor runs elsewhere, and ends them; needs no Experiment."""

    def __init__(self, folder: Path):
        set_nemorun_home(str(folder / HOME))
        self._executors: dict[str, Executor] = {}
        self._runner: Any = None

    def states(self, rows: Sequence[JobRow]) -> dict[int, tuple[str, int | None, str]]:
        """{num: (what became of it, exit code, the executor's word for it)}; one nobody can tell of is left out.

        What became of it: 'running', 'again' (to be submitted again), 'interrupted' or 'ended'.
        """
        found: dict[int, tuple[str, int | None, str]] = {}
        on_slurm: dict[str, list[JobRow]] = {}
        for row in rows:
            if isinstance(self._executor(row), SlurmExecutor):
                on_slurm.setdefault(row.executor or "", []).append(row)
            else:
                found.update(self._state_elsewhere(row))
        for group in _by_tunnel(on_slurm, self._executor).values():
            said = slurm.states([app_id(row.handle or "") for row in group], self._ask(group[0]))
            for row in group:
                if app_id(row.handle or "") in said:
                    state, code = said[app_id(row.handle or "")]
                    found[row.num] = (_kind(state), code, state)
        return found

    def cancel(self, rows: Sequence[JobRow]) -> None:
        for row in rows:
            if isinstance(self._executor(row), SlurmExecutor):
                self._ask(row)(f"scancel {app_id(row.handle or '')}")
            else:
                self._nemo_runner().cancel(row.handle)

    def _executor(self, row: JobRow) -> Executor:
        key = row.executor or ""
        if key not in self._executors:
            self._executors[key] = executor_of(row)
        return self._executors[key]

    def _ask(self, row: JobRow):
        tunnel: Any = self._executor(row).tunnel  # type: ignore[attr-defined]

        def ask(command: str) -> str:
            if isinstance(tunnel, SSHTunnel):
                tunnel.connect()
            result = tunnel.run(command, hide=True, warn=True)
            return result.stdout if result.return_code == 0 else ""

        return ask

    def _nemo_runner(self) -> Any:
        if self._runner is None:
            from nemo_run.run.torchx_backend.runner import get_runner

            self._runner = get_runner()
        return self._runner

    def _state_elsewhere(self, row: JobRow) -> dict[int, tuple[str, int | None, str]]:
        status = self._nemo_runner().status(row.handle)
        if status is None or status.state == AppState.UNKNOWN:
            return {}
        kind, code = "ended", int(status.state != AppState.SUCCEEDED)
        if not is_terminal(status.state):
            kind, code = "running", None
        elif status.state == AppState.CANCELLED:
            kind, code = "interrupted", None
        return {row.num: (kind, code, status.state.name)}


def _by_tunnel(groups: dict[str, list[JobRow]], executor: Any) -> dict[str, list[JobRow]]:
    """Rows whose Slurm is reached the same way: asked for in one command."""
    merged: dict[str, list[JobRow]] = {}
    for rows in groups.values():
        tunnel = executor(rows[0]).tunnel
        key = f"{type(tunnel).__name__} {getattr(tunnel, 'user', '')}@{getattr(tunnel, 'host', '')}"
        merged.setdefault(key, []).extend(rows)
    return merged


def _kind(state: str) -> str:
    if state in slurm.IN_MIND:
        return "running"
    if state in slurm.AGAIN:
        return "again"
    return "interrupted" if state in slurm.INTERRUPTED else "ended"
