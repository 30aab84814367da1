"""What a user sees of a sweep: a table of its jobs, live in a terminal, and a line for each change elsewhere."""

from __future__ import annotations

import datetime
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vlmsft.runtime.logging import console, quiet
from vlmsft.sweeping.ledger import STATES, JobRow, Ledger
from vlmsft.sweeping.local import OUTPUT_FILE
from vlmsft.sweeping.objective import progress_of
from vlmsft.sweeping.schedule import Interrupted, Watcher, only_launcher, read_options, run_jobs

LAUNCHER_LOG = "launcher.log"
REFRESH_SECONDS = 1.0
NOTE_LENGTH = 70
STYLES = {"running": "cyan", "done": "green", "failed": "red", "infeasible": "yellow", "cancelled": "yellow"}


def run_and_show(ledger: Ledger, nums: Sequence[int]) -> int:
    """Runs the pending ones of the jobs, and tells how they go; gives the exit code: 1 unless all are done or
    infeasible, and some are done. Raises Interrupted.
    """
    options, out = read_options(ledger), console()
    before = Counter(row.state for row in ledger.jobs() if row.num in nums)
    say(f"sweep {ledger.id}: {counted(before)}")
    watcher = LiveWatcher(ledger, out) if out.is_terminal else LineWatcher(ledger)
    try:
        with quiet(ledger.folder), watcher:
            run_jobs(ledger, nums, options, watcher)
    except Interrupted:
        say_end(ledger, nums)
        raise
    say_end(ledger, nums)
    states = {row.state for row in ledger.jobs() if row.num in nums}
    return 0 if states <= {"done", "infeasible"} and states != {"infeasible"} else 1


def dry_run(ledger: Ledger, nums: Sequence[int]) -> None:
    """Writes what would be started or submitted, and starts nothing."""
    from vlmsft.sweeping.experiment import SweepExperiment

    rows = [row for row in ledger.jobs() if row.num in nums and row.state == "pending"]
    with quiet(ledger.folder), SweepExperiment(ledger.folder, rows).prepared() as experiment:
        scripts = experiment.scripts()
    say(f"dry run of sweep {ledger.id}, nothing was started: {counted(Counter(row.state for row in rows))}")
    for line in scripts or [experiment.folder]:
        say(f"  {line}")
    say(f"to start it: python -m vlmsft.sweep resume {ledger.id}")


