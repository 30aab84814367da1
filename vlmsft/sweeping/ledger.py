"""The ledger of a sweep: each job with its identity and its state, in runs/sweeps/<sweep id>/ledger.sqlite.

    pending     to be started; also what was interrupted, preempted or lost with its machine: it goes on from its last
                checkpoint
    running     claimed by a launcher: a process, or a job of Slurm or another executor, queued or running
    done, failed, cancelled
    infeasible  can't run as it is configured (`reason` says why), and is not started

Written by launchers and the commands of vlmsft.sweep, never by workers, who leave a report in their run folder
(vlmsft.sweeping.report): `jobs()` reads both. Each change is one immediate transaction that names the states it may
change, so that of two who want the same job one gets it. The journal is SQLite's rollback journal and not WAL, which
needs memory that all writers share: that is one machine, and a sweep's folder often lies on NFS.

Imports neither torch nor NeMo.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from vlmsft.errors import Problem, UserError, nearest
from vlmsft.sweeping.report import is_locked, read_report

FILE = "ledger.sqlite"
STATES = ("pending", "running", "done", "failed", "infeasible", "cancelled")
TIMEOUT_SECONDS = 60.0
"""How long a writer waits for another one."""
STARTING_SECONDS = 30.0
"""From a job's claim to its process or submission, at most."""
INTERRUPTED_EXIT_CODES = (130, 143)
"""128 + SIGINT, 128 + SIGTERM."""


@dataclass(frozen=True)
class JobRow:
    """A job of a sweep.

    num: its number; the run's id is <sweep id>-<num> where the user gave none
    identity: hash of its config (vlmsft.sweeping.identity)
    overrides: what varies, 'key=value' each
    reason: of its state, '' where there is nothing to say
    exit_code: of its last process, 128 + signal where one ended it; None before, and where nobody knows
    started, ended: seconds since the epoch; started counts from the claim, a queue's time with it
    objective: the metric that the sweep looks for, None where the job has none (yet)
    command: what a worker runs
    executor: NeMo-Run's, as its ZlibJSONSerializer writes it; None = one process on this machine
    is_local: a process of this machine, which the launcher starts itself
    num_gpus: that a process on this machine gets for itself
    max_steps: of the training, for its progress
    record: what the run folder's record is made of at each start: config_yaml, overrides, image_folders
    host: where a local job was started
    handle: of a submitted job, as NeMo-Run writes it: slurm_tunnel://nemo_run/1234
    """

    num: int
    identity: str
    overrides: list[str]
    run_dir: str
    state: str = "pending"
    reason: str = ""
    exit_code: int | None = None
    started: float | None = None
    ended: float | None = None
    objective: float | None = None
    command: list[str] = field(default_factory=list)
    executor: str | None = None
    is_local: bool = True
    num_gpus: int = 0
    max_steps: int | None = None
    record: dict[str, Any] = field(default_factory=dict)
    host: str | None = None
    handle: str | None = None


_COLUMNS = tuple(each.name for each in fields(JobRow))
_JSON = ("overrides", "command", "record")


class Ledger:
    """The ledger in a sweep's folder. Safe to open in several processes at once.

    folder: runs/sweeps/<sweep id>; made with its ledger where `create`

    Raises UserError where there is none.
    """

    def __init__(self, folder: str | os.PathLike[str], create: bool = False):
        self.folder = Path(folder)
        self.id = self.folder.name
        self.path = self.folder / FILE
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_tables()
        elif not self.path.is_file():
            raise UserError(Problem("sweep", str(folder), f"a folder with a {FILE}"))

    def _make_tables(self) -> None:
        with self._transaction() as connection:
            columns = ", ".join("num INTEGER PRIMARY KEY" if name == "num" else name for name in _COLUMNS)
            connection.execute(f"CREATE TABLE IF NOT EXISTS jobs ({columns}, UNIQUE (identity))")
            connection.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value)")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One connection for each use: it survives a fork and holds no lock that nobody needs."""
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        finally:
            connection.close()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=TIMEOUT_SECONDS, isolation_level=None)
        try:
            yield connection
        finally:
            connection.close()

    # -- reading

    def jobs(self) -> list[JobRow]:
        """All jobs by number, with what running ones reported since, and whether a process of theirs lives."""
        return [as_reported(row) for row in self.written()]

    def written(self) -> list[JobRow]:
        """All jobs by number, as they stand in the file."""
        with self._reading() as connection:
            rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs ORDER BY num").fetchall()
        return [_row(values) for values in rows]

    def states(self) -> dict[int, str]:
        """The states in the file, by number."""
        with self._reading() as connection:
            return dict(connection.execute("SELECT num, state FROM jobs"))

    def job(self, num: int) -> JobRow:
        with self._reading() as connection:
            values = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE num = ?", (num,)).fetchone()
        if values is None:
            raise UserError(Problem("job", str(num), f"a job of sweep {self.id}: 0 to {len(self.states()) - 1}"))
        return _row(values)

    def facts(self) -> dict[str, Any]:
        """What the launcher noted of the sweep as a whole."""
        with self._reading() as connection:
            return {name: json.loads(value) for name, value in connection.execute("SELECT name, value FROM facts")}

    # -- writing

    def note(self, **facts: Any) -> None:
        """Sets facts of the sweep as a whole; values as JSON has them."""
        with self._transaction() as connection:
            for name, value in facts.items():
                connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def add(self, jobs: Sequence[JobRow]) -> None:
        """Adds jobs; one whose number is there already is replaced, unless it runs or is over."""
        with self._transaction() as connection:
            states = dict(connection.execute("SELECT num, state FROM jobs"))
            for job in jobs:
                if states.get(job.num, "pending") in ("pending", "infeasible", "cancelled"):
                    marks = ", ".join("?" * len(_COLUMNS))
                    connection.execute(f"INSERT OR REPLACE INTO jobs VALUES ({marks})", _values(job))

    def move(self, num: int, to: str, from_states: Sequence[str], **changes: Any) -> bool:
        """Changes a job's state and other fields, if its state is one of `from_states`; whether it was."""
        changes = {"state": to, **changes}
        names = ", ".join(f"{name} = ?" for name in changes)
        marks = ", ".join("?" * len(from_states))
        values = [_cell(name, value) for name, value in changes.items()]
        with self._transaction() as connection:
            found = connection.execute(
                f"UPDATE jobs SET {names} WHERE num = ? AND state IN ({marks})", (*values, num, *from_states)
            )
            return found.rowcount == 1

    def set(self, num: int, **changes: Any) -> None:
        """Changes fields of a job, whatever its state."""
        self.move(num, self.job(num).state, STATES, **changes)


