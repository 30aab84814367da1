"""Runs the jobs of a sweep's ledger, and follows them to their end.

A job's turn comes when there is a place (max_parallel) and, on this machine, GPUs (num_gpus). It is claimed in the
ledger before it is started, so of two who want it one gets it. Its end is what its worker reported, or else how its
process or Slurm says it ended.

Ctrl-C, SIGTERM and a closed terminal end the jobs of this machine too (a second one: at once); submitted ones go on,
and are found again by the next launcher. After SIGKILL the jobs of this machine go on as well: the next launcher sees
their locks, and follows them.
"""

from __future__ import annotations

import contextlib
import contextvars
import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from vlmsft.errors import Problem, UserError
from vlmsft.sweeping import local
from vlmsft.sweeping.gpus import Gpus
from vlmsft.sweeping.ledger import JobRow, Ledger, as_reported, ended, is_elsewhere
from vlmsft.sweeping.objective import objective_of
from vlmsft.sweeping.report import RUNS_ALREADY_EXIT_CODE, forget_report, is_locked, read_report

if TYPE_CHECKING:
    import subprocess

    from vlmsft.sweeping.experiment import SweepExperiment

LOCK_FILE = "launcher.lock"
POLL_SECONDS = 0.05
SLURM_POLL_SECONDS = 5.0
SUBMITTING_THREADS = 16  # as NeMo-Run's Experiment has
COMPLETING, COMPLETING_SECONDS = "COMPLETING", 60.0  # Slurm's word, and what such a job is waited for
LEDGER_POLL_SECONDS = 1.0
UNKNOWN_SECONDS = 300.0
"""After which a submitted job that nobody can tell of is given up."""
GLANCE_SECONDS = 5.0
"""For which `vlmsft.sweep status` may keep a sweep to itself."""


@dataclass(frozen=True)
class Options:
    """How a sweep runs: the launcher's keys, frozen with it.

    max_parallel: jobs at once; None = as many as have GPUs here, one where jobs need none; no limit elsewhere
    on_failure: 'continue', or 'stop' = start nothing more after a failure
    objective: a column of metrics.csv
    objective_mode: 'min', 'max' or 'last' of its values
    """

    max_parallel: int | None = None
    on_failure: str = "continue"
    objective: str = "val_loss"
    objective_mode: str = "min"


def read_options(ledger: Ledger) -> Options:
    return Options(**ledger.facts()["options"])


def write_options(ledger: Ledger, options: Options) -> None:
    ledger.note(options=asdict(options))


class Interrupted(Exception):
    """number: of the signal"""

    def __init__(self, number: int):
        self.number = number


class Watcher:
    """Is told how a sweep goes; does nothing by itself."""

    def job(self, row: JobRow) -> None:
        """After each change of a job's state."""

    def tick(self) -> None:
        """Again and again while jobs run."""

    def stopping(self, waits: bool) -> None:
        """When it was interrupted. waits: for jobs of this machine, which end now"""


