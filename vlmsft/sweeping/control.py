"""What other processes than a sweep's launcher do with its jobs."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from vlmsft.runtime.logging import quiet
from vlmsft.sweeping import local
from vlmsft.sweeping.ledger import JobRow, Ledger, ended
from vlmsft.sweeping.report import is_locked
from vlmsft.sweeping.schedule import remote_end, settle, write_end


def refresh(ledger: Ledger) -> None:
    """Writes down what became of submitted jobs, where no launcher follows them any more."""
    rows = [row for row in settle(ledger) if row.state == "running" and row.handle is not None]
    if not rows:
        return
    from vlmsft.sweeping.experiment import Submitted

    with quiet(ledger.folder):
        states = Submitted(ledger.folder).states(rows)
    for row in rows:
        kind, code, word = states.get(row.num, ("running", None, ""))
        if kind == "ended":
            write_end(ledger, row, remote_end(row, code, word))
        elif kind != "running":
            write_end(ledger, row, ended(row, 143))


def cancel_jobs(ledger: Ledger, rows: Sequence[JobRow]) -> list[JobRow]:
    """Ends those that run, and keeps the pending ones from being started; gives those of other machines.

    First the state, then the process: a launcher that follows the job sees that it was no failure.
    """
    settle(ledger)
    here, submitted, elsewhere = [], [], []
    for row in rows:
        if ledger.move(row.num, "cancelled", ["pending"], reason="before it was started"):
            continue
        row = ledger.job(row.num)
        if row.state == "running" and row.is_local and row.host != socket.gethostname() and is_locked(row.run_dir):
            elsewhere.append(row)
        elif ledger.move(row.num, "cancelled", ["running"], reason="while it was running"):
            (submitted if row.handle is not None else here).append(row)
    if submitted:
        from vlmsft.sweeping.experiment import Submitted

        with quiet(ledger.folder):
            Submitted(ledger.folder).cancel(submitted)
    if here:
        local.stop([row.run_dir for row in here])
    return elsewhere