def detach(ledger: Ledger) -> None:
    """Goes on in a process of its own, which the end of this one or of its terminal doesn't end. Raises UserError where
    another process runs the sweep.
    """
    with only_launcher(ledger.folder):
        pass
    command = [sys.executable, "-m", "vlmsft.sweep", "resume", ledger.id]
    command.append(f"sweeps_dir={ledger.folder.parent}")
    with open(ledger.folder / LAUNCHER_LOG, "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    say(f"sweep {ledger.id} runs in the background (process {process.pid}, {ledger.folder / LAUNCHER_LOG})")
    say(f"how it is: python -m vlmsft.sweep status {ledger.id}")


class LineWatcher(Watcher):
    """A line for each change."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def __enter__(self) -> LineWatcher:
        return self

    def __exit__(self, *error: object) -> None: ...

    def job(self, row: JobRow) -> None:
        say(line_of(row))

    def stopping(self, waits: bool) -> None:
        if waits:
            say("stopping: jobs end after their step and save (again: at once) ...")


class LiveWatcher(LineWatcher):
    """The table, live."""

    def __init__(self, ledger: Ledger, out: Console):
        super().__init__(ledger)
        self._live = Live(table_of(ledger), console=out, auto_refresh=False, transient=True)
        self._shown = 0.0

    def __enter__(self) -> LiveWatcher:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def tick(self) -> None:
        if time.monotonic() - self._shown > REFRESH_SECONDS:
            self._shown = time.monotonic()
            self._live.update(table_of(self.ledger), refresh=True)


def watch(ledger: Ledger) -> None:
    """The table, live until the sweep is over or Ctrl-C."""
    with Live(table_of(ledger), console=console(), auto_refresh=False) as live:
        while any(row.state == "running" for row in ledger.jobs()):
            live.update(table_of(ledger), refresh=True)
            time.sleep(REFRESH_SECONDS)
        live.update(table_of(ledger), refresh=True)


def say(text: str) -> None:
    console().print(text, markup=False, highlight=False)


def say_end(ledger: Ledger, nums: Sequence[int]) -> None:
    """All jobs, and what to type where some are not done."""
    rows = [row for row in ledger.jobs() if row.num in nums]
    console().print(table_of(ledger))
    counts = Counter(row.state for row in rows)
    say(f"sweep {ledger.id}: {counted(counts)}")
    if counts["infeasible"] == len(rows):
        say("no job was started, since none can run:")
        for row in rows:
            say(f"  {line_of(row)}")
    if counts["pending"] or counts["cancelled"]:
        say(f"to go on: python -m vlmsft.sweep resume {ledger.id}, or the same command again")
    if counts["running"]:
        say(f"still running elsewhere: python -m vlmsft.sweep status {ledger.id}; resume follows them again")
    if counts["failed"]:
        num = next(row.num for row in rows if row.state == "failed")
        say(f"why: python -m vlmsft.sweep logs {ledger.id} job={num}; again: python -m vlmsft.sweep retry {ledger.id}")


def counted(counts: Counter[str]) -> str:
    """'2 done, 1 failed'"""
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "no jobs"


def line_of(row: JobRow) -> str:
    """A job's state in a line."""
    words = f"job {row.num} ({' '.join(row.overrides)}): {row.state}"
    if row.state == "running":
        return f"{words}, {row.run_dir}"
    if row.state == "done":
        return f"{words} in {duration(row)}{'' if row.objective is None else f', objective {row.objective:.6g}'}"
    return f"{words}, {first_of(row.reason)}" if row.reason else words


def table_of(ledger: Ledger) -> Table:
    """All jobs: state, progress, losses, time, objective, and what is to be said."""
    rows, options = ledger.jobs(), read_options(ledger)
    counts = Counter(row.state for row in rows)
    best = best_of(rows, options.objective_mode)
    table = Table(title=f"sweep {ledger.id}: {counted(counts)}", title_justify="left", box=None, pad_edge=False)
    for name in ("job", "what varies", "state"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "loss", "val loss", "time", f"{options.objective_mode} {options.objective}"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note")  # the one that gives way in a narrow terminal
    for row in rows:
        progress = progress_of(row.run_dir)
        steps = f"{progress.step}/{row.max_steps}" if row.max_steps is not None else str(progress.step)
        table.add_row(
            str(row.num),
            "\n".join(short(word) for word in row.overrides),
            Text(row.state, style=STYLES.get(row.state, "")),
            steps if row.state != "infeasible" else "",
            number(progress.train_loss),
            number(progress.val_loss),
            duration(row),
            Text(number(row.objective), style="bold" if row.num == best else ""),
            Text(note_of(row)),
        )
    return table


def short(override: str) -> str:
    """'optim.max_lr=1e-5' as 'max_lr=1e-5': a table has little room."""
    key, equals, value = override.partition("=")
    return f"{key.rpartition('.')[2]}{equals}{value}"


def best_of(rows: Sequence[JobRow], mode: str) -> int | None:
    """The number of the job with the best objective; None where 'last' tells no better from worse."""
    found = [(row.objective, row.num) for row in rows if row.objective is not None]
    if not found or mode == "last":
        return None
    return (min if mode == "min" else max)(found)[1]


def note_of(row: JobRow) -> str:
    if row.state == "running" and row.handle is not None:
        return row.handle.rpartition("/")[2]
    note = first_of(row.reason) if row.reason else ""
    return note if len(note) <= NOTE_LENGTH else f"{note[: NOTE_LENGTH - 1]}…"


def first_of(reason: str) -> str:
    """A line: of several problems the first one, behind its count."""
    first, *more = reason.splitlines()
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def duration(row: JobRow) -> str:
    """Since its start, or from start to end: 1:02:03."""
    if row.started is None:
        return ""
    seconds = (time.time() if row.ended is None else row.ended) - row.started
    return str(datetime.timedelta(seconds=round(max(seconds, 0))))


def output_of(ledger: Ledger, row: JobRow) -> list[Path]:
    """The files with what a job has printed: its own, a submitted one's below NeMo-Run's, and NeMo's log."""
    below = ledger.folder / "nemo-run" / "experiments"
    submitted = sorted(below.glob(f"*/*/job_{row.num}/log*.out"), key=lambda path: path.stat().st_mtime)
    files = [Path(row.run_dir, OUTPUT_FILE), *submitted[-1:], Path(row.run_dir, "nemo.log")]
    return [path for path in files if path.is_file()]