def _row(values: Sequence[Any]) -> JobRow:
    cells = dict(zip(_COLUMNS, values, strict=True))
    job = JobRow(**{name: json.loads(cell) if name in _JSON else cell for name, cell in cells.items()})
    return replace(job, is_local=bool(job.is_local))


def _values(job: JobRow) -> list[Any]:
    return [_cell(name, getattr(job, name)) for name in _COLUMNS]


def _cell(name: str, value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if name in _JSON else value


def as_reported(row: JobRow, starting_seconds: float = STARTING_SECONDS) -> JobRow:
    """A job that the ledger has as running, as its worker left it.

    starting_seconds: since its claim, in which it need not have a process yet; 0 where no launcher lives to start one
    """
    if row.state != "running":
        return row
    report = read_report(row.run_dir)
    # one that failed or was interrupted on Slurm may be queued again
    if report is not None and report.ended is not None and (row.handle is None or report.exit_code == 0):
        return ended(row, report.exit_code, report.reason, report.ended)
    is_known = row.handle is not None if not row.is_local else is_locked(row.run_dir) or is_elsewhere(row)
    if is_known or time.time() - (row.started or 0) < starting_seconds:
        return row
    return replace(row, state="pending", reason="its process is gone: it goes on from its last checkpoint")


def is_elsewhere(row: JobRow) -> bool:
    """Whether it is a process of another machine, of which only its report tells."""
    return row.is_local and row.host not in (None, socket.gethostname())


def ended(row: JobRow, exit_code: int | None, reason: str = "", when: float | None = None) -> JobRow:
    """The job as it stands after its process ended.

    exit_code: None where nobody saw it
    """
    when = time.time() if when is None else when
    if exit_code == 0:
        return replace(row, state="done", reason="", exit_code=0, ended=when)
    if exit_code in INTERRUPTED_EXIT_CODES:
        text = "interrupted: it goes on from its last checkpoint"
        return replace(row, state="pending", reason=text, exit_code=exit_code, ended=when)
    return replace(row, state="failed", reason=reason or _died(exit_code), exit_code=exit_code, ended=when)


def _died(exit_code: int | None) -> str:
    if exit_code is None:
        return "its process died without a word"
    return f"killed by signal {exit_code - 128} (9: out of memory?)" if exit_code > 128 else f"exit code {exit_code}"


# --- all sweeps -------------------------------------------------------------------------------------------------------


def sweep_folders(root: str | os.PathLike[str]) -> list[Path]:
    """The folders of all sweeps below `root` (runs/sweeps), the newest first."""
    folders = [path.parent for path in Path(root).glob(f"*/{FILE}")]
    return sorted(folders, key=lambda folder: (folder / FILE).stat().st_mtime, reverse=True)


def find_sweep(root: str | os.PathLike[str], id: str | None) -> Path:
    """The folder of the sweep whose id starts with `id`; the newest for None. Raises UserError where it isn't one."""
    folders = sweep_folders(root)
    if not folders:
        raise UserError(Problem("sweep", f"no sweep in {root}", "one that was launched from this folder"))
    if id is None:
        return folders[0]
    exact = [folder for folder in folders if folder.name == id]
    found = exact or [folder for folder in folders if folder.name.startswith(id)]
    if len(found) == 1:
        return found[0]
    names = [folder.name for folder in found or folders]
    remedy = "" if found else nearest(id, names)
    raise UserError(Problem("sweep", repr(id), f"the id of one sweep: {', '.join(names[:10])}", remedy))