def try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def only_launcher(folder: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Raises UserError where another process runs this sweep, and still does after `wait_seconds`."""
    path = folder / LOCK_FILE
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_seconds
        while not (is_mine := try_lock(file)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if not is_mine:
            file.seek(0)
            by = file.read().strip() or "another process"
            remedy = f"python -m vlmsft.sweep status {folder.name} shows how it is"
            raise UserError(Problem("sweep", f"{folder.name}, which {by} runs", "a sweep that nobody runs", remedy))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise Interrupted; a second one again."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_jobs(
    ledger: Ledger,
    nums: Sequence[int],
    options: Options,
    watcher: Watcher | None = None,
) -> None:
    """Runs those of the jobs `nums` that are pending, until all are over. Raises Interrupted."""
    watcher = Watcher() if watcher is None else watcher
    with only_launcher(ledger.folder, GLANCE_SECONDS), _signals():
        settled = settle_submitted(ledger, settle(ledger, nums))
        rows = [row for row in settled if row.state in ("pending", "running")]
        if not any(row.state == "pending" for row in rows):
            _follow(Loop(ledger, options, rows, None, watcher))
            return
        from vlmsft.sweeping.experiment import SweepExperiment

        with SweepExperiment(ledger.folder, rows).prepared() as experiment:
            _follow(Loop(ledger, options, rows, experiment, watcher))


def _follow(loop: Loop) -> None:
    try:
        while True:
            loop.look()
            loop.start_what_fits()
            loop.watcher.tick()
            if loop.is_over:
                return
            time.sleep(POLL_SECONDS)
    except Interrupted:
        loop.watcher.stopping(any(row.is_local for row in loop.running.values()))
        with contextlib.suppress(Interrupted):
            loop.stop()
        raise


def settle(ledger: Ledger, nums: Sequence[int] | None = None) -> list[JobRow]:
    """Writes into the ledger what became of the jobs that it has as running; gives the jobs `nums`, or all.

    For the one launcher of the sweep: what another one has claimed and not started yet would be taken from it.
    """
    settled = []
    for row in ledger.written():
        if nums is None or row.num in nums:
            now = as_reported(row, starting_seconds=0)
            settled.append(row if now.state == row.state else write_end(ledger, row, now))
    return settled


def settle_submitted(ledger: Ledger, rows: list[JobRow]) -> list[JobRow]:
    """The rows, of which those that somebody cancelled at the executor, when no launcher looked, are pending again."""
    submitted = [row for row in rows if row.state == "running" and not row.is_local and row.handle is not None]
    if not submitted:
        return rows
    from vlmsft.sweeping.experiment import Submitted

    others = Submitted(ledger.folder)
    said = others.states(submitted)
    deadline = time.monotonic() + COMPLETING_SECONDS
    while any(word == COMPLETING for _, _, word in said.values()) and time.monotonic() < deadline:
        time.sleep(SLURM_POLL_SECONDS)  # its tasks are ending; Slurm kills them after its KillWait
        said = others.states(submitted)
    lost = {row.num for row in submitted if row.num in said and said[row.num][0] in ("interrupted", "again")}
    return [write_end(ledger, row, ended(row, 143)) if row.num in lost else row for row in rows]


def write_end(ledger: Ledger, row: JobRow, now: JobRow) -> JobRow:
    """Writes down how a running job ended, unless it was cancelled meanwhile; gives the job as it stands then."""
    if now.state == "done":
        options = read_options(ledger)
        now = replace(now, objective=objective_of(row.run_dir, options.objective, options.objective_mode))
    changes = {name: getattr(now, name) for name in ("reason", "exit_code", "ended", "objective")}
    ledger.move(row.num, now.state, ["running"], **changes)
    return ledger.job(row.num)


class Loop:
    """Starts, watches and ends the jobs of one launcher.

    rows: pending jobs, and running ones of an earlier launcher
    experiment: None where nothing is to be started
    """

    def __init__(
        self,
        ledger: Ledger,
        options: Options,
        rows: Sequence[JobRow],
        experiment: SweepExperiment | None,
        watcher: Watcher,
    ):
        self.ledger, self.options, self.experiment, self.watcher = ledger, options, experiment, watcher
        self.pending = [row for row in rows if row.state == "pending"]
        self.running = {row.num: row for row in rows if row.state == "running"}
        self.failed = False
        self._processes: dict[int, subprocess.Popen] = {}
        self._gpus = Gpus(self.pending)
        self._submitted: Any = None
        self._connected = False
        self._asked = self._looked = 0.0
        self._told: dict[int, float] = {}

    @property
    def is_over(self) -> bool:
        return not self.running and (not self.pending or self._holds_back)

    @property
    def _holds_back(self) -> bool:
        return self.failed and self.options.on_failure == "stop"

    # -- starting

    def start_what_fits(self) -> None:
        to_submit = []
        for row in list(self.pending):
            if self._holds_back or not self._has_place(row):
                break
            if not row.is_local:
                self.pending.remove(row)
                self.running[row.num] = row
                to_submit.append(row)
            elif self._gpus.take(row):
                self.pending.remove(row)
                self._start_here(row)
        if to_submit:
            self._submit(to_submit)

    def _has_place(self, row: JobRow) -> bool:
        limit = self.options.max_parallel
        if limit is None and row.is_local and row.num_gpus == 0:
            limit = 1
        return limit is None or len(self.running) < limit

    def _claim(self, row: JobRow) -> JobRow | None:
        """The job as it runs from now on; None where it was cancelled meanwhile."""
        forget_report(row.run_dir)
        claim = {"reason": "", "started": time.time(), "ended": None, "exit_code": None, "handle": None}
        if not self.ledger.move(row.num, "running", ["pending"], host=socket.gethostname(), **claim):
            return None
        keep_record(row)
        return self.ledger.job(row.num)

    def _start_here(self, row: JobRow) -> None:
        claimed = self._claim(row)
        if claimed is None:
            self._gpus.give_back(row.num)
            return
        self.running[row.num] = claimed
        assert self.experiment is not None
        command, environment = self.experiment.command(row.num)
        process = local.start(row.run_dir, command, {**environment, **self._gpus.environment(row.num)})
        if process is not None:  # None: a process that nobody knew of has its lock, and is followed
            self._processes[row.num] = process
        self.watcher.job(self.running[row.num])

    def _submit(self, rows: Sequence[JobRow]) -> None:
        """As many at once as NeMo-Run's Experiment would. Interrupted, those whose turn hasn't come stay pending."""
        assert self.experiment is not None
        if not self._connected:
            self.experiment.connect()
            self._connected = True
        with ThreadPoolExecutor(SUBMITTING_THREADS) as pool:
            context = contextvars.copy_context  # NeMo-Run keeps its current experiment there
            try:
                futures = {pool.submit(context().run, self._submit_one, row): row for row in rows}
                for future in as_completed(futures):
                    self._note_submission(futures[future], future.result())
            finally:
                pool.shutdown(cancel_futures=True)
                self.experiment.note([row.num for row in rows])

    def _submit_one(self, row: JobRow) -> JobRow | None:
        """The job after its submission, or after what came of it; None where it wasn't claimed. Runs in a thread."""
        claimed = None if self._holds_back else self._claim(row)
        if claimed is None:
            return None
        assert self.experiment is not None
        try:
            handle = self.experiment.submit(row.num)
        except UserError as error:
            return ended(claimed, 1, str(error))
        if not self.ledger.move(row.num, "running", ["running"], handle=handle):  # cancelled while it was submitted
            self.ledger.move(row.num, "cancelled", ["cancelled"], handle=handle)
            self._others().cancel([self.ledger.job(row.num)])
        return self.ledger.job(row.num)

    def _note_submission(self, row: JobRow, now: JobRow | None) -> None:
        if now is None:
            del self.running[row.num]
        elif now.state == "running":
            self.running[row.num] = now
            self.watcher.job(now)
        else:
            self._end(row, now)

    # -- watching

    def look(self) -> None:
        """Notes which jobs are over."""
        for num, process in list(self._processes.items()):
            code = local.exit_code(process)
            if code is not None:
                row = self.running[num]
                del self._processes[num]
                if code not in (0, RUNS_ALREADY_EXIT_CODE):
                    local.kill([row.run_dir])  # its children: it could not see to them, nor torchrun to a killed rank's
                self._end(row, self._local_end(row, code))
        now = time.monotonic()
        if now - self._looked > LEDGER_POLL_SECONDS:
            self._looked = now
            self._look_at_others()
        if now - self._asked > SLURM_POLL_SECONDS and any(not row.is_local for row in self.running.values()):
            self._asked = now
            self._ask_executors()

    def _local_end(self, row: JobRow, code: int) -> JobRow:
        report = read_report(row.run_dir)
        if code == RUNS_ALREADY_EXIT_CODE:
            return row
        if report is None or report.ended is None:
            return ended(row, code)
        if code != 0 and report.exit_code == 0:  # another rank failed
            return ended(row, code, report.reason)
        return ended(row, report.exit_code, report.reason, report.ended)

    def _look_at_others(self) -> None:
        """At jobs of an earlier launcher, which are no children of this process, and at what was cancelled."""
        states = self.ledger.states()
        self.pending = [row for row in self.pending if states[row.num] == "pending"]
        for row in list(self.running.values()):
            if states[row.num] == "cancelled" and row.num not in self._processes and not is_locked(row.run_dir):
                self._end(row, self.ledger.job(row.num))
            elif row.is_local and row.num not in self._processes and not is_locked(row.run_dir):
                if is_elsewhere(row) and as_reported(row).state == "running":
                    continue
                report = read_report(row.run_dir)
                code, reason = (None, "") if report is None else (report.exit_code, report.reason)
                self._end(row, ended(row, code, reason))

    def _ask_executors(self) -> None:
        now = time.monotonic()
        submitted = [row for row in self.running.values() if not row.is_local]
        for num, (kind, code, word) in self._others().states(submitted).items():
            row = self.running[num]
            self._told[num] = now
            if kind == "ended":
                self._end(row, remote_end(row, code, word))
            elif kind == "interrupted":
                self._end(row, ended(row, 143 if code is None or code < 128 else code))
            elif kind == "again":
                self._end(row, ended(row, 143))
                again = self.ledger.job(num)
                if again.state == "pending":
                    self.pending.append(again)
        for row in submitted:
            silent = now - self._told.setdefault(row.num, now)
            if row.num in self.running and silent > UNKNOWN_SECONDS:
                self._end(row, ended(row, None, f"nobody knows of {row.handle}"))

    def _others(self) -> Any:
        if self._submitted is None:
            from vlmsft.sweeping.experiment import Submitted

            self._submitted = Submitted(self.ledger.folder)
        return self._submitted

    def _end(self, row: JobRow, now: JobRow) -> None:
        if now.state == "running":  # another worker has it
            return
        self.running.pop(row.num, None)
        self._gpus.give_back(row.num)
        settled = write_end(self.ledger, row, now)
        self.failed = self.failed or settled.state == "failed"
        self.watcher.job(settled)

    # -- ending

    def stop(self) -> None:
        """Ends the jobs of this machine; at a second signal they are killed."""
        here = [row for row in self.running.values() if row.is_local]
        try:
            local.stop([row.run_dir for row in here])
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            local.kill([row.run_dir for row in here])
            for row in here:
                if row.num in self._processes:
                    self._processes[row.num].wait()
                report = read_report(row.run_dir)
                self._end(row, ended(row, 0 if report is not None and report.exit_code == 0 else 143))


def remote_end(row: JobRow, code: int | None, word: str) -> JobRow:
    """A submitted job as it stands after its end, by its own report where that agrees with the executor.

    word: the executor's, TIMEOUT for instance
    """
    report = read_report(row.run_dir)
    if report is not None and report.ended is not None and (code != 0) == (report.exit_code != 0):
        return ended(row, report.exit_code, report.reason or f"exit code {report.exit_code}, {word}", report.ended)
    return ended(row, code, f"{word}, exit code {code}")


def keep_record(row: JobRow) -> None:
    """The run folder's record of this start: config, state of the code, fingerprint of the data."""
    if row.record:
        from vlmsft.runtime.provenance import write_run_folder

        images = row.record["image_folders"]
        write_run_folder(
            row.run_dir,
            row.record["config_yaml"],
            overrides=row.record["overrides"],
            data_files=list(images),
            image_folder=images,
        )
