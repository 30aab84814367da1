"""What other processes than a sweep's launcher do with its jobs."""

from __future__ import annotations

from collections.abc import Sequence

from vlmsft.errors import UserError
from vlmsft.runtime.logging import quiet
from vlmsft.sweeping import local
from vlmsft.sweeping.ledger import JobRow, Ledger, ended, is_elsewhere
from vlmsft.sweeping.schedule import only_launcher, remote_end, settle, write_end


def refresh(ledger: Ledger) -> None:
    """Writes down what became of running jobs, where no launcher follows them any more."""
    try:
        with only_launcher(ledger.folder):
            _refresh(ledger)
    except UserError:
        return  # the launcher does


def _refresh(ledger: Ledger) -> None:
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
    refresh(ledger)
    here, submitted, elsewhere = [], [], []
    for row in rows:
        if ledger.move(row.num, "cancelled", ["pending"], reason="before it was started"):
            continue
        row = ledger.job(row.num)
        if row.state == "running" and is_elsewhere(row):
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
